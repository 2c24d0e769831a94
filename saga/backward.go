package saga

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// backward compensates, one step after the other, until the saga has ended, has
// to wait, or is no longer in hand.
func (x *exec) backward() error {
	for x.status() == Compensating {
		if x.t.isDraining() {
			return x.release()
		}
		todo := x.d.undos(&x.in)
		if len(todo) == 0 {
			x.mu.Lock()
			n := x.in.clone()
			n.Status, n.EndedAt = Compensated, x.t.now()
			err := x.save(n, nil)
			x.mu.Unlock()
			return err
		}
		r := &x.in.Steps[todo[0]]
		if r.Undo != nil && !r.Undo.NotBefore.IsZero() {
			if err := x.pause(r.Undo.NotBefore); err != nil {
				return err
			}
			if x.remaining(r.Undo.NotBefore) > 0 {
				continue // it was woken up for another reason
			}
		}
		if err := x.undo(todo[0]); err != nil {
			return err
		}
	}
	return nil
}

// pause waits until a time, in hand or not.
func (x *exec) pause(until time.Time) error {
	left := x.remaining(until)
	if left <= 0 {
		return nil
	}
	if left > holdFor {
		x.mu.Lock()
		defer x.mu.Unlock()
		return x.save(x.in.clone(), &waiting{until: until})
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-x.kicked:
		return nil
	case <-x.t.ctx.Done():
		return context.Cause(x.t.ctx)
	}
}

// undo runs the compensation of a step once.
func (x *exec) undo(i int) error {
	name := x.in.Steps[i].Name
	st := &x.d.steps[x.d.index[name]]
	attempts := 0
	if u := x.in.Steps[i].Undo; u != nil {
		attempts = u.Attempts
	}
	res := result{name: name}
	begun := x.t.now()
	// after returns the saga as it is when the compensation has ended well.
	after := func() (Instance, any, error) {
		n := x.in.clone()
		state, err := x.take(&n, res.state, res.base)
		if err != nil {
			return n, nil, err
		}
		n.Steps[i].Undo = &Undo{Outcome: OK, Attempts: attempts + 1, BegunAt: begun, EndedAt: x.t.now()}
		if len(x.d.undos(&n)) == 0 {
			n.Status, n.EndedAt = Compensated, x.t.now()
		}
		return n, state, nil
	}
	if res.state, res.base, res.err = x.copyState(); res.err != nil {
		return x.stick(res.err.Error())
	}
	call := Call{Saga: x.id, Step: name, Compensating: true, Attempt: attempts + 1}
	returned := make(chan error, 1)
	go func() {
		err := error(&PanicError{}) // unless the call returns
		defer func() { returned <- err }()
		err = x.call(x.t.ctx, call, st.opts.UndoTimeout, x.own(&res, after), func(ctx context.Context) error { return st.undo(ctx, res.state) })
	}()
	err := <-returned
	if res.own {
		if x.stale {
			return x.reload()
		}
		return res.stored
	}
	if err != nil && x.t.ctx.Err() != nil {
		return context.Cause(x.t.ctx)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if err == nil {
		n, state, failed := after()
		if failed == nil {
			if err := x.save(n, nil); err != nil {
				return err
			}
			x.state = state
			return nil
		}
		err = Abort(fmt.Errorf("%w: its outcome cannot be stored", failed))
	}
	n := x.in.clone()
	u := &Undo{Outcome: Begun, Attempts: attempts + 1, Error: text(err.Error()), BegunAt: begun}
	n.Steps[i].Undo = u
	var again againError
	switch {
	case errors.As(err, &again):
		if _, err := x.take(&n, res.state, res.base); err != nil {
			return err
		}
		u.Attempts, u.Error, u.NotBefore = 0, "", x.t.now().Add(again.after)
	case isAbort(err) || u.Attempts >= st.opts.UndoMaxAttempts:
		u.Outcome, u.EndedAt = Unknown, x.t.now()
		n.Status, n.Reason = Stuck, text(fmt.Sprintf("compensation of step %q: %v", name, err))
	default:
		u.NotBefore = retryAt(x.t.now(), st.opts.RetryBase, st.opts.RetryMax, u.Attempts)
	}
	return x.save(n, x.waits(&n, x.t.now()))
}
