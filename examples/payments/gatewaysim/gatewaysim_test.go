package gatewaysim_test

import (
	"errors"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ashlar-go/ashlar/examples/payments/gateway"
	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
)

func TestTokens(t *testing.T) {
	const timeout = 200 * time.Millisecond
	sim := gatewaysim.New(&gatewaysim.Options{Late: 2 * timeout})
	srv := httptest.NewServer(sim)
	defer srv.Close()
	c := gateway.New(srv.URL, &gateway.Options{Timeout: timeout})
	entry := func(reference string) string {
		for _, e := range sim.Book() {
			if e.Reference == reference {
				return e.Status
			}
		}
		return ""
	}
	for _, tt := range []struct {
		token  string
		status string // the answer; empty where there is none
		book   string // what the book says when the client has left
	}{
		{gatewaysim.OK, "approved", "approved"},
		{gatewaysim.Decline, "declined", "declined"},
		{"tok_other", "declined", "declined"},
		{gatewaysim.TimeoutBefore, "", ""},
		{gatewaysim.TimeoutAfter, "", "approved"},
		{gatewaysim.TimeoutLate, "", ""},
		{gatewaysim.Crash, "", "approved"},
		{gatewaysim.CrashBefore, "", ""},
		{gatewaysim.ErrorAfter, "", "approved"},
	} {
		ch := gateway.Charge{Reference: tt.token, Amount: 5, Currency: "EUR", Token: tt.token}
		r, err := c.Charge(t.Context(), ch)
		if r.Status != tt.status || errors.Is(err, gateway.ErrUnknown) != (tt.status == "") {
			t.Errorf("%s: answered %q, %v", tt.token, r.Status, err)
		}
		if got := entry(tt.token); got != tt.book {
			t.Errorf("%s: the book says %q, want %q", tt.token, got, tt.book)
		}
		// What is in the book is found by its reference, and answered again.
		_, err = c.Lookup(t.Context(), tt.token, 5, "EUR")
		if errors.Is(err, gateway.ErrNotFound) != (tt.book == "") {
			t.Errorf("%s: lookup: %v", tt.token, err)
		}
		if tt.book != "" {
			if r, err := c.Charge(t.Context(), ch); err != nil || r.Status != tt.book {
				t.Errorf("%s: asked again: %q, %v", tt.token, r.Status, err)
			}
			ch.Amount++
			if _, err := c.Charge(t.Context(), ch); !errors.Is(err, gateway.ErrUnknown) {
				t.Errorf("%s: another amount under its reference: %v", tt.token, err)
			}
		}
	}
	for entry(gatewaysim.TimeoutLate) != "approved" {
		time.Sleep(10 * time.Millisecond)
	}
}

func TestOneChargeForEachReference(t *testing.T) {
	sim := gatewaysim.New(nil)
	srv := httptest.NewServer(sim)
	defer srv.Close()
	c := gateway.New(srv.URL, nil)
	var wg sync.WaitGroup
	results := make([]gateway.Result, 32)
	for i := range results {
		wg.Go(func() {
			var err error
			if results[i], err = c.Charge(t.Context(), gateway.Charge{Reference: "r", Amount: 5, Currency: "EUR", Token: gatewaysim.OK}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	book := sim.Book()
	if len(book) != 1 || book[0].Asked != 32 {
		t.Fatalf("%+v", book)
	}
	for _, r := range results {
		if r.ID != book[0].ID {
			t.Errorf("answered with charge %s, the book has %s", r.ID, book[0].ID)
		}
	}
}

// A request without an answer is given up after Hang, even if its client waits.
func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sim := gatewaysim.New(&gatewaysim.Options{Hang: time.Minute})
		r := httptest.NewRequest("POST", "/charges", strings.NewReader(`{"reference":"r","amount":5,"currency":"EUR","token":"tok_timeout_before"}`))
		start := time.Now()
		func() {
			defer func() {
				if recover() == nil {
					t.Error("it was answered")
				}
			}()
			sim.ServeHTTP(httptest.NewRecorder(), r)
		}()
		if took := time.Since(start); took != time.Minute {
			t.Errorf("held for %v", took)
		}
	})
}
