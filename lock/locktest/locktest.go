// Package locktest is the conformance suite of the lock package: what every
// [lock.Store] and every [lock.Register] must keep.
package locktest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/lock"
)

// TestStore runs the suite. For each test it calls open, which returns a store on
// which nothing was ever held, and frees what it needs with t.Cleanup.
func TestStore(t *testing.T, open func(t *testing.T) lock.Store) {
	for _, test := range []struct {
		name string
		f    func(s suite)
	}{
		{"AcquireRelease", acquireRelease},
		{"Held", held},
		{"Repetitions", repetitions},
		{"NeverHeld", neverHeld},
		{"TokensRise", tokensRise},
		{"SeveralKeys", severalKeys},
		{"SeveralKeysAreOneToken", severalKeysAreOneToken},
		{"PartlyLost", partlyLost},
		{"KeysAreSeparate", keysAreSeparate},
		{"InvalidKeys", invalidKeys},
		{"CancelledContext", cancelledContext},
		{"LeaseEndsThenTakeover", leaseEndsThenTakeover},
		{"ExtendKeepsTheLease", extendKeepsTheLease},
		{"ExtendIsForTheOwnerOnly", extendIsForTheOwnerOnly},
		{"ReleaseIsForTheOwnerOnly", releaseIsForTheOwnerOnly},
		{"OneOfManyAcquires", oneOfManyAcquires},
		{"OneOfManyTakesOver", oneOfManyTakesOver},
		{"OverlappingKeys", overlappingKeys},
		{"WatchTells", watchTells},
		{"LockersExclude", lockersExclude},
		{"LockersHandOver", lockersHandOver},
		{"LockersRenew", lockersRenew},
	} {
		t.Run(test.name, func(t *testing.T) { test.f(suite{t, open(t)}) })
	}
}

const (
	short = 150 * time.Millisecond // a lease that a test sees end
	long  = time.Minute            // one that it does not
)

// A suite is a store and the test that it is under.
type suite struct {
	*testing.T
	store lock.Store
}

// request asks for keys that may be of one lease on every store.
func request(owner string, ttl time.Duration, keys ...string) lock.Request {
	r := lock.Request{Owner: owner, TTL: ttl}
	for _, key := range keys {
		r.Keys = append(r.Keys, "{t}"+key)
	}
	return r
}

// acquire expects the keys to be granted.
func (s suite) acquire(req lock.Request) int64 {
	s.Helper()
	token, err := s.store.Acquire(s.Context(), req)
	if err != nil || token <= 0 {
		s.Fatalf("Acquire by %q = %d, %v; want it granted", req.Owner, token, err)
	}
	return token
}

// refused expects the key to be held.
func (s suite) refused(req lock.Request, key string, ttl time.Duration) {
	s.Helper()
	token, err := s.store.Acquire(s.Context(), req)
	var held *lock.HeldError
	if !errors.As(err, &held) || !errors.Is(err, lock.ErrHeld) {
		s.Fatalf("Acquire by %q = %d, %v; want a HeldError", req.Owner, token, err)
	}
	if held.Key != "{t}"+key || held.RetryAfter <= 0 || held.RetryAfter > ttl+10*time.Millisecond {
		s.Fatalf("Acquire by %q = %+v; want it of %q, for at most %v", req.Owner, *held, key, ttl)
	}
}

func (s suite) extend(req lock.Request) {
	s.Helper()
	if err := s.store.Extend(s.Context(), req); err != nil {
		s.Fatalf("Extend by %q = %v", req.Owner, err)
	}
}

func (s suite) release(req lock.Request) {
	s.Helper()
	if err := s.store.Release(s.Context(), req); err != nil {
		s.Fatalf("Release by %q = %v", req.Owner, err)
	}
}

// lost expects an extension to be refused.
func (s suite) lost(req lock.Request) {
	s.Helper()
	if err := s.store.Extend(s.Context(), req); !errors.Is(err, lock.ErrLost) {
		s.Fatalf("Extend by %q, which holds nothing = %v, want ErrLost", req.Owner, err)
	}
}

// takeOver acquires until it is granted, which must not be before the time at
// which the keys were last acquired or extended plus the TTL.
func (s suite) takeOver(req lock.Request, free time.Time) (token int64) {
	s.Helper()
	s.poll("the lease to end", func() bool {
		var err error
		if token, err = s.store.Acquire(s.Context(), req); err != nil && !errors.Is(err, lock.ErrHeld) {
			s.Fatalf("Acquire of a held key = %v, want ErrHeld", err)
		}
		if err == nil && time.Now().Before(free) {
			s.Fatalf("Acquire was granted %v before the lease ended", time.Until(free))
		}
		return err == nil
	})
	return token
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

// grants runs n acquisitions at once and returns how many were granted.
func (s suite) grants(n int, keys ...string) int {
	s.Helper()
	return s.race(n, func(i int) bool {
		_, err := s.store.Acquire(s.Context(), request(fmt.Sprint("owner ", i), long, keys...))
		if err != nil && !errors.Is(err, lock.ErrHeld) {
			s.Errorf("Acquire = %v, want ErrHeld or nil", err)
		}
		return err == nil
	})
}

func cancelled(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	return ctx
}
