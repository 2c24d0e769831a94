package sagatest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/saga"
)

var errBroken = errors.New("broken")

func start(t *testing.T, r *saga.Runner, s *saga.Saga[S], id string) {
	t.Helper()
	started, err := s.Start(t.Context(), r, id, S{})
	must(t, err)
	if !started {
		t.Fatalf("%s was there before", id)
	}
}

func testForward(t *testing.T, store saga.Store) {
	var j journal
	s := saga.New[S]("a", 1).
		Step("one", func(ctx context.Context, s *S) error {
			c := saga.CurrentCall(ctx)
			j.add("one %s %d", c.Key(), c.Attempt)
			s.A = 1
			return nil
		}, j.undo("one"), nil).
		Step("two", func(ctx context.Context, s *S) error {
			j.add("two after %d", s.A)
			s.B = 2
			return nil
		}, j.undo("two"), nil).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	in := settled(t, r, "x", saga.Done)
	j.want(t, "one x/one 1", "two after 1")
	if state, err := s.State(in); err != nil || state.A != 1 || state.B != 2 {
		t.Errorf("state %+v, %v", state, err)
	}
	in, err := r.Get(t.Context(), "x")
	must(t, err)
	if in.EndedAt.IsZero() || len(in.Steps) != 2 || in.Steps[1].Outcome != saga.OK || in.Steps[1].Attempts != 1 || in.Steps[1].EndedAt.IsZero() {
		t.Errorf("history %+v", in)
	}
}

func testUndoIsOnRecord(t *testing.T, store saga.Store) {
	var r *saga.Runner
	seen := make(chan string, 2)
	look := func(ctx context.Context, _ *S) error {
		c := saga.CurrentCall(ctx)
		in, err := r.Get(ctx, c.Saga)
		if err != nil {
			return err
		}
		last := in.Steps[len(in.Steps)-1]
		seen <- fmt.Sprint(last.Name, " ", last.Outcome)
		return nil
	}
	none := func(context.Context, *S) error { return nil }
	s := saga.New[S]("a", 1).Step("one", look, none, nil).Step("two", look, none, nil).Build()
	r, _ = run(t, store, quick(), s)
	start(t, r, s, "x")
	settled(t, r, "x", saga.Done)
	if got := <-seen + ", " + <-seen; got != "one begun, two begun" {
		t.Errorf("on record while the steps ran: %s", got)
	}
}

func testRefused(t *testing.T, store saga.Store) {
	var j journal
	s := saga.New[S]("a", 1).
		Step("one", j.do("one"), j.undo("one"), nil).
		Step("two", j.do("two"), j.undo("two"), nil).
		Step("three", j.do("three", saga.Abort(errBroken)), j.undo("three"), nil).
		Step("four", j.do("four"), j.undo("four"), nil).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	in := settled(t, r, "x", saga.Compensated)
	j.want(t, "one", "two", "three fails", "undo two", "undo one")
	if in.Steps[2].Outcome != saga.Refused || in.Steps[0].Undo == nil || in.Steps[0].Undo.Outcome != saga.OK || !strings.Contains(in.Cause, "three") {
		t.Errorf("history %+v, cause %q", in.Steps, in.Cause)
	}
}

func testUnknown(t *testing.T, store saga.Store) {
	var j journal
	s := saga.New[S]("a", 1).
		Step("one", j.do("one"), j.undo("one", errBroken), hasty).
		Step("two", j.do("two", errBroken, errBroken, errBroken), j.undo("two"), hasty).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	in := settled(t, r, "x", saga.Compensated)
	j.want(t, "one", "two fails", "two fails", "two fails", "undo two", "undo one fails", "undo one")
	if st := in.Steps[1]; st.Outcome != saga.Unknown || st.Attempts != 3 || st.Error == "" {
		t.Errorf("history %+v", in.Steps)
	}
}

func testForgotten(t *testing.T, store saga.Store) {
	s := saga.New[S]("a", 1).
		Step("one", func(ctx context.Context, s *S) error {
			s.A++
			s.M = map[string]int{"attempt": saga.CurrentCall(ctx).Attempt}
			if saga.CurrentCall(ctx).Attempt < 3 {
				return errBroken
			}
			return nil
		}, nil, hasty).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	state, err := s.State(settled(t, r, "x", saga.Done))
	if err != nil || state.A != 1 || state.M["attempt"] != 3 {
		t.Errorf("state %+v, %v", state, err)
	}
}

func pivotSaga(j *journal, pivot, after saga.Func[S]) *saga.Saga[S] {
	return saga.New[S]("a", 1).
		Step("one", j.do("one"), j.undo("one"), hasty).
		Pivot("pivot", pivot, hasty).
		Step("after", after, hasty).
		Build()
}

func testPivot(t *testing.T, store saga.Store) {
	var j journal
	s := pivotSaga(&j, j.do("pivot", errBroken, saga.Abort(errBroken)), j.do("after"))
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	settled(t, r, "x", saga.Compensated)
	start(t, r, s, "y")
	settled(t, r, "y", saga.Done)
	j.want(t, "one", "pivot fails", "pivot fails", "undo one", "one", "pivot", "after")
}

func testPivotUnknown(t *testing.T, store saga.Store) {
	ctx, by := t.Context(), saga.By{Actor: "ops", Reason: "asked the bank"}
	for _, c := range []struct {
		action string
		then   func(r *saga.Runner) error
		want   saga.Status
		does   []string
	}{
		{"retry", func(r *saga.Runner) error { return r.Retry(ctx, "retry", by) }, saga.Done, []string{"pivot", "after"}},
		{"skip", func(r *saga.Runner) error { return r.Skip(ctx, "skip", by) }, saga.Done, []string{"after"}},
		{"cancel", func(r *saga.Runner) error { return r.Cancel(ctx, "cancel", by) }, saga.Compensated, []string{"undo one"}},
		{"resolve", func(r *saga.Runner) error { return r.Resolve(ctx, "resolve", saga.Done, by) }, saga.Done, nil},
	} {
		var j journal
		s := pivotSaga(&j, j.do("pivot", errBroken, errBroken, errBroken), j.do("after"))
		r, stop := run(t, store, quick(), s)
		start(t, r, s, c.action)
		in := settled(t, r, c.action, saga.Stuck)
		if !strings.Contains(in.Reason, "pivot") || !strings.Contains(in.Reason, "broken") {
			t.Errorf("reason %q", in.Reason)
		}
		wantErr(t, r.Resolve(ctx, c.action, saga.Running, by), saga.ErrInvalid)
		must(t, c.then(r))
		eventually(t, "the end after "+c.action, func() bool {
			in, err := r.Get(ctx, c.action)
			return err == nil && in.Status.Ended()
		})
		settled(t, r, c.action, c.want)
		j.want(t, append([]string{"one", "pivot fails", "pivot fails", "pivot fails"}, c.does...)...)
		in, err := r.Get(ctx, c.action)
		must(t, err)
		if len(in.Audit) != 1 || in.Audit[0].Action != c.action || in.Audit[0].Actor != "ops" || in.Audit[0].Reason != by.Reason {
			t.Errorf("audit %+v", in.Audit)
		}
		wantErr(t, r.Retry(ctx, c.action, by), saga.ErrState)
		stop()
	}
}

func testAfterThePivot(t *testing.T, store saga.Store) {
	var j journal
	s := saga.New[S]("a", 1).
		Pivot("pivot", j.do("pivot"), nil).
		Step("after", j.do("after", errBroken, errBroken, errBroken, errBroken, errBroken, errBroken, errBroken),
			&saga.StepOptions{RetryBase: time.Millisecond, RetryMax: time.Millisecond}).
		Step("last", j.do("last", saga.Abort(errBroken)), nil).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	in := settled(t, r, "x", saga.Stuck)
	if len(j.all()) != 10 || in.Cause != "" {
		t.Errorf("did %q, cause %q", j.all(), in.Cause)
	}
	wantErr(t, r.Cancel(t.Context(), "x", saga.By{}), saga.ErrPastPivot)
	must(t, r.Retry(t.Context(), "x", saga.By{Actor: "ops"}))
	eventually(t, "the end", func() bool { in, err := r.Get(t.Context(), "x"); return err == nil && in.Status == saga.Done })
}

func testCompensationStuck(t *testing.T, store saga.Store) {
	ctx := t.Context()
	var j journal
	s := saga.New[S]("a", 1).
		Step("one", j.do("one"), j.undo("one"), hasty).
		Step("two", j.do("two"), j.undo("two", errBroken, errBroken, errBroken, saga.Abort(errBroken)), hasty).
		Step("three", j.do("three", saga.Abort(errBroken)), nil, nil).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	in := settled(t, r, "x", saga.Stuck)
	if !strings.Contains(in.Reason, "compensation") || in.Steps[1].Undo.Attempts != 3 {
		t.Errorf("reason %q, steps %+v", in.Reason, in.Steps)
	}
	must(t, r.Retry(ctx, "x", saga.By{Actor: "ops"}))
	eventually(t, "it to be stuck again", func() bool {
		in, err := r.Get(ctx, "x")
		return err == nil && in.Status == saga.Stuck && len(j.all()) == 7
	})
	must(t, r.Skip(ctx, "x", saga.By{Actor: "ops"}))
	eventually(t, "the end", func() bool { in, err := r.Get(ctx, "x"); return err == nil && in.Status.Ended() })
	in = settled(t, r, "x", saga.Compensated)
	if in.Steps[1].Undo.Outcome != saga.Skipped || j.all()[7] != "undo one" {
		t.Errorf("did %q, steps %+v", j.all(), in.Steps)
	}
}

func testParallel(t *testing.T, store saga.Store) {
	var j journal
	a, b := make(chan struct{}), make(chan struct{})
	s := saga.New[S]("a", 1).
		Step("first", j.do("first"), nil, nil).
		Parallel(
			func(d *saga.Draft[S]) {
				d.Step("a1", func(_ context.Context, s *S) error {
					close(a)
					<-b // runs while b1 does
					s.A, s.M = 1, map[string]int{"a": 1}
					return nil
				}, nil, nil).
					Step("a2", func(_ context.Context, s *S) error { s.A++; return nil }, nil, nil)
			},
			func(d *saga.Draft[S]) {
				d.Step("b1", func(_ context.Context, s *S) error {
					close(b)
					<-a
					s.B, s.M = 5, map[string]int{"b": 2}
					return nil
				}, nil, nil)
			},
		).
		Step("join", func(_ context.Context, s *S) error { s.C = s.A*10 + s.B; return nil }, nil, nil).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	state, err := s.State(settled(t, r, "x", saga.Done))
	if err != nil || state.A != 2 || state.B != 5 || state.C != 25 || len(state.M) != 2 {
		t.Errorf("state %+v, %v", state, err)
	}
}

func testParallelFailure(t *testing.T, store saga.Store) {
	var j journal
	running := make(chan struct{})
	s := saga.New[S]("a", 1).
		Step("first", j.do("first"), j.undo("first"), nil).
		Parallel(
			func(d *saga.Draft[S]) {
				d.Step("slow", func(ctx context.Context, _ *S) error {
					close(running)
					<-ctx.Done() // told that the other branch failed
					return ctx.Err()
				}, j.undo("slow"), nil)
			},
			func(d *saga.Draft[S]) {
				d.Step("bad", func(context.Context, *S) error { <-running; return saga.Abort(errBroken) }, j.undo("bad"), nil)
			},
		).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	settled(t, r, "x", saga.Compensated)
	j.want(t, "first", "undo slow", "undo first")
}

func testParallelConflict(t *testing.T, store saga.Store) {
	meet := make(chan struct{})
	set := func(v int) func(d *saga.Draft[S]) {
		return func(d *saga.Draft[S]) {
			d.Step(fmt.Sprint("set ", v), func(_ context.Context, s *S) error {
				select { // both have begun
				case meet <- struct{}{}:
				case <-meet:
				}
				s.A = v
				return nil
			}, nil, nil)
		}
	}
	s := saga.New[S]("a", 1).Parallel(set(1), set(2)).Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	if in := settled(t, r, "x", saga.Stuck); !strings.Contains(in.Reason, "field A") {
		t.Errorf("reason %q", in.Reason)
	}
}

func testSleep(t *testing.T, store saga.Store) {
	var j journal
	s := saga.New[S]("a", 1).Sleep("short", 30*time.Millisecond).Sleep("long", 1200*time.Millisecond).Step("two", j.do("two"), nil, nil).Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	eventually(t, "it to be given up", func() bool {
		in, err := r.Get(t.Context(), "x")
		return err == nil && in.Owner == "" && in.Status == saga.Running
	})
	in := settled(t, r, "x", saga.Done)
	if d := in.Steps[1].EndedAt.Sub(in.Steps[1].BegunAt); d < 1200*time.Millisecond {
		t.Errorf("slept %v", d)
	}
	j.want(t, "two")
}

func testAwait(t *testing.T, store saga.Store) {
	ctx := t.Context()
	s := saga.New[S]("a", 1).
		Await("early", func(_ context.Context, s *S, payload []byte) error { s.A = len(payload); return nil }, nil).
		Await("late", func(ctx context.Context, s *S, payload []byte) error {
			if saga.CurrentCall(ctx).Attempt == 1 {
				return errBroken // tried again, with the same payload
			}
			s.M = map[string]int{string(payload): 1}
			return nil
		}, &saga.AwaitOptions{Deadline: time.Hour}).
		Build()
	client := saga.NewRunner(store, nil, nil) // as another process
	_, err := s.Start(ctx, client, "x", S{})
	must(t, err)
	must(t, client.Signal(ctx, "x", "early", []byte("123")))
	must(t, client.Signal(ctx, "x", "early", []byte("45")))
	r, _ := run(t, store, quick(), s)
	eventually(t, "it to wait", func() bool {
		in, err := r.Get(ctx, "x")
		return err == nil && in.Owner == "" && len(in.Steps) == 2
	})
	must(t, client.Signal(ctx, "x", "late", []byte("key")))
	state, err := s.State(settled(t, r, "x", saga.Done))
	if err != nil || state.A != 3 || state.M["key"] != 1 {
		t.Errorf("state %+v, %v", state, err)
	}
	wantErr(t, client.Signal(ctx, "x", "late", nil), saga.ErrState)
	wantErr(t, client.Signal(ctx, "none", "late", nil), saga.ErrNotFound)
	wantErr(t, client.Signal(ctx, "x", "", nil), saga.ErrInvalid)
}

func testAwaitDeadline(t *testing.T, store saga.Store) {
	var j journal
	s := saga.New[S]("a", 1).
		Step("one", j.do("one"), j.undo("one"), nil).
		Await("never", nil, &saga.AwaitOptions{Deadline: 50 * time.Millisecond}).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	in := settled(t, r, "x", saga.Compensated)
	j.want(t, "one", "undo one")
	if !strings.Contains(in.Cause, saga.ErrDeadline.Error()) {
		t.Errorf("cause %q", in.Cause)
	}
}

func testAgain(t *testing.T, store saga.Store) {
	s := saga.New[S]("a", 1).
		Step("ask", func(_ context.Context, s *S) error {
			if s.A++; s.A < 8 { // more often than MaxAttempts
				return saga.Again(time.Millisecond)
			}
			return nil
		}, nil, hasty).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	in := settled(t, r, "x", saga.Done)
	if state, err := s.State(in); err != nil || state.A != 8 {
		t.Errorf("state %+v, %v", state, err)
	}
}

func testPanic(t *testing.T, store saga.Store) {
	var j journal
	s := saga.New[S]("a", 1).
		Step("one", j.do("one"), func(ctx context.Context, _ *S) error {
			if saga.CurrentCall(ctx).Attempt == 1 {
				panic("oh no")
			}
			j.add("undo one")
			return nil
		}, hasty).
		Step("panics", func(ctx context.Context, _ *S) error {
			if saga.CurrentCall(ctx).Attempt == 1 {
				runtime.Goexit()
			}
			panic(errBroken)
		}, j.undo("panics"), hasty).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	in := settled(t, r, "x", saga.Compensated)
	j.want(t, "one", "undo panics", "undo one")
	if st := in.Steps[1]; st.Attempts != 3 || !strings.Contains(st.Error, "panicked: broken") {
		t.Errorf("%+v", st)
	}
}
