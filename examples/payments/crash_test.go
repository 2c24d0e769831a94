package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ashlar-go/ashlar/examples/payments/client"
	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
	"github.com/ashlar-go/ashlar/examples/payments/payment"
	"github.com/ashlar-go/ashlar/examples/payments/server"
)

func TestMain(m *testing.M) {
	if point := os.Getenv("PAYMENTS_TEST_KILL"); point != "" {
		if err := child(point); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// child runs an instance that kills itself, as kill -9 does, when it comes to
// the point for the third time.
func child(point string) error {
	w := &world{
		pgURL: os.Getenv("PAYMENTS_TEST_POSTGRES"), seeds: strings.Split(os.Getenv("TEST_KAFKA_SEEDS"), ","),
		simURL: os.Getenv("PAYMENTS_TEST_GATEWAY"), topic: os.Getenv("PAYMENTS_TEST_TOPIC"), log: &safeBuffer{},
	}
	cfg := w.config()
	var times atomic.Int32
	cfg.Payment.At = func(at string) {
		if at == point && times.Add(1) == 3 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	s, err := server.New(cfg)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println("http://" + ln.Addr().String())
	return s.Run(context.Background(), ln)
}

// A service killed at each point between its steps loses nothing and charges
// nobody twice: clients repeat their requests at the next instance.
func TestKilled(t *testing.T) {
	t.Parallel()
	for _, point := range []string{payment.AfterInitiated, payment.AfterGateway, payment.AfterCommit} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "PAYMENTS_TEST_KILL="+point, "PAYMENTS_TEST_POSTGRES="+w.pgURL,
				"PAYMENTS_TEST_GATEWAY="+w.simURL, "PAYMENTS_TEST_TOPIC="+w.topic)
			cmd.Stderr = os.Stderr
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Process.Kill() })
			line, err := bufio.NewReader(out).ReadString('\n')
			if err != nil {
				t.Fatalf("the child's address: %v", err)
			}
			api := client.New(strings.TrimSpace(line), &client.Options{Retries: -1})
			var requests []client.Request
			killed := -1
			for i := range 4 {
				requests = append(requests, request(gatewaysim.OK))
				if _, err := api.Pay(t.Context(), requests[i]); err != nil {
					killed = i
					break
				}
			}
			_ = cmd.Wait()
			if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL || killed != 2 {
				t.Fatalf("the kill did not land: %v, at request %d", cmd.ProcessState, killed)
			}
			var state string
			if err := w.pool.QueryRow(t.Context(), `SELECT state FROM payment WHERE idempotency_key = $1`, requests[2].IdempotencyKey).Scan(&state); err != nil {
				t.Fatal(err)
			}
			charges := len(w.sim.Book())
			wantState, wantCharges := "INITIATED", 3
			switch point {
			case payment.AfterInitiated:
				wantCharges = 2
			case payment.AfterCommit:
				wantState = "AUTHORIZED"
			}
			if state != wantState || charges != wantCharges {
				t.Fatalf("at the kill: %s, %d charges; want %s, %d", state, charges, wantState, wantCharges)
			}

			api = client.New(w.start(nil), &client.Options{Retries: 50})
			for _, r := range requests {
				p, err := api.Pay(t.Context(), r)
				if err != nil {
					t.Fatal(err)
				}
				if !p.Replayed {
					t.Error("a repeated request made a new payment")
				}
			}
			if n := w.books(); n != wantCharges {
				t.Errorf("%d charges, want %d", n, wantCharges)
			}
			for _, e := range w.sim.Book() {
				if e.Asked != 1 {
					t.Errorf("reference %s was charged for %d times", e.Reference, e.Asked)
				}
			}
		})
	}
}
