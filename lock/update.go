package lock

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// UpdateOptions tunes an [Updater]. The zero value of each field means its
// default.
type UpdateOptions struct {
	// Attempts is how often a change is stored at most, conflicts included.
	// Default 20.
	Attempts int
	// Batch is how many changes one Store may carry. 1 stores each by itself, for
	// those who look at every version, such as an audit trigger. Default 64.
	Batch int
	// Observer is told what happens.
	Observer UpdateObserver
}

// An UpdateObserver is a set of callbacks, each of which may be nil. They must not
// block. ctx has the values of the first change's context.
type UpdateObserver struct {
	// Stored is told of a value that was stored, and of how many changes it has.
	Stored func(ctx context.Context, key string, changes int)
	// Conflicted is told of a value that was not stored because of err.
	Conflicted func(ctx context.Context, key string, changes int, err error)
}

// An Updater changes values of a [Register] by reading, changing, and storing
// what still has the version that was read. Use one for each register in a
// process: changes of the same key by the same Updater do not conflict, but queue.
// It is safe for concurrent use and has nothing to close.
type Updater[T any] struct {
	register Register[T]
	opts     UpdateOptions
	trip     atomic.Int64 // about how long a round trip takes, in ns

	mu     sync.Mutex
	queues map[string]*queue[T] // one while it has changes
}

// NewUpdater returns an updater of register. It starts nothing. opts may be nil.
func NewUpdater[T any](register Register[T], opts *UpdateOptions) *Updater[T] {
	if register == nil {
		panic("lock: NewUpdater needs a register")
	}
	u := &Updater[T]{register: register, queues: make(map[string]*queue[T])}
	if opts != nil {
		u.opts = *opts
	}
	setDefault(&u.opts.Attempts, 20)
	setDefault(&u.opts.Batch, 64)
	return u
}

// Update replaces the value of key by what change makes of it, and returns that
// and a version at which it is contained. If another stores in between, change is
// run again on the new value, after a random pause that grows with each conflict
// from about one round trip ("full jitter"). That ends when ctx does or after
// [UpdateOptions].Attempts; the error then is a [ConflictError], and wraps the
// context's.
//
// Changes of one key are made in the order of their calls. Those that wait while a
// Store is under way are applied one after the other to one value, which is stored
// once: all of them, or none. So the value that Update returns need not have been
// stored by itself.
//
// change must be pure: it may run several times and in another goroutine, though
// not after Update has returned; it must not modify what it is given, nor block.
// If it returns an error, Update returns that error and the value stays as if the
// change had not been asked for; a panic goes on in Update's caller.
//
// When ctx ends while the value is being stored, or Store fails otherwise than by
// a conflict, or the process dies, the change may have been made or not.
func (u *Updater[T]) Update(ctx context.Context, key string, change func(T) (T, error)) (value T, version int64, err error) {
	if ctx.Err() != nil {
		return value, 0, context.Cause(ctx)
	}
	c := &call[T]{ctx: ctx, change: change, done: make(chan struct{})}
	u.mu.Lock()
	q := u.queues[key]
	if q == nil {
		q = &queue[T]{updater: u, key: key}
		u.queues[key] = q
		go q.run()
	}
	q.waiting = append(q.waiting, c)
	u.mu.Unlock()

	select {
	case <-c.done:
	case <-ctx.Done():
		if c.leave() {
			q.left()
			return value, 0, c.gaveUp()
		}
		<-c.done // it was decided at the same moment
	}
	return c.result()
}

// observe notes how long a round trip took.
func (u *Updater[T]) observe(took time.Duration) {
	old := u.trip.Load()
	if old == 0 {
		old = int64(took)
	}
	u.trip.Store(old + (int64(took)-old)/8) // a lost update of an estimate is none
}
