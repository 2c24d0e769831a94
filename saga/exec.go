package saga

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/saga/internal/execution"
)

// holdFor is how long a saga that has to wait stays in hand: to give it up and
// take it in hand again costs two writes.
const holdFor = time.Second

var (
	errGone   = errors.New("saga: no longer in hand")
	errSister = errors.New("saga: another branch failed")
)

// An exec runs one saga that is in hand.
type exec struct {
	t      *tenure
	d      *definition
	id     string
	kicked chan struct{} // there is something new: a cancellation, a signal, the drain
	opened bool

	results chan result // of steps that run side by side
	alone   *result     // of a step that ran by itself

	mu      sync.Mutex // held while a checkpoint is made and stored
	in      Instance   // as it is stored
	state   any        // in.State decoded, for the next step to work on; nil if unknown
	stale   bool       // a checkpoint may be stored or not: in must be read anew
	running map[string]context.CancelCauseFunc
}

func (x *exec) kick() {
	select {
	case x.kicked <- struct{}{}:
	default:
	}
}

// news reads what has come for the saga, and tells the steps under way if it is
// to be cancelled.
func (x *exec) news() {
	if x.look() != nil {
		return // the next checkpoint tells
	}
	if x.cancelled() != "" {
		x.tell(ErrCancelled)
	}
	x.kick()
}

// tell ends the contexts of the steps under way.
func (x *exec) tell(why error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, cancel := range x.running {
		cancel(why)
	}
}

// run drives the saga until it has ended, has to wait, or is another's.
func (x *exec) run() {
	returned := false
	defer func() {
		if !returned { // a step has called runtime.Goexit
			go x.run()
			return
		}
		x.mu.Lock()
		in := x.in
		x.mu.Unlock()
		x.t.free(x.id)
		x.t.r.left(x.t.ctx, in)
	}()
	x.drive()
	returned = true
}

func (x *exec) drive() {
	var err error
	if !x.opened {
		x.opened = true
		err = x.open()
	}
	for err == nil {
		switch x.status() {
		case Running:
			err = x.forward()
		case Compensating:
			err = x.backward()
		default:
			return
		}
	}
	if !errors.Is(err, errGone) && x.t.ctx.Err() == nil {
		x.t.r.opts.Logger.WarnContext(x.t.ctx, "saga: dropped", "saga", x.in.Saga, "id", x.in.ID, "error", err)
	}
}

// open makes the saga ready to run.
func (x *exec) open() error {
	if x.in.Deaths > x.t.r.opts.MaxDeaths {
		return x.stick(fmt.Sprintf("%d runners in a row died with it in hand", x.in.Deaths))
	}
	if err := x.d.check(&x.in); err != nil {
		return x.stick(err.Error())
	}
	var err error
	if x.state, err = x.d.decode(x.in.State, x.in.Version); err != nil {
		return x.stick(fmt.Sprintf("%v: its state: %v", ErrIncompatible, err))
	}
	if x.in.Version != x.d.version {
		b, err := x.d.encode(x.state)
		if err != nil {
			return x.stick(fmt.Sprintf("%v: its state: %v", ErrIncompatible, err))
		}
		x.in.State, x.in.Version = b, x.d.version
	}
	return nil
}

func (x *exec) status() Status {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.in.Status
}

// stick makes the saga stuck as it is.
func (x *exec) stick(reason string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	n := x.in.clone()
	n.Status, n.Reason = Stuck, text(reason)
	return x.save(n, nil)
}

// save stores n in place of x.in, and takes note of what came meanwhile. wait is
// nil if the saga stays in hand. x.mu is held.
func (x *exec) save(n Instance, wait *waiting) error {
	c := x.checkpoint(n, wait)
	ack, err := x.t.saves.do(x.t.ctx, c)
	if err != nil {
		return err
	}
	if ack.invalid != nil {
		if n.Status == Stuck {
			return ack.invalid
		}
		n = x.in.clone()
		n.Status, n.Reason = Stuck, text(ack.invalid.Error())
		return x.save(n, nil)
	}
	return x.stored(n, c, ack)
}

// stored takes note that n is stored.
func (x *exec) stored(n Instance, c Checkpoint, ack Ack) error {
	if !ack.Held {
		return errGone
	}
	n.Cancel, n.Signals, n.Deaths = ack.Cancel, ack.Signals, 0
	x.in = n
	if c.Release && !settled(n) {
		return errGone
	}
	return nil
}

// checkpoint returns what is to be stored of n.
func (x *exec) checkpoint(n Instance, wait *waiting) Checkpoint {
	c := Checkpoint{
		ID: n.ID, Version: n.Version, Status: n.Status, State: n.State, Steps: n.Steps,
		Cause: n.Cause, Reason: n.Reason, Cancel: n.Cancel,
	}
	switch {
	case settled(n):
		c.Release = true
	case wait != nil:
		c.Release, c.WakeAt, c.Await = true, wait.until, wait.signals
	}
	return c
}

// A waiting is what a saga waits for.
type waiting struct {
	until   time.Time // zero: without end
	signals []string
}

// waits returns what n waits for, or nil if there is something to do, or so soon
// that it stays in hand.
func (x *exec) waits(n *Instance, now time.Time) *waiting {
	w := &waiting{}
	soon := func(at time.Time) bool {
		if w.until.IsZero() || at.Before(w.until) {
			w.until = at
		}
		return at.Sub(now) <= holdFor
	}
	if n.Status == Compensating {
		todo := x.d.undos(n)
		if len(todo) == 0 || n.Steps[todo[0]].Undo == nil || soon(n.Steps[todo[0]].Undo.NotBefore) {
			return nil
		}
		return w
	}
	for i := range n.Steps {
		r := &n.Steps[i]
		if r.Outcome != Begun {
			continue
		}
		st := &x.d.steps[x.d.index[r.Name]]
		if st.received != nil && r.Attempts == 0 {
			if _, here := n.Signals[r.Name]; here || !r.NotBefore.IsZero() && !now.Before(r.NotBefore) {
				return nil
			}
			w.signals = append(w.signals, r.Name)
			if !r.NotBefore.IsZero() {
				soon(r.NotBefore) // but it is not held: the signal may come from elsewhere
			}
			continue
		}
		if r.NotBefore.IsZero() || soon(r.NotBefore) {
			return nil
		}
	}
	return w
}

// copyState returns a state for a step to work on, and what it is stored as.
func (x *exec) copyState() (state any, base []byte, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	base = x.in.State
	if state = x.state; state != nil {
		x.state = nil
		return state, base, nil
	}
	state, err = x.d.decode(base, x.in.Version)
	return state, base, err
}

// take puts a state that a step has changed, and which it got as base, into n.
// x.mu is held.
func (x *exec) take(n *Instance, state any, base []byte) (any, error) {
	if !bytes.Equal(base, n.State) { // a step beside it has changed the state
		was, err := x.d.decode(base, n.Version)
		if err != nil {
			return nil, err
		}
		current, err := x.d.decode(n.State, n.Version)
		if err != nil {
			return nil, err
		}
		if err := merge(was, state, current); err != nil {
			return nil, err
		}
		state = current
	}
	b, err := x.d.encode(state)
	if err != nil {
		return nil, fmt.Errorf("saga: the state cannot be stored: %w", err)
	}
	n.State = b
	return state, nil
}

// reload reads the saga anew when it is not known what is stored.
func (x *exec) reload() error {
	for attempt := 0; ; attempt++ {
		in, err := x.t.r.store.Get(x.t.ctx, x.id)
		switch {
		case err == nil && in.Owner == x.t.id:
			x.mu.Lock()
			x.in, x.state, x.stale = in, nil, false
			x.mu.Unlock()
			return nil
		case err == nil, errors.Is(err, ErrNotFound):
			return errGone
		}
		if err := backoff.Sleep(x.t.ctx, backoff.Policy{}.Next(attempt)); err != nil {
			return err
		}
	}
}

// call calls a step's function, and isolates its panic.
func (x *exec) call(ctx context.Context, c Call, timeout time.Duration, own *execution.Step, f func(context.Context) error) (err error) {
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, callKey{}, c), timeout)
	start, returned := time.Now(), false
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Value: v, Stack: debug.Stack()}
		} else if !returned {
			err = &PanicError{}
		}
		cancel()
		if o := x.t.r.opts.Observer.Stepped; o != nil {
			x.mu.Lock()
			in := x.in
			x.mu.Unlock()
			o(ctx, in, c, err, time.Since(start))
		}
	}()
	err = f(execution.With(ctx, own))
	returned = true
	return err
}

// retryAt returns when the next attempt of something may begin that failed for
// the nth time.
func retryAt(now time.Time, base, limit time.Duration, failures int) time.Time {
	return now.Add(backoff.Policy{Base: base, Max: limit}.Next(failures - 1))
}

// remaining reports how long to wait for t by the store's clock.
func (x *exec) remaining(t time.Time) time.Duration {
	if t.IsZero() {
		return 0
	}
	return t.Sub(x.t.now())
}
