package locktest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-go/ashlar/lock"
)

// Leases on overlapping sets of keys neither overlap in time nor block each other
// for good.
func overlappingKeys(s suite) {
	var holders [5]atomic.Int64
	opts := &lock.Options{TTL: long, Poll: 20 * time.Millisecond}
	lockers := []*lock.Locker{lock.New(s.store, opts), lock.New(s.store, opts)}
	s.race(8, func(i int) bool {
		for range 10 {
			from, n := rand.IntN(5), 1+rand.IntN(3)
			var keys []string
			for k := range n {
				keys = append(keys, fmt.Sprint("{t}", (from+k)%5))
			}
			lease, err := lockers[i%2].Lock(s.Context(), keys...)
			if err != nil {
				s.Errorf("Lock(%v) = %v", keys, err)
				return false
			}
			for k := range n {
				if n := holders[(from+k)%5].Add(1); n != 1 {
					s.Errorf("%d holders of a key", n)
				}
			}
			for k := range n {
				holders[(from+k)%5].Add(-1)
			}
			if err := lease.Release(s.Context()); err != nil {
				s.Errorf("Release = %v", err)
			}
		}
		return true
	})
}

func watchTells(s suite) {
	w, ok := s.store.(lock.Watcher)
	if !ok {
		s.Skip("the store is no Watcher")
	}
	woke := make(chan struct{}, 100)
	stop := w.Watch(s.Context(), []string{"{t}k", "{t}l"}, func() {
		select {
		case woke <- struct{}{}:
		default:
		}
	})
	defer stop()
	wait := func(what string) {
		s.Helper()
		select {
		case <-woke:
		case <-time.After(30 * time.Second):
			s.Fatal("not told ", what)
		}
	}
	wait("that the watch has begun")
	for i := range 5 {
		for _, key := range []string{"k", "l"} {
			owner := request(fmt.Sprint("owner ", i), long, key)
			s.acquire(owner)
			waiting := request("waiting", long, key)
			waiting.Waiting = true
			s.refused(waiting, key, long)
			for len(woke) > 0 {
				<-woke // of what was before
			}
			s.extend(owner)
			s.release(owner)
			wait("of the release")
		}
	}
}

func lockersExclude(s suite) {
	opts := &lock.Options{TTL: long, Poll: 50 * time.Millisecond}
	lockers := []*lock.Locker{lock.New(s.store, opts), lock.New(s.store, opts), lock.New(s.store, opts)}
	var mu sync.Mutex
	var lastToken int64
	counter, inside := 0, 0
	const each = 15
	s.race(9, func(i int) bool {
		for range each {
			err := lockers[i%3].Do(s.Context(), "{t}k", func(ctx context.Context, lease *lock.Lease) error {
				mu.Lock()
				defer mu.Unlock()
				if inside++; inside != 1 {
					s.Errorf("%d holders", inside)
				}
				if lease.Token() <= lastToken {
					s.Errorf("token %d after %d", lease.Token(), lastToken)
				}
				lastToken = lease.Token()
				counter++
				inside--
				return ctx.Err()
			})
			if err != nil {
				s.Errorf("Do = %v", err)
			}
		}
		return true
	})
	if counter != 9*each {
		s.Errorf("%d of %d were done", counter, 9*each)
	}
}

// A holder's release lets one in another process have the key, and a dead
// holder's lease ends.
func lockersHandOver(s suite) {
	a, b := lock.New(s.store, &lock.Options{TTL: long}), lock.New(s.store, &lock.Options{TTL: long})
	for range 3 {
		lease, err := a.Lock(s.Context(), "{t}k")
		if err != nil {
			s.Fatal(err)
		}
		if _, err := b.TryLock(s.Context(), "{t}k"); !errors.Is(err, lock.ErrHeld) {
			s.Fatalf("TryLock of a held key = %v, want ErrHeld", err)
		}
		got := make(chan error)
		go func() {
			next, err := b.Lock(s.Context(), "{t}k")
			if err == nil && next.Token() <= lease.Token() {
				err = fmt.Errorf("token %d after %d", next.Token(), lease.Token())
			}
			if err == nil {
				err = next.Release(s.Context())
			}
			got <- err
		}()
		if err := lease.Release(s.Context()); err != nil {
			s.Fatal(err)
		}
		if err := <-got; err != nil {
			s.Fatal(err)
		}
	}
	s.acquire(request("dead", short, "k"))
	lease, err := b.Lock(s.Context(), "{t}k")
	if err != nil {
		s.Fatal(err)
	}
	if err := lease.Release(s.Context()); err != nil {
		s.Fatal(err)
	}
}

// A lease outlives its TTL while its holder lives.
func lockersRenew(s suite) {
	s.poll("a machine that does not stall", func() bool {
		locker := lock.New(s.store, &lock.Options{TTL: 4 * short})
		lease, err := locker.Lock(s.Context(), "{t}k")
		if err != nil {
			s.Fatal(err)
		}
		defer func() { _ = lease.Release(s.Context()) }() // it may be lost
		for start := time.Now(); time.Since(start) < 10*short; time.Sleep(short / 4) {
			_, err := s.store.Acquire(s.Context(), request("other", time.Millisecond, "k"))
			if lease.Err() == nil && !errors.Is(err, lock.ErrHeld) {
				s.Fatalf("Acquire of a key whose lease is extended = %v, want ErrHeld", err)
			}
			if lease.Err() != nil {
				return false // perhaps it was not extended in time
			}
		}
		return lease.Context().Err() == nil
	})
}
