package schedule

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/internal/ids"
)

// Options tunes a [Runner]. The zero value of each field means its default.
type Options struct {
	// Concurrency is how many runs the instance executes at once. Default 64. Of
	// one schedule, it starts no more while a quarter of that is running.
	Concurrency int
	// Poll is the longest wait between two looks at the store. It bounds the
	// delay of what no timer and no [Runner.Wake] tells: a new definition, a
	// trigger. Default 1 s.
	Poll time.Duration
	// Lease is how long a run stays taken after its instance has died. A running
	// instance extends it every third of its length. Default 10 s.
	Lease time.Duration
	// DrainTimeout is how long handlers may go on after the context of Run has
	// ended; then theirs end. Default 30 s.
	DrainTimeout time.Duration
	// FinishTimeout bounds the recording of an outcome, and how long Run waits
	// for handlers whose context it has ended. Default 5 s.
	FinishTimeout time.Duration
	// Retention is how long runs that have ended stay in the history. Default 7
	// days; negative means for ever.
	Retention time.Duration
	// Instance names the instance in the history. Default host name, process ID
	// and a random part.
	Instance string
	// Funcs are the timings of specs of the form "func NAME". Schedules whose
	// function an instance lacks are left to those that have it.
	Funcs map[string]Timing
	// Logger reports failures. Default slog.Default().
	Logger *slog.Logger
	// Observer is told what happens.
	Observer Observer
}

// An Observer is a set of callbacks, each of which may be nil. They must not
// block.
type Observer struct {
	// Started is told of every attempt, before its handler is called. Its
	// lateness is run.Claimed.Sub(run.Due).
	Started func(ctx context.Context, run Run)
	// Finished is told of every attempt whose outcome is recorded. The state is
	// Waiting where it will be repeated.
	Finished func(ctx context.Context, run Run, state State, err error, took time.Duration)
	// Lost is told of an attempt whose outcome was not recorded, with the reason.
	Lost func(ctx context.Context, run Run, err error)
}

// A Handler does the work of a schedule. Its context ends when the run is no
// longer its own (with the cause [ErrLeaseLost]), when the definition's Timeout
// is over, and when the instance has drained for DrainTimeout.
//
// An error, a panic and a call of [runtime.Goexit] fail the attempt. An error
// after the drain has ended the context does not: another instance repeats the
// run at once.
type Handler func(ctx context.Context, run Run) error

// A Runner executes the schedules of a [Store].
type Runner struct {
	store Store
	opts  Options
	wake  chan struct{}

	mu       sync.Mutex
	handlers map[string]Handler
}

// New returns a runner on store. It starts nothing; see [Runner.Run].
func New(store Store, opts *Options) *Runner {
	if store == nil {
		panic("schedule: New needs a store")
	}
	var o Options
	if opts != nil {
		o = *opts
	}
	o.Concurrency = max(o.Concurrency, 0)
	setDefault(&o.Concurrency, 64)
	for _, f := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&o.Poll, time.Second},
		{&o.Lease, 10 * time.Second},
		{&o.DrainTimeout, 30 * time.Second},
		{&o.FinishTimeout, 5 * time.Second},
		{&o.Retention, 7 * 24 * time.Hour},
	} {
		if *f.field == 0 || *f.field < 0 && f.field != &o.Retention {
			*f.field = f.value
		}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return &Runner{store: store, opts: o, wake: make(chan struct{}, 1), handlers: make(map[string]Handler)}
}

// Handle registers what to do for the schedules whose Handler is name. It is
// called before Run. An instance leaves schedules for which it has no handler to
// those that have one.
func (r *Runner) Handle(name string, h Handler) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if name == "" || h == nil {
		panic("schedule: Handle needs a name and a handler")
	}
	if _, ok := r.handlers[name]; ok {
		panic("schedule: there are two handlers of the name " + name)
	}
	r.handlers[name] = h
}

// Wake makes the runner look at the store now instead of at its next poll. It
// never blocks and may be called from anywhere; a wake-up that is lost costs at
// most one poll interval.
func (r *Runner) Wake() { signal(r.wake) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run executes schedules until ctx ends. Then it starts no more runs, lets those
// that are running end, and returns nil. Handlers that have not returned within
// DrainTimeout have their context ended; if some do not heed that for
// FinishTimeout, Run returns an error and leaves them. It retries the errors of
// the store; the one it returns is [ErrNotMigrated].
//
// Any number of runners may run, in one process or in many; none of them leads.
// If the process is killed, another repeats its runs when their leases end. It
// is safe for concurrent use; each call is an instance of its own.
func (r *Runner) Run(ctx context.Context) error {
	r.mu.Lock()
	l := newLoop(r, maps.Clone(r.handlers))
	r.mu.Unlock()

	var wg sync.WaitGroup
	helpers, stop := context.WithCancel(context.WithoutCancel(ctx))
	wg.Go(func() { l.keeper.run(helpers) })
	if r.opts.Retention > 0 {
		wg.Go(func() { r.prune(helpers) })
	}
	err := l.run(ctx)
	if drained := l.drain(); err == nil {
		err = drained
	}
	stop()
	wg.Wait()
	return err
}

// prune removes old runs, a batch at a time.
func (r *Runner) prune(ctx context.Context) {
	const batch = 1000
	every := backoff.Policy{Base: time.Minute, Max: time.Minute}
	for backoff.Sleep(ctx, every.Next(0)) == nil {
		for n := batch; n == batch && ctx.Err() == nil; {
			var err error
			if n, err = r.store.Prune(ctx, r.opts.Retention, batch); err != nil && ctx.Err() == nil {
				r.opts.Logger.WarnContext(ctx, "schedule: old runs not removed", "error", err)
			}
		}
	}
}

func instanceName(name string) string {
	if name != "" {
		return name
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	id := ids.New()
	return fmt.Sprintf("%s/%d/%s", host, os.Getpid(), id[len(id)-6:])
}

var errDraining = errors.New("schedule: the instance is shutting down")
