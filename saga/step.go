package saga

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ashlar-go/ashlar/saga/internal/execution"
)

// A result is how an attempt of a step ended.
type result struct {
	name   string
	state  any    // as the step left it
	base   []byte // as it got it
	err    error
	stored error // where the step has stored its own checkpoint: what came of that
	own    bool
}

// attempt runs a step once.
func (x *exec) attempt(a attempt, res *result) {
	if a.st.sleep {
		return
	}
	if res.state, res.base, res.err = x.copyState(); res.err != nil {
		return
	}
	do := a.st.do
	if a.st.received != nil {
		payload, here, err := x.signal(a.st.name)
		if err != nil || !here {
			if res.err = err; err == nil {
				res.err = Abort(ErrDeadline)
			}
			return
		}
		do = func(ctx context.Context, state any) error { return a.st.received(ctx, state, payload) }
	}
	own := x.own(res, func() (Instance, any, error) {
		n := x.in.clone()
		state, err := x.settle(&n, res)
		return n, state, err
	})
	res.err = &PanicError{} // unless the call returns
	call := Call{Saga: x.id, Step: a.st.name, Attempt: a.n}
	res.err = x.call(a.ctx, call, a.st.opts.Timeout, own, func(ctx context.Context) error { return do(ctx, res.state) })
}

// signal returns what came with a signal, asking the store if nothing is known
// of it here.
func (x *exec) signal(name string) (payload []byte, here bool, err error) {
	for range 2 {
		x.mu.Lock()
		payload, here = x.in.Signals[name]
		x.mu.Unlock()
		if here {
			break
		}
		if err := x.look(); err != nil {
			return nil, false, err
		}
	}
	return payload, here, nil
}

// own lets a step store its own checkpoint, of the saga as after returns it.
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
			c = x.checkpoint(n, x.waits(&n, x.t.now()))
			return c, nil
		},
		Done: func(err error) {
			defer x.mu.Unlock()
			if res.own = true; err != nil {
				x.stale, res.stored = true, err
				return
			}
			res.stored = x.stored(n, c, Ack{Held: true, Cancel: x.in.Cancel, Signals: x.in.Signals})
			x.state = state
		},
	}
}

// settle notes in n that a step has ended well, and what begins then. x.mu is
// held.
func (x *exec) settle(n *Instance, res *result) (state any, err error) {
	now := x.t.now()
	if res.state != nil {
		if state, err = x.take(n, res.state, res.base); err != nil {
			return nil, err
		}
	}
	r := n.step(res.name)
	r.Outcome, r.EndedAt, r.NotBefore = OK, now, time.Time{}
	r.Attempts++
	if n.Status == Running {
		if x.d.begin(n, now); x.d.finished(n) {
			n.Status, n.EndedAt = Done, now
		}
	}
	return state, nil
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
