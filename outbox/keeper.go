package outbox

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

var errLeaseLost = errors.New("outbox: lease lost")

// A keeper keeps a relay's lease alive beside its loop.
type keeper struct {
	store   Store
	relay   string
	ttl     time.Duration
	log     *slog.Logger
	changed chan struct{} // a new grant is there
	kick    chan struct{} // beat now

	mu      sync.Mutex
	grant   Grant
	until   time.Time // the lease is surely held before it
	version int       // counts the grants
	release []int
}

// current returns the newest grant and its number.
func (k *keeper) current() (Grant, int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.grant, k.version
}

// held tells whether the lease surely still holds.
func (k *keeper) held() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return time.Now().Before(k.until)
}

// giveUp has the next beat release lanes.
func (k *keeper) giveUp(lanes []int) {
	k.mu.Lock()
	k.release = append(k.release, lanes...)
	k.mu.Unlock()
	signal(k.kick)
}

// beat renews the lease. It is not called twice at a time.
func (k *keeper) beat(ctx context.Context) error {
	k.mu.Lock()
	req := LeaseRequest{Relay: k.relay, TTL: k.ttl, Release: slices.Clone(k.release)}
	k.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, k.ttl)
	defer cancel()
	start := time.Now()
	grant, err := k.store.Lease(ctx, req)
	if err != nil {
		return err
	}
	k.mu.Lock()
	k.grant, k.until = grant, start.Add(k.ttl)
	k.version++
	k.release = k.release[len(req.Release):]
	k.mu.Unlock()
	signal(k.changed)
	return nil
}

func (k *keeper) run(ctx context.Context) {
	failures := 0
	for {
		wait := k.ttl / 3
		if g, _ := k.current(); len(g.Lanes) < g.Share {
			wait = min(wait, 250*time.Millisecond) // lanes of a dead relay become free soon
		}
		if failures > 0 {
			wait = backoff.Policy{Max: k.ttl / 3}.Next(failures)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-k.kick:
			t.Stop()
		case <-t.C:
		}
		if err := k.beat(ctx); err != nil && ctx.Err() == nil {
			failures++
			k.log.WarnContext(ctx, "outbox: lease not renewed", "error", err)
		} else {
			failures = 0
		}
	}
}

// guard returns a context that ends when the lease is lost.
func (k *keeper) guard(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	var check func()
	var timer *time.Timer
	var mu sync.Mutex
	check = func() {
		k.mu.Lock()
		left := time.Until(k.until)
		k.mu.Unlock()
		if left <= 0 {
			cancel(errLeaseLost)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() == nil {
			timer = time.AfterFunc(left, check)
		}
	}
	check()
	return ctx, func() {
		cancel(context.Canceled)
		mu.Lock()
		defer mu.Unlock()
		if timer != nil {
			timer.Stop()
		}
	}
}

// leave ends the membership so that others take the lanes at once.
func (k *keeper) leave(ctx context.Context, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	if _, err := k.store.Lease(ctx, LeaseRequest{Relay: k.relay}); err != nil {
		k.log.WarnContext(ctx, "outbox: lanes not given up, they are free when the lease ends", "error", err)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
