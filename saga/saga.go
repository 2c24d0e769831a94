package saga

import (
	"context"
	"encoding/json"
	"fmt"
	"time"
)

// A Func is what a step does. It may change the state, which is stored when it
// succeeds; what it changes and then fails is forgotten. It must bear being run
// again with the state it began with: see [Call.Key].
type Func[S any] = func(ctx context.Context, state *S) error

// A StepOptions tunes a step. The zero value of each field means its default.
type StepOptions struct {
	// Timeout bounds one attempt. Default 30 s.
	Timeout time.Duration
	// MaxAttempts is how often the step is tried before it is given up: before
	// the pivot the saga is then compensated, from the pivot on it is stuck.
	// Default 5; after the pivot without end.
	MaxAttempts int
	// RetryBase and RetryMax bound the waits between attempts: exponential with
	// full jitter. Defaults 100 ms and 1 min.
	RetryBase, RetryMax time.Duration
	// UndoTimeout bounds one attempt of the compensation. Default 30 s.
	UndoTimeout time.Duration
	// UndoMaxAttempts is how often the compensation is tried before the saga is
	// stuck. Default 20, which with the default waits takes about ten minutes.
	UndoMaxAttempts int
}

func (o *StepOptions) withDefaults(attempts int) StepOptions {
	var d StepOptions
	if o != nil {
		d = *o
	}
	setDefault(&d.Timeout, 30*time.Second)
	setDefault(&d.MaxAttempts, attempts)
	setDefault(&d.RetryBase, 100*time.Millisecond)
	setDefault(&d.RetryMax, time.Minute)
	setDefault(&d.UndoTimeout, 30*time.Second)
	setDefault(&d.UndoMaxAttempts, 20)
	return d
}

func setDefault[T int | time.Duration](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}

// AwaitOptions tunes [Draft.Await]. The zero value of each field means its default.
type AwaitOptions struct {
	// Deadline is how long to wait, counted from when the step begins. Default 0:
	// without end.
	Deadline time.Duration
}

// A Draft is a saga of which every step so far can be undone.
//
// Its methods panic if names repeat or break a rule: a draft is written down in
// the program, so that this shows at its start.
type Draft[S any] struct{ d *definition }

// A Committed is a draft beyond its pivot: what is done stays done, so that its
// steps have no compensation and are repeated until they succeed.
type Committed[S any] struct{ d *definition }

// New begins the definition of a saga. The name is stored with each instance and
// stays; the version rises whenever a change of the steps or of the state
// matters to instances that are under way.
func New[S any](name string, version int) *Draft[S] {
	if err := validate("saga name", name); err != nil {
		panic(err)
	}
	return &Draft[S]{&definition{
		name: name, version: version, index: make(map[string]int),
		decode: func(b []byte, _ int) (any, error) {
			s := new(S)
			return s, json.Unmarshal(b, s)
		},
		encode: json.Marshal,
	}}
}

// Codec replaces JSON as the stored form of the state. decode is told by which
// version of the definition the instance was started.
func (d *Draft[S]) Codec(encode func(*S) ([]byte, error), decode func(b []byte, version int) (*S, error)) *Draft[S] {
	d.d.encode = func(s any) ([]byte, error) { return encode(s.(*S)) }
	d.d.decode = func(b []byte, version int) (any, error) { return decode(b, version) }
	return d
}

// Step adds a step, and how it is undone; compensate may be nil if there is
// nothing to undo. The compensation is on record before the step runs. It is run
// also when it is not known whether the step took effect, and must bear that it
// did not: see sagapg.Barrier. opts may be nil.
func (d *Draft[S]) Step(name string, do, compensate Func[S], opts *StepOptions) *Draft[S] {
	d.d.before().add(step{name: name, do: anyFunc(do), undo: anyFunc(compensate), opts: opts.withDefaults(5)})
	return d
}

// Pivot adds the step that decides: once it is done, the saga goes forward only.
// If it refuses ([Abort]), all before it is compensated. If its outcome stays
// unknown, the saga is stuck.
func (d *Draft[S]) Pivot(name string, do Func[S], opts *StepOptions) *Committed[S] {
	d.d.before().add(step{name: name, do: anyFunc(do), pivot: true, opts: opts.withDefaults(5)})
	d.d.pastPivot = true
	return &Committed[S]{d.d}
}

// Sleep adds a wait. No goroutine waits, and a crash does not prolong it.
func (d *Draft[S]) Sleep(name string, wait time.Duration) *Draft[S] {
	d.d.before().add(sleep(name, wait))
	return d
}

// Await adds a step that waits for the signal of its name (see [Runner.Signal])
// and is given what came with it. A signal that comes early is kept. If the
// deadline passes, the step fails with [ErrDeadline]. opts may be nil.
func (d *Draft[S]) Await(name string, received func(ctx context.Context, state *S, payload []byte) error, opts *AwaitOptions) *Draft[S] {
	d.d.before().add(await(name, received, opts, 5))
	return d
}

// Parallel adds branches that run side by side; what follows waits for all of
// them. Each step of a branch works on a copy of the state, and what it changes
// is taken over field by field: two steps that run at the same time and change
// the same field differently are a mistake that makes the saga stuck.
func (d *Draft[S]) Parallel(branches ...func(*Draft[S])) *Draft[S] {
	d.d.before().parallel(len(branches), func(i int) { branches[i](d) })
	return d
}

// Build ends the definition of a saga without a pivot: it can be cancelled until
// its last step is done.
func (d *Draft[S]) Build() *Saga[S] { return &Saga[S]{d.d.build()} }

// Step adds a step that is repeated until it succeeds. opts may be nil.
func (c *Committed[S]) Step(name string, do Func[S], opts *StepOptions) *Committed[S] {
	c.d.add(step{name: name, do: anyFunc(do), opts: opts.withDefaults(-1)})
	return c
}

// Sleep is as [Draft.Sleep].
func (c *Committed[S]) Sleep(name string, wait time.Duration) *Committed[S] {
	c.d.add(sleep(name, wait))
	return c
}

// Await is as [Draft.Await], but that the saga is stuck if the deadline passes.
func (c *Committed[S]) Await(name string, received func(ctx context.Context, state *S, payload []byte) error, opts *AwaitOptions) *Committed[S] {
	c.d.add(await(name, received, opts, -1))
	return c
}

// Parallel is as [Draft.Parallel].
func (c *Committed[S]) Parallel(branches ...func(*Committed[S])) *Committed[S] {
	c.d.parallel(len(branches), func(i int) { branches[i](c) })
	return c
}

// Build ends the definition.
func (c *Committed[S]) Build() *Saga[S] { return &Saga[S]{c.d.build()} }

// A Saga is a finished definition, safe for concurrent use.
type Saga[S any] struct{ d *definition }

func (s *Saga[S]) definition() *definition { return s.d }

// Name returns the definition's name.
func (s *Saga[S]) Name() string { return s.d.name }

// Steps returns the names of the steps, in the order of the definition.
func (s *Saga[S]) Steps() []string {
	names := make([]string, len(s.d.steps))
	for i, st := range s.d.steps {
		names[i] = st.name
	}
	return names
}

// State returns the state of an instance.
func (s *Saga[S]) State(in Instance) (*S, error) {
	state, err := s.d.decode(in.State, in.Version)
	if err != nil {
		return nil, fmt.Errorf("saga: state of %s: %w", in.ID, err)
	}
	return state.(*S), nil
}

// Check reports whether this definition can go on with an instance that any
// version of it has begun: nil, or an error that wraps [ErrIncompatible]. It is
// what a runner asks before it takes an instance in hand; sagatest.Replay asks
// it of recorded ones.
func (s *Saga[S]) Check(in Instance) error {
	if _, err := s.State(in); err != nil {
		return fmt.Errorf("%w: %w", ErrIncompatible, err)
	}
	return s.d.check(&in)
}

// Start starts an instance and returns when it is stored: from then on it goes
// on to its end whatever dies, in r if that is running, or in any runner of the
// same store that has the definition. started is false if a saga of that ID and
// definition was there before, which changes nothing; of another definition, the
// error wraps [ErrExists].
func (s *Saga[S]) Start(ctx context.Context, r *Runner, id string, state S) (started bool, err error) {
	in, err := s.Instance(id, state)
	if err != nil {
		return false, err
	}
	return r.start(ctx, s.d, in)
}

// Instance returns what Start stores: for stores that start a saga within a
// caller's transaction, such as sagapg.Start.
func (s *Saga[S]) Instance(id string, state S) (Instance, error) {
	if err := validate("saga ID", id); err != nil {
		return Instance{}, err
	}
	b, err := s.d.encode(&state)
	if err != nil {
		return Instance{}, fmt.Errorf("saga: state of %s: %w", id, err)
	}
	return Instance{ID: id, Saga: s.d.name, Version: s.d.version, Status: Running, State: b}, nil
}

// A Definition is a [Saga] of any state.
type Definition interface{ definition() *definition }
