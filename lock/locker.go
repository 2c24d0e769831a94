package lock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/internal/ids"
)

// Options tunes a [Locker]. The zero value of each field means its default.
type Options struct {
	// TTL is how long keys stay held after their holder has died. A living one
	// extends its lease every third of it. Default 10 s.
	TTL time.Duration
	// Margin is by how much a lease's context ends before the store may give a key
	// to another: time for the work to notice, and for clocks that run at
	// different speeds. Default a tenth of TTL; at most half of it.
	Margin time.Duration
	// Wait is how long Lock waits for keys that are held. Default: until its
	// context ends.
	Wait time.Duration
	// Poll is how often Lock asks again where nobody tells it that a key became
	// free, at random between half of it and all. Default 1 s.
	Poll time.Duration
	// Logger reports what no caller is told. Default slog.Default().
	Logger *slog.Logger
	// Observer is told what happens.
	Observer Observer
}

// An Observer is a set of callbacks, each of which may be nil. They must not
// block.
type Observer struct {
	// Acquired is told of a lease, and for how long its caller waited.
	Acquired func(ctx context.Context, keys []string, waited time.Duration)
	// Refused is told of keys that were held by another until the caller gave up.
	Refused func(ctx context.Context, keys []string, err error)
	// Released is told of a lease that was given back, and for how long it was held.
	Released func(ctx context.Context, keys []string, held time.Duration)
	// Lost is told of a lease that ended under its holder, with the reason.
	Lost func(ctx context.Context, keys []string, err error)
}

func (o *Options) withDefaults() Options {
	var d Options
	if o != nil {
		d = *o
	}
	setDefault(&d.TTL, 10*time.Second)
	setDefault(&d.Margin, d.TTL/10)
	setDefault(&d.Poll, time.Second)
	d.Margin = min(d.Margin, d.TTL/2)
	if d.Logger == nil {
		d.Logger = slog.Default()
	}
	return d
}

func setDefault[T int | time.Duration](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}

// A Locker takes leases on keys. Those who share a Locker get a key in the order
// in which they asked for it, and only the first of them asks the store; so use
// one Locker in a process, or one for each kind of thing. It is safe for
// concurrent use.
type Locker struct {
	store    Store
	watcher  Watcher // nil if the store is none
	opts     Options
	lines    lines
	renewals renewals
	born     time.Time
	told     atomic.Int64 // when a waiter was told last, in ns since born
}

// New returns a locker on store. It starts nothing. opts may be nil.
func New(store Store, opts *Options) *Locker {
	if store == nil {
		panic("lock: New needs a store")
	}
	l := &Locker{store: store, opts: opts.withDefaults(), born: time.Now()}
	l.watcher, _ = store.(Watcher)
	return l
}

// Lock takes a lease on all of the keys together, and waits for those that are
// held. Two that lock the same keys in any order do not block each other for good.
//
// The lease is extended in the background until it is released, so release it
// also when the work fails. Its context is derived from ctx, which also bounds
// the waiting; [Options].Wait bounds the waiting alone. When either ends, the
// error is a [HeldError] and wraps the context's as well.
//
// If the process dies, the keys are free after [Options].TTL.
func (l *Locker) Lock(ctx context.Context, keys ...string) (*Lease, error) {
	return l.lock(ctx, keys, true)
}

// TryLock is Lock without waiting: it fails with a [HeldError] if a key is held,
// or if somebody else waits for it in this Locker.
func (l *Locker) TryLock(ctx context.Context, keys ...string) (*Lease, error) {
	return l.lock(ctx, keys, false)
}

// Do runs fn with a lease on key, which it releases when fn returns or panics.
// It returns the error of fn. Where fn has none and the lease was lost before fn
// returned, the error wraps [ErrLost]: the work was done, but perhaps not alone.
//
// ctx is that of the lease.
func (l *Locker) Do(ctx context.Context, key string, fn func(ctx context.Context, lease *Lease) error) (err error) {
	lease, err := l.Lock(ctx, key)
	if err != nil {
		return err
	}
	returned := false
	defer func() {
		released := lease.Release(ctx)
		if returned && err == nil && errors.Is(released, ErrLost) {
			err = released
		} else if released != nil && !errors.Is(released, ErrLost) {
			l.opts.Logger.WarnContext(ctx, "lock: a key stays held until its lease ends", "key", key, "error", released)
		}
	}()
	err = fn(lease.ctx, lease)
	returned = true
	return err
}

func (l *Locker) lock(ctx context.Context, keys []string, wait bool) (*Lease, error) {
	lease := &Lease{locker: l}
	if len(keys) == 1 {
		lease.one[0] = keys[0]
		lease.req.Keys = lease.one[:]
	} else {
		lease.req.Keys = sorted(keys)
	}
	if err := lease.req.Validate(); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("lock: %w", context.Cause(ctx))
	}
	lease.req.Owner, lease.req.TTL, lease.req.Waiting = ids.New(), l.opts.TTL, wait
	lease.asked = time.Now()

	waiting := ctx
	if wait && l.opts.Wait > 0 {
		var cancel context.CancelFunc
		waiting, cancel = context.WithTimeout(ctx, l.opts.Wait)
		defer cancel()
	}
	err := l.enter(waiting, lease.req.Keys, wait)
	if err == nil {
		if err = l.acquire(ctx, waiting, lease); err != nil {
			l.lines.leave(lease.req.Keys)
		}
	}
	if err == nil {
		if f := l.opts.Observer.Acquired; f != nil {
			f(ctx, lease.req.Keys, time.Since(lease.asked))
		}
		return lease, nil
	}
	if f := l.opts.Observer.Refused; f != nil && errors.Is(err, ErrHeld) {
		f(ctx, lease.req.Keys, err)
	}
	return nil, err
}

// enter waits until the caller is the first in this process for each key.
func (l *Locker) enter(ctx context.Context, keys []string, wait bool) error {
	for i, key := range keys {
		if l.lines.enter(ctx, key, wait) {
			continue
		}
		l.lines.leave(keys[:i])
		return gaveUp(ctx, &HeldError{Key: key, RetryAfter: l.opts.TTL})
	}
	return nil
}

// gaveUp is the error of one who found keys held until ctx ended.
func gaveUp(ctx context.Context, held *HeldError) error {
	if ctx.Err() == nil {
		return held
	}
	return fmt.Errorf("%w: %w", held, context.Cause(ctx))
}

// acquire asks the store until the keys are granted.
func (l *Locker) acquire(ctx, waiting context.Context, lease *Lease) error {
	var w *waiter
	defer func() { w.end() }()
	if told := l.told.Load(); lease.req.Waiting && told > 0 && time.Since(l.born)-time.Duration(told) < time.Second {
		w = l.watch(waiting, lease.req.Keys) // it will be wanted; later it costs a request more
	}
	for attempt := 0; ; attempt++ {
		w.drain() // what was told before is answered by this request
		sent := time.Now()
		token, err := l.store.Acquire(waiting, lease.req)
		if err == nil {
			if time.Since(sent) < lease.valid() {
				lease.begin(ctx, token, sent)
				return nil
			}
			l.abandon(ctx, lease) // granted too late to be used
			if waiting.Err() != nil || !lease.req.Waiting {
				return gaveUp(waiting, &HeldError{Key: lease.req.Keys[0], RetryAfter: l.opts.TTL})
			}
			continue
		}
		var held *HeldError
		if !errors.As(err, &held) {
			if !errors.Is(err, ErrInvalid) {
				l.abandon(ctx, lease) // it may have been granted all the same
			}
			if w != nil && w.held != nil && waiting.Err() != nil {
				return gaveUp(waiting, w.held)
			}
			return fmt.Errorf("lock: acquire: %w", err)
		}
		if !lease.req.Waiting {
			return held
		}
		if w == nil {
			w = l.watch(waiting, lease.req.Keys)
		}
		w.held = held
		if !w.wait(waiting, attempt) {
			return gaveUp(waiting, held)
		}
	}
}

// abandon frees what may have been granted.
func (l *Locker) abandon(ctx context.Context, lease *Lease) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := l.store.Release(ctx, lease.req); err != nil && !errors.Is(err, ErrLost) {
		l.opts.Logger.WarnContext(ctx, "lock: keys may stay held until a lease ends", "keys", lease.req.Keys, "error", err)
	}
}

// A waiter waits for a key to become free.
type waiter struct {
	locker *Locker
	woke   chan struct{}
	told   bool // by the store, at least once, so it can be relied on
	held   *HeldError
	stop   func()
}

func (l *Locker) watch(ctx context.Context, keys []string) *waiter {
	w := &waiter{locker: l, woke: make(chan struct{}, 1), stop: func() {}}
	if l.watcher != nil {
		w.stop = l.watcher.Watch(ctx, keys, func() {
			select {
			case w.woke <- struct{}{}:
			default:
			}
		})
	}
	return w
}

// wait returns when it is time to ask again, and false when ctx has ended.
func (w *waiter) wait(ctx context.Context, attempt int) bool {
	poll := w.locker.opts.Poll
	pause := backoff.Policy{Max: poll}.Next(attempt)
	if w.told {
		pause = poll/2 + rand.N(poll/2+1)
	}
	// A lease that is not extended ends without a word.
	pause = min(pause, w.held.RetryAfter+1+rand.N(time.Millisecond))
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-w.woke:
		w.told = true
		w.locker.told.Store(int64(time.Since(w.locker.born)))
	case <-timer.C:
	}
	return true
}

func (w *waiter) end() {
	if w != nil {
		w.stop()
	}
}

func (w *waiter) drain() {
	if w == nil {
		return
	}
	select {
	case <-w.woke:
		w.told = true
	default:
	}
}
