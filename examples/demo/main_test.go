package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"reflect"
	"strings"
	"testing"

	"github.com/ashlar-go/ashlar/examples/payments/gateway"
	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
)

func TestScenario(t *testing.T) {
	var out, errs bytes.Buffer
	err := run(t.Context(), []string{"--scenario", "--payments", "100", "--seed", "7"}, &out, &errs)
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, errs.String(), out.String())
	}
	for _, want := range []string{"The three books are equal", "3 crashes of the service: 1 after-initiated, 1 after-gateway, 1 after-commit", "100 of 100 payments"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}

// A charge that the service never hears of makes the scenario fail, and is named.
func TestScenarioFindsADifference(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	w, err := newWorld(t.Context(), io.Discard, log)
	t.Cleanup(func() {
		if err := w.down(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	started, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		if err := w.run(ctx, func() { close(started) }); err != nil {
			t.Error(err)
		}
	}()
	defer func() { stop(); <-ended }()
	<-started
	stray(t, w.simURL)

	var out bytes.Buffer
	s := &scenario{w: w, out: &out}
	b, err := readBooks(ctx, w.pool, w.sim)
	if err != nil {
		t.Fatal(err)
	}
	if b.equal() || !b.settled() {
		t.Errorf("with a stray charge: equal %v, settled %v", b.equal(), b.settled())
	}
	if err := s.report(ctx, b, 0, 0); err == nil || err.Error() != "the books differ" {
		t.Errorf("the report says %v", err)
	}
	if want := "DIFFERENT stray: gateway 1.23 EUR, ledger nothing, order nothing"; !strings.Contains(out.String(), want) {
		t.Errorf("%q is missing in\n%s", want, out.String())
	}
}

// stray makes a charge at the gateway that no payment is the reason of.
func stray(t *testing.T, url string) {
	t.Helper()
	_, err := gateway.New(url, nil).Charge(t.Context(), gateway.Charge{Reference: "stray", Amount: 123, Currency: "EUR", Token: gatewaysim.OK})
	if err != nil {
		t.Fatal(err)
	}
}

func TestCompare(t *testing.T) {
	a := func(n int64, c string) *amount { return &amount{n, c} }
	for _, tt := range []struct {
		name    string
		entries map[string]*entry
		want    int
	}{
		{"nothing", nil, 0},
		{"equal", map[string]*entry{"a": {a(1, "EUR"), a(1, "EUR"), a(1, "EUR")}}, 0},
		{"not in the ledger", map[string]*entry{"a": {a(1, "EUR"), nil, a(1, "EUR")}}, 1},
		{"not confirmed", map[string]*entry{"a": {a(1, "EUR"), a(1, "EUR"), nil}}, 1},
		{"not charged", map[string]*entry{"a": {nil, a(1, "EUR"), a(1, "EUR")}}, 1},
		{"off by one", map[string]*entry{"a": {a(1, "EUR"), a(2, "EUR"), a(1, "EUR")}}, 1},
		{"another currency", map[string]*entry{"a": {a(1, "EUR"), a(1, "USD"), a(1, "EUR")}}, 1},
		{"equal totals", map[string]*entry{"a": {a(1, "EUR"), a(2, "EUR"), a(1, "EUR")}, "b": {a(2, "EUR"), a(1, "EUR"), a(2, "EUR")}}, 2},
	} {
		b := &books{}
		b.compare(tt.entries)
		if len(b.differences) != tt.want || b.equal() != (tt.want == 0) {
			t.Errorf("%s: %v", tt.name, b.differences)
		}
	}
	for name, b := range map[string]*books{"open": {open: 1}, "rejected": {rejected: 1}} {
		if b.equal() {
			t.Errorf("equal with something %s", name)
		}
	}
}

func TestFormat(t *testing.T) {
	for want, a := range map[string]amount{
		"12.34 EUR": {1234, "EUR"}, "0.01 USD": {1, "USD"}, "1234 JPY": {1234, "JPY"}, "1.234 KWD": {1234, "KWD"}, "0.0123 CLF": {123, "CLF"}, "0.00 EUR": {0, "EUR"},
	} {
		if got := format(a.Amount, a.Currency); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestPlan(t *testing.T) {
	one, same, other := plan(300, 1), plan(300, 1), plan(300, 2)
	if !reflect.DeepEqual(one, same) || reflect.DeepEqual(one, other) {
		t.Error("the seed does not decide the plan")
	}
	kinds := make(map[string]int)
	for _, p := range one {
		kinds[p.request.Token]++
		if p.request.Token == "" || p.request.Amount < 1 || p.copies < 1 {
			t.Fatalf("%+v", p)
		}
	}
	for _, token := range []string{gatewaysim.OK, gatewaysim.Decline, gatewaysim.TimeoutBefore, gatewaysim.TimeoutAfter, gatewaysim.TimeoutLate, gatewaysim.Crash, gatewaysim.CrashBefore, gatewaysim.ErrorAfter} {
		if kinds[token] == 0 {
			t.Errorf("no %s among 300 payments", token)
		}
	}
}

// After the cord is pulled nothing gets through it, in either direction.
func TestCord(t *testing.T) {
	peer, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, err := peer.Accept()
		if err == nil {
			accepted <- conn
		}
	}()
	c := newCord()
	conn, err := c.dial(t.Context(), "tcp", peer.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	other := <-accepted
	defer other.Close()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := c.listen(inner)
	if err != nil {
		t.Fatal(err)
	}
	if !c.pull() || c.pull() {
		t.Error("pull is not told apart from its repetition")
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("a write got out")
	}
	if _, err := other.Read(make([]byte, 1)); err == nil {
		t.Error("the peer does not notice")
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v", err)
	}
	if _, err := c.dial(t.Context(), "tcp", peer.Addr().String()); !errors.Is(err, errCut) {
		t.Errorf("dial: %v", err)
	}
}

func TestUsage(t *testing.T) {
	var errs bytes.Buffer
	if err := run(t.Context(), []string{"--help"}, io.Discard, &errs); !errors.Is(err, flag.ErrHelp) {
		t.Error(err)
	}
	for _, want := range []string{"--scenario", "-port", "-seed", "-payments"} {
		if !strings.Contains(errs.String(), want) {
			t.Errorf("the help does not mention %s", want)
		}
	}
	for _, args := range [][]string{{"extra"}, {"--payments", "0"}, {"--port", "70000"}, {"--nonsense"}} {
		if err := run(t.Context(), args, io.Discard, io.Discard); err == nil {
			t.Error(fmt.Sprint(args), "was accepted")
		}
	}
}
