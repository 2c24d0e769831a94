package saga

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// Options tunes a [Runner]. The zero value of each field means its default.
type Options struct {
	// Lease is how long the sagas of a dead runner stay with it. Default 10 s.
	Lease time.Duration
	// Concurrency is how many sagas the runner has in hand at most, not counting
	// those that wait: for a signal, a sleep, or more than a second for the next
	// attempt. Default 1000.
	Concurrency int
	// Poll is the longest wait between two looks for sagas that are due: those
	// started or signalled elsewhere, and those of dead runners. Default 250 ms,
	// but at most a tenth of Lease. See [Runner.Wake].
	Poll time.Duration
	// MaxDeaths is how many runners may die in a row with a saga in hand before
	// it is stuck instead of being taken in hand again. Default 10.
	MaxDeaths int
	// DrainTimeout bounds how long steps may go on when the context of Run has
	// ended; then their contexts end. Default 10 s.
	DrainTimeout time.Duration
	// Logger reports what no caller is told. Default slog.Default().
	Logger *slog.Logger
	// Observer is told what happens.
	Observer Observer
}

// An Observer is a set of callbacks, each of which may be nil. They run within
// what they tell of and must not block.
type Observer struct {
	// Started is told of an instance that this runner has started.
	Started func(ctx context.Context, in Instance)
	// Taken is told of an instance that this runner takes in hand; Deaths is
	// above zero if its last runner died.
	Taken func(ctx context.Context, in Instance)
	// Stepped is told of an attempt of a step, or of its compensation, that ended.
	Stepped func(ctx context.Context, in Instance, call Call, err error, took time.Duration)
	// Settled is told of an instance that has ended or is stuck.
	Settled func(ctx context.Context, in Instance)
	// Lost is told that the lease was lost, with the number of sagas in hand.
	Lost func(inHand int)
}

// A Runner starts sagas, runs them, and answers for them. One whose Run is not
// called runs none: a web process may start and query sagas that others run. It
// is safe for concurrent use.
type Runner struct {
	store Store
	defs  map[string]*definition
	opts  Options
	wake  chan struct{}

	mu      sync.Mutex
	tenure  *tenure // nil unless running
	waiters map[string][]chan Instance
}

// NewRunner returns a runner for the given definitions. It starts nothing; see
// [Runner.Run]. opts may be nil.
func NewRunner(store Store, sagas []Definition, opts *Options) *Runner {
	if store == nil {
		panic("saga: NewRunner needs a store")
	}
	var o Options
	if opts != nil {
		o = *opts
	}
	setDefault(&o.Lease, 10*time.Second)
	setDefault(&o.Concurrency, 1000)
	setDefault(&o.Poll, 250*time.Millisecond)
	setDefault(&o.MaxDeaths, 10)
	setDefault(&o.DrainTimeout, 10*time.Second)
	o.Poll = min(o.Poll, max(o.Lease/10, time.Millisecond))
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	r := &Runner{store: store, opts: o, defs: make(map[string]*definition), wake: make(chan struct{}, 1), waiters: make(map[string][]chan Instance)}
	for _, s := range sagas {
		d := s.definition()
		if r.defs[d.name] != nil {
			panic("saga: two definitions are called " + d.name)
		}
		r.defs[d.name] = d
	}
	return r
}

// Wake makes the runner look for sagas that are due now instead of at its next
// poll. It never blocks; a wake-up that is lost costs at most one poll interval.
func (r *Runner) Wake() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run runs sagas until ctx ends, then lets the steps under way end, gives its
// sagas up and returns nil. It retries errors of the store; the one it returns
// at once is [ErrNotMigrated]. It returns an error if steps go on although their
// contexts have ended and twice DrainTimeout has passed.
//
// If the process is killed, another runner takes its sagas in hand when the
// lease ends. The step that was under way is run again there: with
// [Call.Key] as its idempotency key, or as a transaction (sagapg.Tx), its effect
// is not. Run may be called in many processes, but once at a time of a Runner.
func (r *Runner) Run(ctx context.Context) error {
	maintenance, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { r.maintain(maintenance) })
	defer wg.Wait()
	defer stop()
	for failures := 0; ; {
		t := newTenure(r)
		err := t.run(ctx)
		switch {
		case errors.Is(err, ErrNotMigrated), errors.Is(err, errNotDrained):
			return err
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrLeaseLost):
			failures = 0
			r.opts.Logger.WarnContext(ctx, "saga: lease lost, starting anew", "error", err)
		default:
			failures++
			r.opts.Logger.WarnContext(ctx, "saga: no lease", "error", err)
			_ = backoff.Sleep(ctx, backoff.Policy{}.Next(failures)) // the loop sees why
		}
	}
}

func (r *Runner) maintain(ctx context.Context) {
	for failures := 0; ; {
		wait := time.Second
		if err := r.store.Maintain(ctx); err != nil && ctx.Err() == nil {
			wait += backoff.Policy{Base: time.Second, Max: time.Minute}.Next(failures)
			failures++
			r.opts.Logger.WarnContext(ctx, "saga: maintenance failed", "error", err)
		} else {
			failures = 0
		}
		if backoff.Sleep(ctx, wait) != nil {
			return
		}
	}
}

// start stores a new instance, in this runner's hand if it has one free.
func (r *Runner) start(ctx context.Context, d *definition, in Instance) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, context.Cause(ctx)
	}
	r.mu.Lock()
	t := r.tenure
	r.mu.Unlock()
	if t == nil || r.defs[d.name] != d || !t.reserve(in.ID) {
		existing, err := r.store.Create(ctx, []Instance{in})
		if err != nil {
			return false, fmt.Errorf("saga: start %s: %w", in.ID, err)
		}
		return r.started(ctx, in, existing[0])
	}
	in.Owner, in.StartedAt = t.id, t.now()
	d.begin(&in, in.StartedAt)
	existing, err := t.creates.do(ctx, in)
	switch {
	case err != nil:
		// It may be there all the same, and in this runner's hand.
		t.wg.Go(func() { t.adopt(in.ID) })
		return false, fmt.Errorf("saga: start %s: %w", in.ID, err)
	case existing == "":
		t.launch(in)
	default:
		t.free(in.ID)
	}
	return r.started(ctx, in, existing)
}

func (r *Runner) started(ctx context.Context, in Instance, existing string) (bool, error) {
	switch existing {
	case "":
		if f := r.opts.Observer.Started; f != nil {
			f(ctx, in)
		}
		return true, nil
	case in.Saga:
		return false, nil
	}
	return false, fmt.Errorf("%w: %s is of %s", ErrExists, in.ID, existing)
}
