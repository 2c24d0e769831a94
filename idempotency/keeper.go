package idempotency

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// keep extends the claim of x until drop is called, which waits for it to stop.
// The context it returns ends when the claim is lost, at the latest at deadline
// as extended: that is measured from before each request, so the store, whose
// lease began later, does not give the key away before.
func keep(ctx context.Context, x *call, deadline time.Time) (held context.Context, drop func()) {
	held, cancel := context.WithCancelCause(ctx)
	// The end of the lease does not wait for a store that does not heed contexts.
	lapse := time.AfterFunc(time.Until(deadline), func() {
		if !x.exec.Completed() {
			cancel(fmt.Errorf("%w: not extended in time", ErrLeaseLost))
		}
	})
	// The caller's cancellation ends the work, but while the work winds down the
	// key is still its own.
	beat, stop := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := x.beat(beat, deadline, lapse); err != nil {
			cancel(err)
		}
	}()
	return held, func() {
		stop()
		lapse.Stop()
		<-done
		cancel(nil)
	}
}

// beat returns nil when ctx ends, and an error that wraps ErrLeaseLost when the
// claim is lost.
func (x *call) beat(ctx context.Context, deadline time.Time, lapse *time.Timer) error {
	lease := x.opts.Lease
	wait := lease / 3
	over := func() bool { return ctx.Err() != nil || x.exec.Completed() }
	for {
		_ = backoff.Sleep(ctx, wait)
		if over() {
			return nil
		}
		sent := time.Now()
		attempt, cancel := context.WithDeadline(ctx, deadline)
		err := x.store.Extend(attempt, x.key, x.exec.Token, lease)
		cancel()
		if over() {
			return nil // whatever became of the extension
		}
		switch {
		case err == nil:
			deadline, wait = sent.Add(lease), lease/3
			lapse.Reset(time.Until(deadline))
		case errors.Is(err, ErrLeaseLost):
			return err
		case !time.Now().Before(deadline):
			return fmt.Errorf("%w: not extended in time: %w", ErrLeaseLost, err)
		default:
			wait = min(lease/20, time.Until(deadline))
		}
	}
}
