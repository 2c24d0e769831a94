// Package backoff spaces retries: exponential growth with full jitter, as in
// "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015).
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// Policy is a schedule of waits. The zero value waits at random up to 10 ms
// before the first retry and up to 5 s before late ones.
type Policy struct {
	Base time.Duration // upper bound of the first wait; zero means 10 ms
	Max  time.Duration // upper bound of every wait; zero means 5 s
}

// Ceiling returns the upper bound of the wait before retry number attempt,
// where 0 is the first.
func (p Policy) Ceiling(attempt int) time.Duration {
	base, limit := p.Base, p.Max
	if base <= 0 {
		base = 10 * time.Millisecond
	}
	if limit <= 0 {
		limit = 5 * time.Second
	}
	for range attempt {
		if base >= limit {
			break
		}
		base *= 2
	}
	return min(base, limit)
}

// Next returns a wait for retry number attempt, uniform in (0, Ceiling(attempt)].
func (p Policy) Next(attempt int) time.Duration {
	return 1 + rand.N(p.Ceiling(attempt))
}

// Sleep waits for d, or until ctx ends and then returns its cause.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
