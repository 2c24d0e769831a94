package saga

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ashlar-go/ashlar/saga/internal/execution"
)

// A flight is the steps of one saga that are under way.
type flight struct {
	running map[string]context.CancelCauseFunc
	results chan result
}

// A result is how an attempt of a step ended.
type result struct {
	name   string
	state  any    // as the step left it
	base   []byte // as it got it
	err    error
	stored error // where the step has stored its own checkpoint: what came of that
	own    bool
}

// forward runs steps until the saga has ended, must go back, has to wait, or is
// no longer in hand.
func (x *exec) forward() error {
	f := &flight{running: make(map[string]context.CancelCauseFunc), results: make(chan result)}
	defer func() { // an error below leaves steps behind: they are told, and waited for
		for _, cancel := range f.running {
			cancel(errGone)
		}
		for range f.running {
			<-f.results
		}
	}()
	for x.status() == Running {
		if why := x.cancelled(); why != "" {
			return x.turn(f, ErrCancelled, fmt.Sprintf("%v: %s", ErrCancelled, why))
		}
		draining := x.t.isDraining()
		var next time.Time
		if !draining {
			var err error
			if next, err = x.launch(f); err != nil {
				return err
			}
		}
		if len(f.running) == 0 && draining {
			return x.release()
		}
		if err := x.next(f, next); err != nil {
			return err
		}
	}
	return nil
}

// cancelled returns why the saga is to be cancelled, or "" if it is not. Once the
// pivot has begun, what comes of it decides.
func (x *exec) cancelled() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.in.atPivot() {
		return ""
	}
	return x.in.Cancel
}

// launch starts the steps that are due, each for itself, and returns when the
// next one is; the zero time if none is known to be.
func (x *exec) launch(f *flight) (next time.Time, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := x.t.now()
	if n := x.in.clone(); x.d.begin(&n, now) || x.d.finished(&n) { // after Retry or Skip, or if the definition has grown
		if x.d.finished(&n) {
			n.Status, n.EndedAt = Done, now
		}
		if err := x.save(n, nil); err != nil || n.Status == Done {
			return next, err
		}
	}
	if len(f.running) == 0 {
		if w := x.waits(&x.in, now); w != nil {
			return next, x.save(x.in.clone(), w)
		}
	}
	for i := range x.in.Steps {
		r := &x.in.Steps[i]
		if _, running := f.running[r.Name]; running || r.Outcome != Begun {
			continue
		}
		st := &x.d.steps[x.d.index[r.Name]]
		_, signalled := x.in.Signals[r.Name]
		due := r.NotBefore.IsZero() || !now.Before(r.NotBefore)
		if st.received != nil && r.Attempts == 0 {
			due = signalled || due && st.wait > 0
		}
		if !due {
			if !r.NotBefore.IsZero() && (next.IsZero() || r.NotBefore.Before(next)) {
				next = r.NotBefore
			}
			continue
		}
		ctx, cancel := context.WithCancelCause(x.t.ctx)
		f.running[r.Name] = cancel
		go x.attempt(ctx, f, st, r.Attempts+1)
	}
	return next, nil
}

// attempt runs a step once.
func (x *exec) attempt(ctx context.Context, f *flight, st *step, n int) {
	res := result{name: st.name}
	defer func() { f.results <- res }()
	if st.sleep {
		return
	}
	if res.state, res.base, res.err = x.copyState(); res.err != nil {
		return
	}
	do := st.do
	if st.received != nil {
		x.mu.Lock()
		payload, here := x.in.Signals[st.name]
		x.mu.Unlock()
		do = func(ctx context.Context, state any) error { return st.received(ctx, state, payload) }
		if !here { // as far as it is known here
			if res.err = x.look(); res.err != nil {
				return
			}
			x.mu.Lock()
			payload, here = x.in.Signals[st.name]
			x.mu.Unlock()
		}
		if !here {
			res.err = Abort(ErrDeadline)
			return
		}
	}
	txn := x.own(&res, func() (Instance, any, error) {
		n := x.in.clone()
		state, err := x.settle(&n, &res)
		return n, state, err
	})
	call := Call{Saga: x.id, Step: st.name, Attempt: n}
	res.err = x.call(ctx, call, st.opts.Timeout, txn, func(ctx context.Context) error { return do(ctx, res.state) })
}

// own lets a step store its own checkpoint, which after returns.
func (x *exec) own(res *result, after func() (Instance, any, error)) *execution.Step {
	var n Instance
	var c Checkpoint
	var state any
	return &execution.Step{
		Runner: x.t.id,
		Prepare: func() (_ any, err error) {
			x.mu.Lock()
			defer func() {
				if err != nil {
					x.mu.Unlock()
				}
			}()
			if n, state, err = after(); err != nil {
				return nil, err
			}
			if c, err = x.checkpoint(n, x.waits(&n, x.t.now())); err != nil {
				return nil, err
			}
			return c, nil
		},
		Done: func(err error) {
			defer x.mu.Unlock()
			if res.own = true; err != nil {
				x.stale, res.stored = true, err
				return
			}
			cancel, signals := x.in.Cancel, x.in.Signals
			res.stored = x.stored(n, c, Ack{Held: true, Cancel: cancel, Signals: signals})
			x.state = state
		},
	}
}

// settle notes in n that a step has ended well, and what begins then. x.mu is
// held.
func (x *exec) settle(n *Instance, res *result) (state any, err error) {
	now := x.t.now()
	r := n.step(res.name)
	if res.state != nil {
		if state, err = x.take(n, res.state, res.base); err != nil {
			return nil, err
		}
	}
	r.Outcome, r.EndedAt, r.NotBefore = OK, now, time.Time{}
	r.Attempts++
	if n.Status == Running {
		if x.d.begin(n, now); x.d.finished(n) {
			n.Status, n.EndedAt = Done, now
		}
	}
	return state, nil
}

// next waits for what happens first, a result among it, and deals with it.
func (x *exec) next(f *flight, at time.Time) error {
	var timer <-chan time.Time
	if !at.IsZero() {
		t := time.NewTimer(max(x.remaining(at), time.Millisecond))
		defer t.Stop()
		timer = t.C
	}
	select {
	case res := <-f.results:
		f.running[res.name](nil)
		delete(f.running, res.name)
		return x.ended(f, res)
	case <-x.kicked:
		_ = x.look() // if it fails, the next checkpoint tells
		return nil
	case <-timer:
		return nil
	case <-x.t.ctx.Done():
		return context.Cause(x.t.ctx)
	}
}

// look finds out what has come for the saga.
func (x *exec) look() error {
	in, err := x.t.r.store.Get(x.t.ctx, x.id)
	if err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.in.Cancel, x.in.Signals = in.Cancel, in.Signals
	return nil
}

// ended deals with the end of an attempt.
func (x *exec) ended(f *flight, res result) error {
	if res.own {
		if x.stale {
			return x.reload()
		}
		return res.stored
	}
	if res.err != nil && x.t.ctx.Err() != nil {
		return context.Cause(x.t.ctx) // it failed because it had to stop
	}
	x.mu.Lock()
	n := x.in.clone()
	state, verdict := x.judge(&n, &res)
	switch verdict {
	case goOn:
		defer x.mu.Unlock()
		if err := x.save(n, x.waits(&n, x.t.now())); err != nil {
			return err
		}
		x.state = state
		return nil
	case goBack:
		x.in = n // turn stores it
		x.mu.Unlock()
		return x.turn(f, errSister, fmt.Sprintf("step %q: %v", res.name, res.err))
	default:
		x.in = n
		x.mu.Unlock()
		if err := x.collect(f); err != nil {
			return err
		}
		return x.stick(fmt.Sprintf("step %q: %v", res.name, res.err))
	}
}

// A verdict is what a step's end means for the saga.
type verdict int

const (
	goOn verdict = iota
	goBack
	getStuck
)

// judge notes in n how an attempt of a step ended. It returns the state, if that
// is known. x.mu is held.
func (x *exec) judge(n *Instance, res *result) (state any, v verdict) {
	now := x.t.now()
	st := &x.d.steps[x.d.index[res.name]]
	unstorable := false
	if res.err == nil {
		state, err := x.settle(n, res)
		if err == nil {
			return state, goOn
		}
		res.err, unstorable = fmt.Errorf("it is done, but: %w", err), true
	}
	r := n.step(res.name)
	var again againError
	if errors.As(res.err, &again) {
		state, err := x.take(n, res.state, res.base)
		if err == nil {
			r.NotBefore, r.Attempts = now.Add(again.after), 0
			if st.received != nil {
				r.Attempts = 1 // its deadline is over
			}
			return state, goOn
		}
		res.err, unstorable = err, true
	}
	r.Attempts, r.Error = r.Attempts+1, text(res.err.Error())
	refused := isAbort(res.err)
	if !unstorable && !refused && (st.opts.MaxAttempts < 0 || r.Attempts < st.opts.MaxAttempts) {
		r.NotBefore = retryAt(now, st.opts.RetryBase, st.opts.RetryMax, r.Attempts)
		return nil, goOn
	}
	r.Outcome, r.EndedAt = Unknown, now
	if unstorable || n.pastPivot() || st.pivot && !refused {
		return nil, getStuck
	}
	if refused {
		r.Outcome = Refused
	}
	return nil, goBack
}

// collect waits for the steps under way and notes in x.in what comes of them,
// for the next checkpoint to store.
func (x *exec) collect(f *flight) error {
	for len(f.running) > 0 {
		res := <-f.results
		f.running[res.name](nil)
		delete(f.running, res.name)
		if res.own {
			if x.stale {
				res.stored = x.reload()
			}
			if res.stored != nil {
				return res.stored
			}
			continue
		}
		x.mu.Lock()
		n := x.in.clone()
		_, _ = x.judge(&n, &res) // the saga turns or is stuck whatever this step says
		x.in, x.state = n, nil
		x.mu.Unlock()
	}
	if x.t.ctx.Err() != nil {
		return context.Cause(x.t.ctx)
	}
	return nil
}

// turn stops what is under way and makes the saga go back.
func (x *exec) turn(f *flight, why error, cause string) error {
	for _, cancel := range f.running {
		cancel(why)
	}
	if err := x.collect(f); err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	n := x.in.clone()
	for i := range n.Steps {
		if r := &n.Steps[i]; r.Outcome == Begun {
			r.Outcome, r.EndedAt, r.NotBefore = Unknown, x.t.now(), time.Time{}
		}
	}
	n.Status, n.Cause = Compensating, text(cause)
	x.state = nil
	return x.save(n, nil)
}

// release gives the saga up for others to go on with.
func (x *exec) release() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.save(x.in.clone(), &waiting{until: x.t.now()})
}
