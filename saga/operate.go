package saga

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// By says who does something to a saga, and why; it is kept with the saga.
type By struct{ Actor, Reason string }

func (by By) audit(action, detail string) *Audit {
	return &Audit{Actor: text(by.Actor), Action: action, Detail: text(detail), Reason: text(by.Reason)}
}

// Get returns a saga as it stands, with its history, or wraps [ErrNotFound].
func (r *Runner) Get(ctx context.Context, id string) (Instance, error) { return r.store.Get(ctx, id) }

// List returns sagas by ID, a page at a time.
func (r *Runner) List(ctx context.Context, q Query) ([]Instance, error) {
	setDefault(&q.Limit, 100)
	return r.store.List(ctx, q)
}

// Wait returns the saga once it has ended or is stuck, without its Audit. Ended
// by a runner elsewhere, it is noticed by polling.
func (r *Runner) Wait(ctx context.Context, id string) (Instance, error) {
	for attempt := 0; ; attempt++ {
		left := make(chan Instance, 1)
		stop := r.listen(id, left)
		if !r.has(id) {
			in, err := r.store.Get(ctx, id)
			if err != nil || settled(in) {
				stop()
				return in, err
			}
		}
		timer := time.NewTimer(backoff.Policy{Max: 250 * time.Millisecond}.Ceiling(attempt))
		var in Instance
		select {
		case in = <-left:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		stop()
		if settled(in) {
			return in, nil
		}
		if ctx.Err() != nil {
			return Instance{}, context.Cause(ctx)
		}
	}
}

func settled(in Instance) bool { return in.Status.Ended() || in.Status == Stuck }

// has reports whether this runner has the saga in hand.
func (r *Runner) has(id string) bool {
	r.mu.Lock()
	t := r.tenure
	r.mu.Unlock()
	return t != nil && t.exec(id) != nil
}

// listen has a saga sent to c when it leaves this runner's hand.
func (r *Runner) listen(id string, c chan Instance) (stop func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiters[id] = append(r.waiters[id], c)
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		cs := slices.DeleteFunc(r.waiters[id], func(other chan Instance) bool { return other == c })
		if r.waiters[id] = cs; len(cs) == 0 {
			delete(r.waiters, id)
		}
	}
}

// left tells those who wait that a saga has left this runner's hand.
func (r *Runner) left(ctx context.Context, in Instance) {
	if f := r.opts.Observer.Settled; f != nil && settled(in) {
		f(context.WithoutCancel(ctx), in)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.waiters[in.ID] {
		c <- in
	}
	delete(r.waiters, in.ID)
}

func (r *Runner) lost(inHand int) {
	if f := r.opts.Observer.Lost; f != nil {
		f(inHand)
	}
}

// edit changes a saga and has this runner look at it.
func (r *Runner) edit(ctx context.Context, id string, f func(*Instance) (*Audit, error)) error {
	if err := r.store.Edit(ctx, id, f); err != nil {
		return fmt.Errorf("saga %s: %w", id, err)
	}
	r.mu.Lock()
	t := r.tenure
	r.mu.Unlock()
	if t != nil {
		if x := t.exec(id); x != nil {
			go x.news()
			return nil
		}
	}
	r.Wake()
	return nil
}

// Signal delivers payload to the saga's Await step of that name. It is kept
// until the step begins, and only the first one counts. A saga that has ended
// takes none: the error wraps [ErrState].
func (r *Runner) Signal(ctx context.Context, id, name string, payload []byte) error {
	if err := validate("signal", name); err != nil {
		return err
	}
	return r.edit(ctx, id, func(in *Instance) (*Audit, error) {
		if in.Status.Ended() {
			return nil, fmt.Errorf("%w: it is %s", ErrState, in.Status)
		}
		if _, there := in.Signals[name]; !there {
			signals := map[string][]byte{name: payload}
			for k, v := range in.Signals {
				signals[k] = v
			}
			in.Signals = signals
		}
		for _, s := range in.Steps {
			if s.Name == name && s.Outcome == Begun && in.Status == Running {
				in.WakeAt = sooner(in.WakeAt)
			}
		}
		return nil, nil
	})
}

// sooner is "now" whatever the clock: a time long ago.
func sooner(time.Time) time.Time { return time.Unix(0, 0) }

// Cancel makes the saga stop and compensate. Steps under way are told by their
// context and count as unknown unless they succeed; a pivot under way decides.
// Past the pivot the error wraps [ErrPastPivot], and of a saga that has ended
// [ErrState]; one that is being compensated stays so.
func (r *Runner) Cancel(ctx context.Context, id string, by By) error {
	return r.edit(ctx, id, func(in *Instance) (*Audit, error) {
		switch {
		case in.Status == Compensating || in.Status == Stuck && in.Cause != "":
			return nil, nil
		case in.Status.Ended():
			return nil, fmt.Errorf("%w: it is %s", ErrState, in.Status)
		case in.pastPivot():
			return nil, ErrPastPivot
		case in.Status == Stuck:
			in.Status, in.Reason = Compensating, ""
			in.Cause = text(fmt.Sprintf("%v: %s", ErrCancelled, by.Reason))
		}
		if in.Cancel = text(by.Reason); in.Cancel == "" {
			in.Cancel = "no reason given"
		}
		in.WakeAt = sooner(in.WakeAt)
		return by.audit("cancel", ""), nil
	})
}

// Retry lets a stuck saga go on with what it is stuck at, with all its attempts
// again.
func (r *Runner) Retry(ctx context.Context, id string, by By) error {
	return r.unstick(ctx, id, "retry", by, func(r *StepRecord) {
		r.Outcome, r.Attempts, r.EndedAt, r.NotBefore = Begun, 0, time.Time{}, time.Time{}
	}, func(u *Undo) { *u = Undo{Outcome: Begun, Error: u.Error} })
}

// Skip lets a stuck saga go on behind what it is stuck at, which a person has
// seen to: a step counts as done, a compensation as made.
func (r *Runner) Skip(ctx context.Context, id string, by By) error {
	return r.unstick(ctx, id, "skip", by, func(r *StepRecord) { r.Outcome = Skipped }, func(u *Undo) { u.Outcome = Skipped })
}

func (r *Runner) unstick(ctx context.Context, id, action string, by By, step func(*StepRecord), undo func(*Undo)) error {
	return r.edit(ctx, id, func(in *Instance) (*Audit, error) {
		if in.Status != Stuck {
			return nil, fmt.Errorf("%w: it is %s, not stuck", ErrState, in.Status)
		}
		at := ""
		for i := range in.Steps {
			s := &in.Steps[i]
			if in.Cause == "" && s.Outcome == Unknown {
				at = s.Name
				step(s)
			}
			if s.Undo != nil && s.Undo.Outcome == Unknown {
				at = "compensation of " + s.Name
				undo(s.Undo)
			}
		}
		if at == "" && action == "skip" {
			return nil, fmt.Errorf("%w: it is stuck at no step: %s", ErrState, in.Reason)
		}
		in.Status = Running
		if in.Cause != "" {
			in.Status = Compensating
		}
		in.Reason, in.Deaths, in.WakeAt = "", 0, sooner(in.WakeAt)
		return by.audit(action, at), nil
	})
}

// Resolve ends a stuck saga as [Done] or [Compensated], whatever is left to do:
// a person has seen to it.
func (r *Runner) Resolve(ctx context.Context, id string, as Status, by By) error {
	if !as.Ended() {
		return fmt.Errorf("%w: a saga is resolved as %s or %s, not as %q", ErrInvalid, Done, Compensated, as)
	}
	return r.edit(ctx, id, func(in *Instance) (*Audit, error) {
		if in.Status != Stuck {
			return nil, fmt.Errorf("%w: it is %s, not stuck", ErrState, in.Status)
		}
		in.Status, in.Reason, in.WakeAt = as, "", time.Time{}
		return by.audit("resolve", string(as)), nil
	})
}
