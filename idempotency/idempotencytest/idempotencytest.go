// Package idempotencytest is the conformance suite of the idempotency package:
// what every [idempotency.Store] must keep.
package idempotencytest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/idempotency"
)

// TestStore runs the suite. For each test it calls open, which returns a store
// that holds no record yet, and frees what it needs with t.Cleanup.
func TestStore(t *testing.T, open func(t *testing.T) idempotency.Store) {
	for _, test := range []struct {
		name string
		f    func(t *testing.T, s suite)
	}{
		{"ClaimCompleteReplay", claimCompleteReplay},
		{"InProgress", inProgress},
		{"Repetitions", repetitions},
		{"Mismatch", mismatch},
		{"ReleaseFrees", releaseFrees},
		{"NeverClaimed", neverClaimed},
		{"KeysAreSeparate", keysAreSeparate},
		{"Payloads", payloads},
		{"CancelledContext", cancelledContext},
		{"LeaseEndsThenTakeover", leaseEndsThenTakeover},
		{"LateOwnerMayComplete", lateOwnerMayComplete},
		{"ExtendKeepsTheClaim", extendKeepsTheClaim},
		{"AtMostOnce", atMostOnce},
		{"TTLEnds", ttlEnds},
		{"LeaseOutlivesTTL", leaseOutlivesTTL},
		{"OneOfManyClaims", oneOfManyClaims},
		{"OneOfManyTakesOver", oneOfManyTakesOver},
		{"DoOnce", doOnce},
		{"DoFails", doFails},
		{"DoCancelledMidway", doCancelledMidway},
		{"DoOutlivesItsLease", doOutlivesItsLease},
		{"DoPanics", doPanics},
	} {
		t.Run(test.name, func(t *testing.T) { test.f(t, suite{t, open(t)}) })
	}
}

const (
	short = 150 * time.Millisecond // a lease or TTL that a test sees end
	long  = time.Minute            // one that it does not
)

// A suite is a store and the test that it is under.
type suite struct {
	*testing.T
	store idempotency.Store
}

func key(id string) idempotency.Key {
	return idempotency.Key{Scope: "tenant", ID: id, Fingerprint: []byte("print")}
}

func request(token string, lease time.Duration) idempotency.ClaimRequest {
	return idempotency.ClaimRequest{Token: token, Lease: lease, TTL: long}
}

// claim claims and expects it to be granted.
func (s suite) claim(k idempotency.Key, req idempotency.ClaimRequest) {
	s.Helper()
	c, err := s.store.Claim(s.Context(), k, req)
	if err != nil || c.Done {
		s.Fatalf("Claim by %q = %+v, %v; want it granted", req.Token, c, err)
	}
}

// refused claims and expects the error.
func (s suite) refused(k idempotency.Key, req idempotency.ClaimRequest, want error) {
	s.Helper()
	if c, err := s.store.Claim(s.Context(), k, req); !errors.Is(err, want) {
		s.Fatalf("Claim by %q = %+v, %v; want %v", req.Token, c, err, want)
	}
}

// replayed claims and expects the result of an earlier execution.
func (s suite) replayed(k idempotency.Key, want string) {
	s.Helper()
	c, err := s.store.Claim(s.Context(), k, request("replay", long))
	if err != nil || !c.Done || string(c.Result) != want {
		s.Fatalf("Claim of a completed key = done %v, %d bytes, %v; want the result of %d bytes", c.Done, len(c.Result), err, len(want))
	}
	if c.TTL <= 0 || c.TTL > long {
		s.Fatalf("the TTL that is left is %v, want one in (0, %v]", c.TTL, long)
	}
}

func (s suite) complete(k idempotency.Key, token, result string) {
	s.Helper()
	if err := s.store.Complete(s.Context(), k, token, []byte(result)); err != nil {
		s.Fatalf("Complete by %q = %v", token, err)
	}
}

// lost expects everything that token may try to be refused.
func (s suite) lost(k idempotency.Key, token string) {
	s.Helper()
	for name, f := range map[string]func() error{
		"Extend":   func() error { return s.store.Extend(s.Context(), k, token, long) },
		"Complete": func() error { return s.store.Complete(s.Context(), k, token, []byte("stale")) },
		"Release":  func() error { return s.store.Release(s.Context(), k, token) },
	} {
		if err := f(); !errors.Is(err, idempotency.ErrLeaseLost) {
			s.Fatalf("%s by %q, which holds nothing = %v, want ErrLeaseLost", name, token, err)
		}
	}
}

// takeOver claims until it is granted, which must not be before the time at
// which the key was last claimed or extended plus the lease.
func (s suite) takeOver(k idempotency.Key, req idempotency.ClaimRequest, free time.Time) {
	s.Helper()
	s.poll("the key to be free", func() bool {
		c, err := s.store.Claim(s.Context(), k, req)
		if err != nil && !errors.Is(err, idempotency.ErrInProgress) {
			s.Fatalf("Claim of a key in progress = %v, want ErrInProgress", err)
		}
		if err == nil && (c.Done || time.Now().Before(free)) {
			s.Fatalf("Claim = %+v %v before the lease ended", c, time.Until(free))
		}
		return err == nil
	})
}

func (s suite) poll(what string, ok func() bool) {
	s.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.Fatalf("still waiting for %s after 30 s", what)
}

// race calls f n times at once and returns how many calls returned true.
func (s suite) race(n int, f func(i int) bool) int {
	s.Helper()
	var wins atomic.Int64
	start, done := make(chan struct{}), make(chan struct{})
	for i := range n {
		go func() {
			defer func() { done <- struct{}{} }()
			<-start
			if f(i) {
				wins.Add(1)
			}
		}()
	}
	close(start)
	for range n {
		<-done
	}
	return int(wins.Load())
}

// grants runs n claims at once and returns how many were granted.
func (s suite) grants(n int, k idempotency.Key) int {
	s.Helper()
	return s.race(n, func(i int) bool {
		c, err := s.store.Claim(s.Context(), k, request(fmt.Sprint("claimer ", i), long))
		if err != nil && !errors.Is(err, idempotency.ErrInProgress) {
			s.Errorf("Claim = %v, want ErrInProgress or nil", err)
		}
		return err == nil && !c.Done
	})
}

func cancelled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}
