package lock_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ashlar-go/ashlar/lock"
)

// A blind store does not tell when keys become free.
type blind struct{ lock.Store }

func TestFIFO(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faulty{}
		locker := lock.New(store, nil)
		first := mustLock(t, locker, "k")
		var mu sync.Mutex
		var order []int
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				lease := mustLock(t, locker, "k")
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				mustRelease(t, lease)
			})
			synctest.Wait()
		}
		before := store.acquires.Load()
		mustRelease(t, first)
		wg.Wait()
		if !slices.IsSorted(order) || len(order) != 100 {
			t.Errorf("granted in the order %v", order)
		}
		if n := store.acquires.Load() - before; n != 100 {
			t.Errorf("the store was asked %d times for 100 leases", n)
		}
	})
}

// One who gives up leaves the order of the others.
func TestGivingUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faulty{}
		locker := lock.New(store, nil)
		elsewhere := mustLock(t, lock.New(store, nil), "b")
		holder := mustLock(t, locker, "a")
		var refused error
		observed := lock.New(store, &lock.Options{Wait: time.Second, Observer: lock.Observer{Refused: func(_ context.Context, keys []string, err error) {
			refused = fmt.Errorf("%v %w", keys, err)
		}}})
		for name, test := range map[string]struct {
			locker *lock.Locker
			wait   time.Duration
			keys   []string
			held   string
		}{
			"of this process":              {locker, time.Second, []string{"a"}, "a"},
			"of another process":           {locker, time.Second, []string{"b"}, "b"},
			"both":                         {locker, time.Second, []string{"b", "a"}, "a"},
			"one of several":               {locker, time.Second, []string{"c", "b"}, "b"},
			"by the locker's own patience": {observed, time.Hour, []string{"b"}, "b"},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), test.wait)
			began := time.Now()
			_, err := test.locker.Lock(ctx, test.keys...)
			var held *lock.HeldError
			if !errors.As(err, &held) || held.Key != test.held || held.RetryAfter <= 0 || held.RetryAfter > 10*time.Second {
				t.Errorf("%s: Lock = %v, want it held: %q", name, err, test.held)
			}
			if !errors.Is(err, lock.ErrHeld) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: Lock = %v, want it to wrap ErrHeld and the context's error", name, err)
			}
			if took := time.Since(began); took != time.Second {
				t.Errorf("%s: gave up after %v", name, took)
			}
			cancel()
		}
		if !errors.Is(refused, lock.ErrHeld) {
			t.Errorf("the observer was told %v", refused)
		}
		mustRelease(t, elsewhere)
		mustRelease(t, holder)
		all := mustLock(t, locker, "c", "b", "a", "b")
		if !slices.Equal(all.Keys(), []string{"a", "b", "c"}) {
			t.Errorf("keys %v", all.Keys())
		}
		mustRelease(t, all)
	})
}

// The turn may come at the moment at which its owner gives up.
func TestGivingUpAtTheLastMoment(t *testing.T) {
	locker := lock.New(new(lock.MemoryStore), nil)
	for range 300 {
		holder := mustLock(t, locker, "k")
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if lease, err := locker.Lock(ctx, "k"); err == nil {
					mustRelease(t, lease)
				} else if !errors.Is(err, lock.ErrHeld) && !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		}
		wg.Go(cancel)
		mustRelease(t, holder)
		wg.Wait()
		mustRelease(t, mustLock(t, locker, "k"))
	}
}

func TestTryLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faulty{}
		locker := lock.New(store, nil)
		lease, err := locker.TryLock(t.Context(), "k")
		if err != nil {
			t.Fatal(err)
		}
		asked := store.acquires.Load()
		for name, l := range map[string]*lock.Locker{"same": locker, "other": lock.New(store, nil)} {
			_, err := l.TryLock(t.Context(), "k")
			var held *lock.HeldError
			if !errors.As(err, &held) || held.Key != "k" || held.RetryAfter != 10*time.Second || errors.Is(err, context.Canceled) {
				t.Errorf("TryLock of the %s locker = %v", name, err)
			}
		}
		if n := store.acquires.Load() - asked; n != 1 {
			t.Errorf("the store was asked %d times; what the locker itself holds, it knows", n)
		}
		mustRelease(t, lease)
		if lease, err = locker.TryLock(t.Context(), "k"); err != nil {
			t.Fatal(err)
		}
		mustRelease(t, lease)
	})
}

// Those who are told wait without asking; those who are not ask by themselves.
func TestHandOver(t *testing.T) {
	for name, test := range map[string]struct {
		wrap func(s *faulty) lock.Store
		most int64 // acquisitions in a minute
		late time.Duration
	}{
		"told":     {func(s *faulty) lock.Store { return s }, 130, 0},
		"not told": {func(s *faulty) lock.Store { return blind{s} }, 150, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &faulty{}
				holder := mustLock(t, lock.New(store, nil), "k")
				got := make(chan time.Time)
				go func() {
					lease := mustLock(t, lock.New(test.wrap(store), nil), "k")
					got <- time.Now()
					mustRelease(t, lease)
				}()
				time.Sleep(time.Minute)
				if n := store.acquires.Load(); n > test.most {
					t.Errorf("the store was asked %d times in a minute", n)
				}
				released := time.Now()
				mustRelease(t, holder)
				if late := (<-got).Sub(released); late > test.late {
					t.Errorf("handed over after %v, want at most %v", late, test.late)
				}
			})
		})
	}
}

// A holder that died without a word is waited for no longer than its lease.
func TestDeadHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(lock.MemoryStore)
		if _, err := store.Acquire(t.Context(), lock.Request{Keys: []string{"k"}, Owner: "dead", TTL: 100 * time.Millisecond}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		mustRelease(t, mustLock(t, lock.New(store, nil), "k"))
		if took := time.Since(began); took < 100*time.Millisecond || took > 102*time.Millisecond {
			t.Errorf("taken over after %v of a lease of 100 ms", took)
		}
	})
}

// What may have been granted without an answer is given back.
func TestLostGrant(t *testing.T) {
	store := &faulty{acquire: func(_ context.Context, call func() error) error { return errors.Join(call(), errDown) }}
	locker := lock.New(store, nil)
	if _, err := locker.Lock(t.Context(), "k"); !errors.Is(err, errDown) || errors.Is(err, lock.ErrHeld) {
		t.Fatalf("Lock = %v", err)
	}
	store.acquire = nil
	lease, err := locker.TryLock(t.Context(), "k")
	if err != nil {
		t.Fatalf("the key stays held: %v", err)
	}
	mustRelease(t, lease)
}

// A waiter whose context ends in the middle of a request is told of the key all
// the same.
func TestContextEndsInARequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faulty{}
		holder := mustLock(t, lock.New(store, nil), "k")
		n := 0
		store.acquire = func(ctx context.Context, call func() error) error {
			if n++; n < 3 {
				return call()
			}
			<-ctx.Done()
			return ctx.Err()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := lock.New(store, nil).Lock(ctx, "k"); !errors.Is(err, lock.ErrHeld) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Lock = %v, want ErrHeld and the context's error", err)
		}
		mustRelease(t, holder)
	})
}

func TestDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &faulty{}
		locker := lock.New(store, nil)
		broken := errors.New("broken")
		for _, want := range []error{nil, broken} {
			err := locker.Do(t.Context(), "k", func(ctx context.Context, lease *lock.Lease) error {
				if lease.Token() <= 0 || ctx != lease.Context() || lease.Err() != nil {
					t.Errorf("token %d, %v", lease.Token(), lease.Err())
				}
				return want
			})
			if !errors.Is(err, want) || want == nil && err != nil {
				t.Errorf("Do = %v, want %v", err, want)
			}
		}
		func() {
			defer func() { _ = recover() }()
			_ = locker.Do(t.Context(), "k", func(context.Context, *lock.Lease) error { panic("boom") })
		}()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = locker.Do(t.Context(), "k", func(context.Context, *lock.Lease) error { runtime.Goexit(); return nil })
		}()
		<-done
		// Neither wedges the key. A lease that was lost is told of.
		store.extend = func(context.Context, func() error) error { return errDown }
		work := func(ctx context.Context, _ *lock.Lease) error { <-ctx.Done(); return nil }
		if err := locker.Do(t.Context(), "k", work); !errors.Is(err, lock.ErrLost) {
			t.Errorf("Do of work whose lease was lost = %v, want ErrLost", err)
		}
		if err := locker.Do(t.Context(), "", nil); !errors.Is(err, lock.ErrInvalid) {
			t.Errorf("Do without a key = %v", err)
		}
		if _, err := locker.Lock(t.Context()); !errors.Is(err, lock.ErrInvalid) {
			t.Errorf("Lock of nothing = %v", err)
		}
	})
}

func TestObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log []string
		note := func(what string) func(context.Context, []string, time.Duration) {
			return func(_ context.Context, keys []string, d time.Duration) { log = append(log, fmt.Sprint(what, keys, d)) }
		}
		locker := lock.New(new(lock.MemoryStore), &lock.Options{Observer: lock.Observer{
			Acquired: note("acquired"), Released: note("released"),
			Refused: func(_ context.Context, keys []string, err error) { log = append(log, fmt.Sprint("refused", keys, err)) },
		}})
		lease := mustLock(t, locker, "b", "a")
		if _, err := locker.TryLock(t.Context(), "b"); err == nil {
			t.Error("granted twice")
		}
		time.Sleep(time.Second)
		mustRelease(t, lease)
		mustRelease(t, lease)
		want := []string{"acquired[a b] 0s", `refused[b] lock: held by another: key "b"`, "released[a b] 1s"}
		if !slices.Equal(log, want) {
			t.Errorf("observed %q, want %q", log, want)
		}
	})
}
