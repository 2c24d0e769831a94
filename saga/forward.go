package saga

import (
	"context"
	"fmt"
	"time"
)

// forward runs steps until the saga has ended, must go back, has to wait, or is
// no longer in hand.
func (x *exec) forward() error {
	defer func() { // an error below leaves steps behind: they are told, and waited for
		x.tell(errGone)
		for x.busy() > 0 {
			x.landed(<-x.results)
		}
	}()
	for x.status() == Running {
		if res := x.alone; res != nil {
			x.alone = nil
			if err := x.ended(*res); err != nil {
				return err
			}
			continue
		}
		if why := x.cancelled(); why != "" {
			return x.turn(ErrCancelled, fmt.Sprintf("%v: %s", ErrCancelled, why))
		}
		draining := x.t.isDraining()
		if draining && x.busy() == 0 {
			return x.release()
		}
		var next time.Time
		if !draining {
			var err error
			if next, err = x.launch(); err != nil {
				return err
			}
		}
		if x.alone != nil || x.status() != Running {
			continue
		}
		if err := x.next(next); err != nil {
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

// busy returns how many steps are under way.
func (x *exec) busy() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.running)
}

// landed takes a step out of those under way.
func (x *exec) landed(res result) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.running[res.name](nil)
	delete(x.running, res.name)
}

// launch runs the steps that are due: one by itself at once, several each for
// itself. It returns when the next one is due; the zero time if none is known to
// be.
func (x *exec) launch() (next time.Time, err error) {
	due, next, err := x.due()
	if err != nil || len(due) == 0 {
		return next, err
	}
	if len(due) == 1 && x.busy() == 1 && next.IsZero() {
		res := result{name: due[0].st.name}
		defer func() { // it may end the goroutine: then the next one finds its result
			x.landed(res)
			x.alone = &res
		}()
		x.attempt(due[0], &res)
		return next, nil
	}
	for _, a := range due {
		go func() {
			res := result{name: a.st.name}
			defer func() { x.results <- res }()
			x.attempt(a, &res)
		}()
	}
	return next, nil
}

// An attempt is a step that is to be run once.
type attempt struct {
	ctx context.Context
	st  *step
	n   int // from 1
}

// due returns the steps that are to be run now, and counts them as running.
func (x *exec) due() (due []attempt, next time.Time, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := x.t.now()
	if n := x.in.clone(); x.d.begin(&n, now) || x.d.finished(&n) { // after Retry or Skip, or if the definition has grown
		if x.d.finished(&n) {
			n.Status, n.EndedAt = Done, now
		}
		if err := x.save(n, nil); err != nil || n.Status == Done {
			return nil, next, err
		}
	}
	if len(x.running) == 0 {
		if w := x.waits(&x.in, now); w != nil {
			return nil, next, x.save(x.in.clone(), w)
		}
	}
	for i := range x.in.Steps {
		r := &x.in.Steps[i]
		if _, running := x.running[r.Name]; running || r.Outcome != Begun {
			continue
		}
		st := &x.d.steps[x.d.index[r.Name]]
		_, signalled := x.in.Signals[r.Name]
		isDue := r.NotBefore.IsZero() || !now.Before(r.NotBefore)
		if st.received != nil && r.Attempts == 0 {
			isDue = signalled || isDue && st.wait > 0
		}
		if !isDue {
			if !r.NotBefore.IsZero() && (next.IsZero() || r.NotBefore.Before(next)) {
				next = r.NotBefore
			}
			continue
		}
		ctx, cancel := context.WithCancelCause(x.t.ctx)
		x.running[r.Name] = cancel
		due = append(due, attempt{ctx, st, r.Attempts + 1})
	}
	return due, next, nil
}

// next waits for what happens first, a result among it, and deals with it.
func (x *exec) next(at time.Time) error {
	var timer <-chan time.Time
	if !at.IsZero() {
		t := time.NewTimer(max(x.remaining(at), time.Millisecond))
		defer t.Stop()
		timer = t.C
	}
	select {
	case res := <-x.results:
		x.landed(res)
		return x.ended(res)
	case <-x.kicked:
		return nil
	case <-timer:
		return nil
	case <-x.t.ctx.Done():
		return context.Cause(x.t.ctx)
	}
}

// ended deals with the end of an attempt.
func (x *exec) ended(res result) error {
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
		return x.turn(errSister, fmt.Sprintf("step %q: %v", res.name, res.err))
	default:
		x.in = n
		x.mu.Unlock()
		if err := x.collect(); err != nil {
			return err
		}
		return x.stick(fmt.Sprintf("step %q: %v", res.name, res.err))
	}
}

// collect waits for the steps under way and notes in x.in what comes of them,
// for the next checkpoint to store.
func (x *exec) collect() error {
	for x.busy() > 0 {
		res := <-x.results
		x.landed(res)
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
func (x *exec) turn(why error, cause string) error {
	x.tell(why)
	if err := x.collect(); err != nil {
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

// look reads what has come for the saga.
func (x *exec) look() error {
	in, err := x.t.r.store.Get(x.t.ctx, x.id)
	if err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if in.Cancel != "" { // what a checkpoint has told meanwhile may be newer
		x.in.Cancel = in.Cancel
	}
	if len(in.Signals) > len(x.in.Signals) {
		x.in.Signals = in.Signals
	}
	return nil
}
