package backoff

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestCeiling(t *testing.T) {
	p := Policy{Base: 10 * time.Millisecond, Max: 100 * time.Millisecond}
	for attempt, want := range []int64{10, 20, 40, 80, 100, 100} {
		if got := p.Ceiling(attempt); got.Milliseconds() != want {
			t.Errorf("Ceiling(%d) = %v, want %d ms", attempt, got, want)
		}
	}
	if got := (Policy{}).Ceiling(1 << 20); got != 5*time.Second {
		t.Errorf("zero Policy: Ceiling of a late attempt = %v, want 5s", got)
	}
}

func TestNextStaysInRange(t *testing.T) {
	p := Policy{Base: time.Millisecond, Max: 8 * time.Millisecond}
	for attempt := range 10 {
		for range 1000 {
			if d := p.Next(attempt); d <= 0 || d > p.Ceiling(attempt) {
				t.Fatalf("Next(%d) = %v, want in (0, %v]", attempt, d, p.Ceiling(attempt))
			}
		}
	}
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if err := Sleep(t.Context(), time.Hour); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d != time.Hour {
			t.Errorf("slept %v, want 1h", d)
		}
		cause := errors.New("stop")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(cause)
		if err := Sleep(ctx, time.Hour); !errors.Is(err, cause) {
			t.Errorf("Sleep on a cancelled context = %v, want its cause", err)
		}
	})
}
