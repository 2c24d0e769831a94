package lock_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ashlar-go/ashlar/lock"
)

// A faulty store fails as it is told to.
type faulty struct {
	lock.MemoryStore
	acquire, extend, release func(ctx context.Context, call func() error) error
	acquires, extends        atomic.Int64
}

func (s *faulty) Acquire(ctx context.Context, req lock.Request) (token int64, err error) {
	s.acquires.Add(1)
	call := func() error {
		token, err = s.MemoryStore.Acquire(ctx, req)
		return err
	}
	if s.acquire == nil {
		return token, call()
	}
	err = s.acquire(ctx, call)
	return token, err
}

func (s *faulty) Extend(ctx context.Context, req lock.Request) error {
	s.extends.Add(1)
	call := func() error { return s.MemoryStore.Extend(context.WithoutCancel(ctx), req) }
	if s.extend == nil {
		return call()
	}
	return s.extend(ctx, call)
}

func (s *faulty) Release(ctx context.Context, req lock.Request) error {
	call := func() error { return s.MemoryStore.Release(ctx, req) }
	if s.release == nil {
		return call()
	}
	return s.release(ctx, call)
}

var errDown = errors.New("the store is down")

func mustLock(t *testing.T, l *lock.Locker, keys ...string) *lock.Lease {
	t.Helper()
	lease, err := l.Lock(t.Context(), keys...)
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

func mustRelease(t *testing.T, lease *lock.Lease) {
	t.Helper()
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faulty{}
		lease := mustLock(t, lock.New(store, nil), "k")
		time.Sleep(time.Hour)
		if err := lease.Err(); err != nil || lease.Context().Err() != nil {
			t.Fatalf("the lease was lost: %v", err)
		}
		if n := store.extends.Load(); n < 1000 || n > 1100 {
			t.Errorf("%d extensions in an hour of leases of 10 s, want three in each", n)
		}
		mustRelease(t, lease)
		n := store.extends.Load()
		time.Sleep(time.Minute)
		if store.extends.Load() != n {
			t.Error("a released lease was extended")
		}
		mustRelease(t, mustLock(t, lock.New(store, nil), "k"))
	})
}

// Whatever keeps the store from extending the lease, its context ends before the
// store can give the key away.
func TestContextEndsBeforeTheLease(t *testing.T) {
	for name, extend := range map[string]func(ctx context.Context, call func() error) error{
		"down": func(context.Context, func() error) error { return errDown },
		"hangs": func(ctx context.Context, _ func() error) error {
			<-ctx.Done()
			return ctx.Err()
		},
		"hangs whatever its context": func(context.Context, func() error) error {
			time.Sleep(time.Minute)
			return errDown
		},
		"is slow, and too late": func(_ context.Context, call func() error) error {
			time.Sleep(8 * time.Second)
			return call()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &faulty{extend: extend}
				var reported error
				locker := lock.New(store, &lock.Options{Observer: lock.Observer{Lost: func(_ context.Context, _ []string, err error) { reported = err }}})
				begun := time.Now()
				lease := mustLock(t, locker, "k")
				<-lease.Context().Done()
				if at := time.Since(begun); at != 9*time.Second {
					t.Errorf("the context ended after %v of a lease of 10 s with a margin of 1 s", at)
				}
				if cause := context.Cause(lease.Context()); !errors.Is(cause, lock.ErrLost) || !errors.Is(lease.Err(), lock.ErrLost) {
					t.Errorf("cause %v, error %v; want ErrLost", cause, lease.Err())
				}
				if _, err := store.MemoryStore.Acquire(t.Context(), lock.Request{Keys: []string{"k"}, Owner: "other", TTL: time.Second}); !errors.Is(err, lock.ErrHeld) {
					t.Errorf("Acquire when the context ended = %v, want ErrHeld", err)
				}
				synctest.Wait()
				if !errors.Is(reported, lock.ErrLost) {
					t.Errorf("the observer was told %v", reported)
				}
				if err := lease.Release(t.Context()); !errors.Is(err, lock.ErrLost) {
					t.Errorf("Release of a lost lease = %v, want ErrLost", err)
				}
				time.Sleep(2 * time.Minute) // all ends
			})
		})
	}
}

// A lease is measured from before it was asked for.
func TestSlowGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := 4 * time.Second
		store := &faulty{extend: func(context.Context, func() error) error { return errDown }}
		store.acquire = func(_ context.Context, call func() error) error {
			time.Sleep(slow)
			return call()
		}
		asked := time.Now()
		lease := mustLock(t, lock.New(store, nil), "k")
		<-lease.Context().Done()
		if at := time.Since(asked); at != 9*time.Second {
			t.Errorf("the context ended %v after it was asked for", at)
		}
		slow = 9 * time.Second
		if _, err := lock.New(store, nil).TryLock(t.Context(), "other"); !errors.Is(err, lock.ErrHeld) {
			t.Errorf("TryLock that took its whole lease = %v, want ErrHeld", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := lock.New(store, nil).Lock(ctx, "other"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Lock that takes its whole lease each time = %v", err)
		}
		store.acquire = nil
		mustRelease(t, mustLock(t, lock.New(store, nil), "other"))
	})
}

func TestRenewalRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		store := &faulty{extend: func(_ context.Context, call func() error) error {
			if down.Load() {
				return errDown
			}
			return call()
		}}
		lease := mustLock(t, lock.New(store, nil), "k")
		for range 10 {
			down.Store(true)
			time.Sleep(5 * time.Second)
			down.Store(false)
			time.Sleep(7 * time.Second)
		}
		if err := lease.Err(); err != nil {
			t.Fatalf("lost although the store was down for half a lease only: %v", err)
		}
		mustRelease(t, lease)
	})
}

// Another has the key: the store says so, and the holder is told at once.
func TestTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faulty{}
		lease := mustLock(t, lock.New(store, nil), "k")
		if err := store.MemoryStore.Release(t.Context(), lock.Request{Keys: []string{"k"}, Owner: lease.Owner()}); err != nil { // as a server that forgot
			t.Fatal(err)
		}
		next := mustLock(t, lock.New(store, nil), "k")
		time.Sleep(4 * time.Second)
		if !errors.Is(context.Cause(lease.Context()), lock.ErrLost) || lease.Context().Err() == nil {
			t.Fatalf("the former holder was not told: %v", context.Cause(lease.Context()))
		}
		if err := lease.Release(t.Context()); !errors.Is(err, lock.ErrLost) {
			t.Errorf("Release = %v, want ErrLost", err)
		}
		if next.Err() != nil || next.Token() <= lease.Token() {
			t.Errorf("the next holder: %v, token %d after %d", next.Err(), next.Token(), lease.Token())
		}
		mustRelease(t, next)
	})
}

// Err looks at the clock: it need not wait for a timer.
func TestErrLooksAtTheClock(t *testing.T) {
	stop := make(chan struct{})
	store := &faulty{extend: func(context.Context, func() error) error { <-stop; return errDown }}
	lease := mustLock(t, lock.New(store, &lock.Options{TTL: 30 * time.Millisecond}), "k")
	end := time.Now().Add(30 * time.Millisecond)
	for time.Now().Before(end) { // busy, as one that was just continued
	}
	if err := lease.Err(); !errors.Is(err, lock.ErrLost) || lease.Context().Err() == nil {
		t.Errorf("Err after the lease = %v, and its context %v", err, lease.Context().Err())
	}
	close(stop)
}

func TestParentContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faulty{}
		ctx, cancel := context.WithCancelCause(t.Context())
		lease, err := lock.New(store, nil).Lock(ctx, "k")
		if err != nil {
			t.Fatal(err)
		}
		cancel(errDown)
		if !errors.Is(context.Cause(lease.Context()), errDown) {
			t.Fatalf("the cause is %v", context.Cause(lease.Context()))
		}
		time.Sleep(time.Minute)
		if lease.Err() != nil {
			t.Fatalf("while the work winds down, the lease was lost: %v", lease.Err())
		}
		if err := lease.Release(ctx); err != nil { // as deferred by one whose context has ended
			t.Fatalf("Release with the context that has ended = %v", err)
		}
		if _, err := lock.New(store, nil).TryLock(t.Context(), "k"); err != nil {
			t.Fatal(err)
		}
		if _, err := lock.New(store, nil).Lock(ctx, "other"); !errors.Is(err, errDown) || errors.Is(err, lock.ErrHeld) {
			t.Fatalf("Lock with a context that has ended = %v", err)
		}
	})
}

func TestRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := true
		store := &faulty{release: func(_ context.Context, call func() error) error {
			if fail {
				return errDown
			}
			return call()
		}}
		locker := lock.New(store, nil)
		lease := mustLock(t, locker, "k")
		if err := lease.Release(t.Context()); !errors.Is(err, errDown) {
			t.Fatalf("Release = %v", err)
		}
		if lease.Context().Err() == nil || !errors.Is(lease.Err(), lock.ErrLost) {
			t.Error("a lease that was released goes on")
		}
		fail = false
		mustRelease(t, lease)
		mustRelease(t, lease)
		next := mustLock(t, locker, "k")
		mustRelease(t, lease) // again, although another has the key now
		if err := next.Err(); err != nil {
			t.Fatal(err)
		}
		if _, err := lock.New(store, nil).TryLock(t.Context(), "k"); !errors.Is(err, lock.ErrHeld) {
			t.Fatalf("TryLock = %v, want ErrHeld", err)
		}
		mustRelease(t, next)
	})
}
