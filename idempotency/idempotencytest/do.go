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

type order struct {
	Number int
	Note   string
}

// Duplicates at once: the work is done once and all who wait see its result.
func doOnce(_ *testing.T, s suite) {
	opts := &idempotency.Options{Wait: long}
	for round := range 5 {
		var ran, fresh atomic.Int64
		want := order{round, "once"}
		n := s.race(12, func(int) bool {
			got, replayed, err := idempotency.Do(s.Context(), s.store, key(fmt.Sprint(round)), opts, func(context.Context) (order, error) {
				ran.Add(1)
				return want, nil
			})
			if !replayed {
				fresh.Add(1)
			}
			return err == nil && got == want
		})
		if n != 12 || ran.Load() != 1 || fresh.Load() != 1 {
			s.Fatalf("%d of 12 got the result, the work ran %d times and %d results were not replays; want 12, 1, 1", n, ran.Load(), fresh.Load())
		}
	}
}

func doFails(_ *testing.T, s suite) {
	broken := errors.New("broken")
	_, _, err := idempotency.Do(s.Context(), s.store, key("k"), nil, func(context.Context) (order, error) {
		return order{}, broken
	})
	if !errors.Is(err, broken) {
		s.Fatalf("Do = %v, want the error of the work", err)
	}
	got, replayed, err := idempotency.Do(s.Context(), s.store, key("k"), nil, func(context.Context) (order, error) {
		return order{Number: 2}, nil
	})
	if err != nil || replayed || got.Number != 2 {
		s.Fatalf("Do after a clean failure = %v, %v, %v; want it to run", got, replayed, err)
	}
}

// The caller goes away while the work runs; what was done is recorded all the same.
func doCancelledMidway(t *testing.T, s suite) {
	ctx, cancel := context.WithCancel(t.Context())
	_, _, err := idempotency.Do(ctx, s.store, key("done"), nil, func(context.Context) (order, error) {
		cancel()
		return order{Number: 3}, nil
	})
	if err != nil {
		s.Fatalf("Do with a context that ended midway = %v", err)
	}
	got, replayed, err := idempotency.Do(t.Context(), s.store, key("done"), nil, func(context.Context) (order, error) {
		return order{}, errors.New("ran again")
	})
	if err != nil || !replayed || got.Number != 3 {
		s.Fatalf("Do = %v, %v, %v; want the recorded result", got, replayed, err)
	}

	// Work that failed because of it may have been done: the key keeps its lease.
	ctx, cancel = context.WithCancel(t.Context())
	_, _, err = idempotency.Do(ctx, s.store, key("failed"), nil, func(ctx context.Context) (order, error) {
		cancel()
		<-ctx.Done()
		return order{}, ctx.Err()
	})
	if !errors.Is(err, context.Canceled) {
		s.Fatalf("Do = %v, want the error of the work", err)
	}
	s.refused(key("failed"), request("b", long), idempotency.ErrInProgress)
}

// Work that takes longer than its lease keeps the key by its heartbeat.
func doOutlivesItsLease(_ *testing.T, s suite) {
	lease := 2 * time.Second // long enough for a machine that stalls
	_, _, err := idempotency.Do(s.Context(), s.store, key("k"), &idempotency.Options{Lease: lease}, func(ctx context.Context) (order, error) {
		for start := time.Now(); time.Since(start) < lease+lease/4; time.Sleep(lease / 40) {
			if ctx.Err() != nil {
				return order{}, fmt.Errorf("the claim was lost: %w", context.Cause(ctx))
			}
			if _, err := s.store.Claim(ctx, key("k"), request("b", long)); !errors.Is(err, idempotency.ErrInProgress) {
				return order{}, fmt.Errorf("a duplicate got %w", err)
			}
		}
		return order{}, nil
	})
	if err != nil {
		s.Fatal(err)
	}
}

func doPanics(_ *testing.T, s suite) {
	sent := time.Now()
	func() {
		defer func() {
			if v := recover(); v != "boom" {
				s.Errorf("recovered %v, want the panic of the work", v)
			}
		}()
		_, _, _ = idempotency.Do(s.Context(), s.store, key("k"), &idempotency.Options{Lease: short}, func(context.Context) (order, error) {
			panic("boom")
		})
	}()
	s.takeOver(key("k"), request("b", long), sent.Add(short))
}
