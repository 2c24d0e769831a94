package schedule

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/schedule/internal/execution"
)

// start executes a run that was claimed, of which it holds the lease until
// deadline.
func (l *loop) start(ctx context.Context, run Run, deadline time.Time) {
	base, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	l.mu.Lock()
	id := l.started
	l.started++
	l.total++
	l.running[run.Schedule.Name]++
	l.cancels[id] = cancel
	l.mu.Unlock()
	ref := Ref{run.ID, run.Attempt}
	l.keeper.add(ref, deadline, cancel)
	l.wg.Go(func() {
		again := l.exec(base, run, ctx.Err() != nil)
		l.keeper.remove(ref)
		cancel(nil)
		l.mu.Lock()
		delete(l.cancels, id)
		l.total--
		if l.running[run.Schedule.Name]--; l.running[run.Schedule.Name] == 0 {
			delete(l.running, run.Schedule.Name)
		}
		again = again || l.full || l.total == l.r.opts.Concurrency-1 || l.running[run.Schedule.Name] == l.perSchedule()-1
		l.mu.Unlock()
		if again {
			signal(l.freed)
		}
	})
}

// exec calls the handler and records the outcome. It reports whether there may
// be more to do for the schedule.
func (l *loop) exec(ctx context.Context, run Run, draining bool) (again bool) {
	o := &l.r.opts.Observer
	if draining { // claimed while ctx ended
		again, _ = l.finish(ctx, run, Outcome{State: Waiting}) // if not recorded, the lease ends
		return again
	}
	held, recorded := execution.With(ctx)
	if d := run.Schedule.Timeout; d > 0 {
		var cancel context.CancelFunc
		held, cancel = context.WithTimeout(held, d)
		defer cancel()
	}
	if o.Started != nil {
		o.Started(ctx, run)
	}
	start := time.Now()
	err := call(held, l.handlers[run.Schedule.Handler], run)
	took := time.Since(start)

	outcome := l.outcome(ctx, run, err)
	if r := recorded(); r != nil {
		outcome, again = Outcome{State: Done}, r.More
	} else if again, err = l.record(ctx, run, outcome, err); err != nil && errors.Is(err, errNotRecorded) {
		if o.Lost != nil {
			o.Lost(ctx, run, err)
		}
		return again
	}
	if o.Finished != nil {
		o.Finished(ctx, run, outcome.State, err, took)
	}
	return again || outcome.State == Waiting
}

var errNotRecorded = errors.New("schedule: outcome not recorded")

// record records an outcome, and returns cause, or why it could not.
func (l *loop) record(ctx context.Context, run Run, o Outcome, cause error) (more bool, err error) {
	if more, err = l.finish(ctx, run, o); err == nil {
		return more, cause
	}
	l.r.opts.Logger.WarnContext(ctx, "schedule: outcome not recorded, the run may be repeated",
		"schedule", run.Schedule.Name, "run", run.ID, "state", o.State, "error", err)
	return false, fmt.Errorf("%w: %w", errNotRecorded, err)
}

// call turns everything but a return without error into an error.
func call(ctx context.Context, h Handler, run Run) error {
	result := make(chan error, 1)
	go func() { // of its own, for a handler may call runtime.Goexit
		err := errors.New("the handler has exited its goroutine")
		defer func() {
			if v := recover(); v != nil {
				err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
			}
			result <- err
		}()
		err = h(ctx, run)
	}()
	return <-result
}

// outcome tells what is to be recorded of an attempt.
func (l *loop) outcome(ctx context.Context, run Run, err error) Outcome {
	d, cause := &run.Schedule, context.Cause(ctx)
	interrupted := errors.Is(cause, errDraining) || errors.Is(cause, ErrLeaseLost)
	switch {
	case err == nil:
		return Outcome{State: Done}
	case interrupted && d.AtMostOnce:
		return Outcome{State: Lost, Err: text(err)}
	case interrupted:
		return Outcome{State: Waiting}
	case run.Failures+1 < d.Attempts:
		wait := backoff.Policy{Base: d.RetryBase, Max: d.RetryMax}.Next(run.Failures)
		return Outcome{State: Waiting, Err: text(err), RetryIn: wait}
	}
	return Outcome{State: Failed, Err: text(err)}
}

// text is what of an error is kept.
func text(err error) string {
	s := strings.ToValidUTF8(strings.ReplaceAll(err.Error(), "\x00", ""), "")
	if len(s) > 4096 {
		s = strings.ToValidUTF8(s[:4096], "")
	}
	if s == "" {
		s = "error without a text"
	}
	return s
}

// finish repeats until the outcome is recorded or refused.
func (l *loop) finish(ctx context.Context, run Run, o Outcome) (more bool, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.r.opts.FinishTimeout)
	defer cancel()
	for attempt := 0; ; attempt++ {
		more, err = l.r.store.Finish(ctx, Ref{run.ID, run.Attempt}, o)
		if err == nil || errors.Is(err, ErrLeaseLost) || backoff.Sleep(ctx, backoff.Policy{Max: 500 * time.Millisecond}.Next(attempt)) != nil {
			return more, err
		}
	}
}

// drain waits for the runs that are executed.
func (l *loop) drain() error {
	done := make(chan struct{})
	go func() { l.wg.Wait(); close(done) }()
	wait := func(d time.Duration) bool {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-done:
			return true
		case <-t.C:
			return false
		}
	}
	if wait(l.r.opts.DrainTimeout) {
		return nil
	}
	l.mu.Lock()
	for _, cancel := range l.cancels {
		cancel(errDraining)
	}
	l.mu.Unlock()
	// They return within a FinishTimeout and record that within another.
	if wait(2 * l.r.opts.FinishTimeout) {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Errorf("schedule: %d handlers go on although their context has ended", l.total)
}
