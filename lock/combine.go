package lock

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// A call is one Update.
type call[T any] struct {
	ctx    context.Context
	change func(T) (T, error)
	done   chan struct{} // closed when there is a result

	mu       sync.Mutex // held while change runs
	gone     bool       // nobody waits for the result
	ended    bool       // done is closed
	value    T
	version  int64
	err      error
	panicked *panicError
	exited   bool // change called runtime.Goexit

	attempts int            // of the queue's goroutine
	conflict *ConflictError // the last one
}

// A panicError is a panic in a change, which goes on in another goroutine.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("%v\n\n%s", e.value, e.stack) }

func (e *panicError) Unwrap() error {
	err, _ := e.value.(error)
	return err
}

// leave makes the queue drop the call, and returns false if it has a result.
func (c *call[T]) leave() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = !c.ended
	return c.gone
}

func (c *call[T]) isGone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

func (c *call[T]) gaveUp() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conflict != nil {
		return fmt.Errorf("%w: %w", c.conflict, context.Cause(c.ctx))
	}
	return fmt.Errorf("lock: update: %w", context.Cause(c.ctx))
}

func (c *call[T]) result() (T, int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.panicked != nil {
		panic(c.panicked)
	}
	if c.exited {
		runtime.Goexit()
	}
	return c.value, c.version, c.err
}

// end gives the call its result.
func (c *call[T]) end(version int64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endLocked(version, err)
}

func (c *call[T]) endLocked(version int64, err error) {
	if c.ended {
		return
	}
	if c.ended = true; err != nil {
		var zero T
		c.value = zero
	}
	c.version, c.err = version, err
	close(c.done)
}

// apply returns what the change makes of value, and false if nothing, because it
// fails or is no longer wanted.
func (c *call[T]) apply(value T) (_ T, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone || c.ended {
		return value, false
	}
	returned := false
	defer func() {
		if returned {
			return
		}
		if v := recover(); v != nil {
			c.panicked = &panicError{v, debug.Stack()}
		} else {
			c.exited = true // which takes this goroutine with it, too
		}
		c.endLocked(0, errors.New("lock: the change did not return"))
	}()
	next, err := c.change(value)
	returned = true
	if err != nil {
		c.endLocked(0, err)
		return value, false
	}
	c.value = next
	return next, true
}

// A queue makes the changes of one key. Its goroutine ends when it has none.
type queue[T any] struct {
	updater *Updater[T]
	key     string
	waiting []*call[T] // guarded by updater.mu, as are batch and cancel
	batch   []*call[T]
	cancel  context.CancelFunc // of what is under way for batch
}

func (q *queue[T]) run() {
	finished := false
	defer func() {
		if !finished {
			go q.run() // a change has called runtime.Goexit
		}
	}()
	var at state[T]
	for {
		ctx, ok := q.next()
		if !ok {
			finished = true
			return
		}
		q.attempt(ctx, &at)
	}
}

// A state is the value at hand.
type state[T any] struct {
	value   T
	version int64 // zero: not loaded
}

// next takes what waits into the batch, and returns false when there is nothing.
func (q *queue[T]) next() (context.Context, bool) {
	runtime.Gosched() // those who have just got their result may have another change
	u := q.updater
	u.mu.Lock()
	defer u.mu.Unlock()
	if q.cancel != nil {
		q.cancel()
		q.cancel = nil
	}
	open := q.batch[:0]
	for _, c := range q.batch {
		if c.mu.Lock(); !c.gone && !c.ended {
			open = append(open, c)
		}
		c.mu.Unlock()
	}
	clear(q.batch[len(open):])
	n := max(0, min(len(q.waiting), u.opts.Batch-len(open)))
	open = append(open, q.waiting[:n]...)
	q.batch = open
	if q.waiting = q.waiting[n:]; len(q.batch) == 0 {
		delete(u.queues, q.key)
		return nil, false
	}
	var ctx context.Context
	ctx, q.cancel = context.WithCancel(context.WithoutCancel(q.batch[0].ctx))
	return ctx, true
}

// left stops what is under way if nobody waits for it any more.
func (q *queue[T]) left() {
	q.updater.mu.Lock()
	defer q.updater.mu.Unlock()
	for _, c := range q.batch {
		if !c.isGone() {
			return
		}
	}
	if q.cancel != nil {
		q.cancel()
	}
}

// attempt loads the value, unless it is at hand, applies the batch and stores it.
func (q *queue[T]) attempt(ctx context.Context, at *state[T]) {
	u := q.updater
	if at.version == 0 {
		began := time.Now()
		var err error
		if at.value, at.version, err = u.register.Load(ctx, q.key); err != nil {
			at.version = 0
			q.end(0, fmt.Errorf("lock: load: %w", err))
			return
		}
		u.observe(time.Since(began))
	}
	value := at.value
	applied := make([]*call[T], 0, len(q.batch))
	for _, c := range q.batch {
		next, ok := c.apply(value)
		if value = next; ok {
			applied = append(applied, c)
		}
	}
	if len(applied) == 0 {
		return
	}
	began := time.Now()
	version, err := u.register.Store(ctx, q.key, value, at.version)
	var conflict *ConflictError
	switch {
	case err == nil:
		u.observe(time.Since(began))
		*at = state[T]{value, version}
		if f := u.opts.Observer.Stored; f != nil {
			f(ctx, q.key, len(applied))
		}
		q.end(version, nil)
	case errors.As(err, &conflict):
		u.observe(time.Since(began))
		if f := u.opts.Observer.Conflicted; f != nil {
			f(ctx, q.key, len(applied), err)
		}
		q.conflicted(ctx, applied, conflict, at)
	default:
		at.version = 0
		q.end(0, fmt.Errorf("lock: store: %w", err))
	}
}

// end gives all of the batch their result.
func (q *queue[T]) end(version int64, err error) {
	for _, c := range q.batch {
		c.end(version, err)
	}
}

// conflicted keeps what may be tried again, and pauses.
func (q *queue[T]) conflicted(ctx context.Context, applied []*call[T], conflict *ConflictError, at *state[T]) {
	u := q.updater
	attempt := u.opts.Attempts
	for _, c := range applied {
		c.mu.Lock()
		c.conflict = conflict
		c.attempts++
		if !conflict.Exists || c.attempts >= u.opts.Attempts {
			c.endLocked(0, conflict)
		} else {
			attempt = min(attempt, c.attempts)
		}
		c.mu.Unlock()
	}
	at.version = 0
	if current, ok := conflict.Current.(T); ok && conflict.Exists {
		*at = state[T]{current, conflict.Version}
	}
	if attempt == u.opts.Attempts {
		return // nothing to try again
	}
	trip := max(time.Duration(u.trip.Load()), time.Microsecond)
	_ = backoff.Sleep(ctx, backoff.Policy{Base: trip, Max: 100 * trip}.Next(attempt-1)) // ends when all have left
}
