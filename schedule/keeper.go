package schedule

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// A keeper extends the leases of all runs of an instance, in one statement.
type keeper struct {
	store Store
	lease time.Duration
	log   *slog.Logger

	mu   sync.Mutex
	held map[Ref]*hold
}

// A hold is the lease of one run.
type hold struct {
	cancel context.CancelCauseFunc
	timer  *time.Timer // ends the run's context before the lease ends
}

func (k *keeper) add(ref Ref, deadline time.Time, cancel context.CancelCauseFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	h := &hold{cancel: cancel}
	h.timer = time.AfterFunc(time.Until(deadline), func() { cancel(fmt.Errorf("%w: not extended in time", ErrLeaseLost)) })
	k.held[ref] = h
}

func (k *keeper) remove(ref Ref) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if h := k.held[ref]; h != nil {
		h.timer.Stop()
		delete(k.held, ref)
	}
}

// run extends until ctx ends.
func (k *keeper) run(ctx context.Context) {
	wait := k.lease / 3
	for backoff.Sleep(ctx, wait) == nil {
		wait = k.lease / 3
		if err := k.beat(ctx); err != nil && ctx.Err() == nil {
			wait = k.lease / 20
			k.log.WarnContext(ctx, "schedule: leases not extended", "error", err)
		}
	}
}

func (k *keeper) beat(ctx context.Context) error {
	k.mu.Lock()
	refs := make([]Ref, 0, len(k.held))
	for ref := range k.held {
		refs = append(refs, ref)
	}
	k.mu.Unlock()
	if len(refs) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, k.lease/3)
	defer cancel()
	// Measured from before the request was sent: the store's lease ends later.
	sent := time.Now()
	kept, lost, err := k.store.Extend(ctx, refs, k.lease)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, ref := range kept {
		// A timer that has fired has ended the context for good.
		if h := k.held[ref]; h != nil && h.timer.Stop() {
			h.timer.Reset(time.Until(sent.Add(k.lease)))
		}
	}
	for _, ref := range lost {
		if h := k.held[ref]; h != nil {
			h.cancel(ErrLeaseLost)
		}
	}
	return nil
}
