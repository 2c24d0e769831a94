package saga

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// A definition is a saga without the type of its state, which is a pointer
// behind any.
type definition struct {
	name      string
	version   int
	steps     []step
	index     map[string]int // of steps, by name
	pastPivot bool
	built     bool
	decode    func(b []byte, version int) (any, error)
	encode    func(state any) ([]byte, error)

	tails  []int // steps that the next one to be added waits for
	branch int   // how deep in branches
}

type step struct {
	name     string
	pivot    bool
	do, undo func(ctx context.Context, state any) error // undo may be nil
	received func(ctx context.Context, state any, payload []byte) error
	wait     time.Duration // of a sleep; the deadline of an await
	sleep    bool
	opts     StepOptions // MaxAttempts -1: without end
	after    []int       // steps that must be done before
}

func anyFunc[S any](f Func[S]) func(context.Context, any) error {
	if f == nil {
		return nil
	}
	return func(ctx context.Context, state any) error { return f(ctx, state.(*S)) }
}

func sleep(name string, wait time.Duration) step {
	return step{name: name, sleep: true, wait: max(wait, 1)}
}

func await[S any](name string, received func(context.Context, *S, []byte) error, opts *AwaitOptions, attempts int) step {
	if received == nil {
		received = func(context.Context, *S, []byte) error { return nil }
	}
	st := step{name: name, opts: (*StepOptions)(nil).withDefaults(attempts)}
	st.received = func(ctx context.Context, state any, payload []byte) error { return received(ctx, state.(*S), payload) }
	if opts != nil {
		st.wait = opts.Deadline
	}
	return st
}

// before makes sure that a draft is not used on when its pivot is drawn.
func (d *definition) before() *definition {
	if d.pastPivot {
		panic("saga: " + d.name + ": a draft ends with its pivot, go on with what Pivot returned")
	}
	return d
}

func (d *definition) add(st step) {
	if err := validate("step name", st.name); err != nil {
		panic(err)
	}
	_, exists := d.index[st.name]
	switch {
	case d.built:
		panic(fmt.Sprintf("saga: %s: step %q comes after Build", d.name, st.name))
	case exists:
		panic(fmt.Sprintf("saga: %s: two steps are called %q", d.name, st.name))
	case st.do == nil && st.received == nil && !st.sleep:
		panic(fmt.Sprintf("saga: %s: step %q does nothing", d.name, st.name))
	case st.pivot && d.branch > 0:
		panic(fmt.Sprintf("saga: %s: pivot %q within a branch", d.name, st.name))
	}
	if st.opts.MaxAttempts == 0 {
		st.opts = (*StepOptions)(nil).withDefaults(5)
	}
	st.after = d.tails
	d.tails = []int{len(d.steps)}
	d.index[st.name] = len(d.steps)
	d.steps = append(d.steps, st)
}

// parallel has add called for n branches.
func (d *definition) parallel(n int, branch func(i int)) {
	fork := d.tails
	var join []int
	d.branch++
	for i := range n {
		d.tails = fork
		branch(i)
		for _, t := range d.tails {
			if !slices.Contains(join, t) {
				join = append(join, t)
			}
		}
	}
	d.branch--
	if n > 0 {
		d.tails = join
	}
}

func (d *definition) build() *definition {
	if len(d.steps) == 0 {
		panic("saga: " + d.name + " has no steps")
	}
	d.built = true
	return d
}

// begin adds records of the steps that can run now and have none yet. On record
// before they run, they are known to whoever compensates. It reports whether it
// has changed anything.
func (d *definition) begin(in *Instance, now time.Time) (changed bool) {
	done := make([]bool, len(d.steps))
	begun := make([]bool, len(d.steps))
	for k := range in.Steps {
		r := &in.Steps[k]
		i := d.index[r.Name]
		begun[i] = true
		done[i] = r.Outcome == OK || r.Outcome == Skipped
		if wait := d.steps[i].wait; wait > 0 && r.Outcome == Begun && r.Attempts == 0 && r.NotBefore.IsZero() {
			r.NotBefore, changed = now.Add(wait), true // after Retry
		}
	}
	for i, st := range d.steps {
		if begun[i] || slices.ContainsFunc(st.after, func(a int) bool { return !done[a] }) {
			continue
		}
		r := StepRecord{Name: st.name, Pivot: st.pivot, Outcome: Begun, BegunAt: now}
		if st.wait > 0 {
			r.NotBefore = now.Add(st.wait)
		}
		in.Steps = append(in.Steps, r)
		changed = true
	}
	return changed
}

// finished reports whether every step is done.
func (d *definition) finished(in *Instance) bool {
	return len(in.Steps) == len(d.steps) && !slices.ContainsFunc(in.Steps, func(r StepRecord) bool {
		return r.Outcome != OK && r.Outcome != Skipped
	})
}

// check reports whether the definition can go on with an instance.
func (d *definition) check(in *Instance) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s %s was started by version %d, this is version %d: %s",
			ErrIncompatible, in.Saga, in.ID, in.Version, d.version, fmt.Sprintf(format, args...))
	}
	if in.Saga != d.name {
		return fmt.Errorf("%w: %s is of %s, not of %s", ErrIncompatible, in.ID, in.Saga, d.name)
	}
	for _, r := range in.Steps {
		i, ok := d.index[r.Name]
		if !ok {
			return fail("it has no step %q, which was begun", r.Name)
		}
		st := d.steps[i]
		if st.pivot != r.Pivot {
			return fail("step %q was begun as pivot: %t, and is now: %t", r.Name, r.Pivot, st.pivot)
		}
		for _, a := range st.after {
			before := in.step(d.steps[a].name)
			if before == nil || before.Outcome != OK && before.Outcome != Skipped {
				return fail("step %q was begun before %q, which must now be done first", r.Name, d.steps[a].name)
			}
		}
	}
	return nil
}

// undos returns the indexes of the records that are to be compensated, in order:
// the last begun first.
func (d *definition) undos(in *Instance) []int {
	var out []int
	for i := len(in.Steps) - 1; i >= 0; i-- {
		r := &in.Steps[i]
		if r.Outcome == Refused || r.Outcome == Skipped || d.steps[d.index[r.Name]].undo == nil {
			continue
		}
		if r.Undo == nil || r.Undo.Outcome == Begun || r.Undo.Outcome == Unknown {
			out = append(out, i)
		}
	}
	return out
}
