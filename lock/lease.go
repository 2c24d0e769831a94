package lock

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A Lease is the exclusive hold of one or more keys for a time, which is extended
// until it is released or lost. It is safe for concurrent use.
type Lease struct {
	locker *Locker
	req    Request
	one    [1]string // what req.Keys is a slice of, mostly
	token  int64
	ctx    context.Context
	cancel context.CancelCauseFunc
	asked  time.Time
	began  time.Time

	mu       sync.Mutex
	deadline time.Time   // when the context ends, unless the lease is extended
	retry    *time.Timer // after an extension that failed
	lost     error
	ended    bool // by Release
	freed    bool // and the store knows
	left     bool // the turn has been given to the next

	// Of the locker's renewals.
	prev, next *Lease
	due        time.Time
	queued     bool
}

// Context is derived from the context that the lease was asked for with. It ends
// with the cause [ErrLost] before the store can give a key to another, and when
// the lease is released.
//
// No signal reaches a process that is stopped, nor work that does not look: what
// must not be done by a former holder is checked where it is done, with the
// token, or by lockpg.Guard.
func (l *Lease) Context() context.Context { return l.ctx }

// Token rises each time a key changes hands: whatever is given the tokens of
// leases can refuse those that are lower than one it has seen.
func (l *Lease) Token() int64 { return l.token }

// Keys returns the keys in order. The caller does not modify them.
func (l *Lease) Keys() []string { return l.req.Keys }

// Owner is the unique name of this lease's holder.
func (l *Lease) Owner() string { return l.req.Owner }

// Err returns nil while the lease is held, and then an error that wraps
// [ErrLost]. It looks at the clock, so unlike the context it is right also in the
// first moment of a process that was stopped. It makes no round trip.
func (l *Lease) Err() error {
	l.mu.Lock()
	deadline, lost, ended := l.deadline, l.lost, l.ended
	l.mu.Unlock()
	switch {
	case lost != nil:
		return lost
	case ended:
		return fmt.Errorf("%w: it was released", ErrLost)
	case !time.Now().Before(deadline):
		return l.lose(errLate)
	}
	return nil
}

var errLate = errors.New("not extended in time")

func (l *Lease) valid() time.Duration { return l.req.TTL - l.locker.opts.Margin }

// begin starts the life of a lease that was granted to a request sent at sent.
func (l *Lease) begin(ctx context.Context, token int64, sent time.Time) {
	l.token, l.began = token, sent
	l.deadline = sent.Add(l.valid())
	l.ctx, l.cancel = context.WithCancelCause(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.schedule(l.req.TTL / 3)
}

// schedule has the lease extended after pause, or sooner if it ends before.
func (l *Lease) schedule(pause time.Duration) {
	left := time.Until(l.deadline)
	if pause == l.req.TTL/3 && pause <= left {
		l.locker.renewals.add(l, pause)
		return
	}
	l.retry = time.AfterFunc(max(0, min(pause, left)), l.extend)
}

// unschedule is called with l.mu held.
func (l *Lease) unschedule() {
	l.locker.renewals.remove(l)
	if l.retry != nil {
		l.retry.Stop()
	}
}

// extend runs in a goroutine of its own.
func (l *Lease) extend() {
	if l.Err() != nil {
		return
	}
	l.mu.Lock()
	deadline := l.deadline
	l.mu.Unlock()
	// The context must end in time even if the store does not answer and does not
	// heed its own context.
	late := time.AfterFunc(time.Until(deadline), func() { _ = l.lose(errLate) })
	ctx, cancel := context.WithDeadline(context.WithoutCancel(l.ctx), deadline)
	sent := time.Now()
	err := l.locker.store.Extend(ctx, l.req)
	cancel()
	late.Stop()
	if errors.Is(err, ErrLost) {
		_ = l.lose(err)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || l.lost != nil {
		return
	}
	next := l.req.TTL / 3
	if err != nil {
		next = l.req.TTL / 20
	} else {
		l.deadline = sent.Add(l.valid())
	}
	l.schedule(next)
}

// lose ends a lease that was neither released nor lost before.
func (l *Lease) lose(reason error) error {
	l.mu.Lock()
	if l.ended || l.lost != nil {
		defer l.mu.Unlock()
		return l.lost
	}
	l.lost = reason
	if !errors.Is(reason, ErrLost) {
		l.lost = fmt.Errorf("%w: %w", ErrLost, reason)
	}
	err := l.lost
	l.unschedule()
	l.mu.Unlock()
	l.cancel(err)
	l.leave()
	if f := l.locker.opts.Observer.Lost; f != nil {
		f(context.WithoutCancel(l.ctx), l.req.Keys, err)
	}
	return err
}

// leave lets the next in line of this process ask.
func (l *Lease) leave() {
	l.mu.Lock()
	left := l.left
	l.left = true
	l.mu.Unlock()
	if !left {
		l.locker.lines.leave(l.req.Keys)
	}
}

// Release gives the keys back, and the lease's context ends before. It may be
// called again, and does nothing more once it has succeeded. The error wraps
// [ErrLost] if the lease was lost before. After any other error the keys become
// free when the lease ends.
//
// If ctx has ended already, Release goes on without it, for at most a second.
func (l *Lease) Release(ctx context.Context) error {
	l.mu.Lock()
	first := !l.ended
	l.ended = true
	l.unschedule()
	lost, freed := l.lost, l.freed
	l.mu.Unlock()
	if freed {
		return lost
	}
	l.cancel(context.Canceled)
	if ctx.Err() != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
	}
	err := l.locker.store.Release(ctx, l.req)
	l.leave()
	if err == nil || errors.Is(err, ErrLost) {
		l.mu.Lock()
		l.freed = true
		if err != nil && l.lost == nil {
			l.lost = err
		}
		lost = l.lost
		l.mu.Unlock()
	}
	if f := l.locker.opts.Observer.Released; f != nil && first && lost == nil {
		f(ctx, l.req.Keys, time.Since(l.began))
	}
	if lost != nil {
		return lost
	}
	if err != nil {
		return fmt.Errorf("lock: release: %w", err)
	}
	return nil
}
