package sagatest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/saga"
)

// A cable is a store that can be cut off, as by a death of the process or a
// partition of the network: then nothing of the runner gets through.
type cable struct {
	saga.Store
	cut atomic.Bool
}

var errCut = errors.New("cut off")

func (c *cable) Lease(ctx context.Context, req saga.LeaseRequest) (saga.Grant, error) {
	if c.cut.Load() {
		return saga.Grant{}, errCut
	}
	return c.Store.Lease(ctx, req)
}

func (c *cable) Save(ctx context.Context, runner string, cs []saga.Checkpoint) ([]saga.Ack, error) {
	if c.cut.Load() {
		return nil, errCut
	}
	return c.Store.Save(ctx, runner, cs)
}

func (c *cable) Get(ctx context.Context, id string) (saga.Instance, error) {
	if c.cut.Load() {
		return saga.Instance{}, errCut
	}
	return c.Store.Get(ctx, id)
}

func testCancelRunning(t *testing.T, store saga.Store) {
	var j journal
	running := make(chan struct{})
	s := saga.New[S]("a", 1).
		Step("one", j.do("one"), j.undo("one"), nil).
		Step("two", func(ctx context.Context, _ *S) error {
			close(running)
			<-ctx.Done()
			if !errors.Is(context.Cause(ctx), saga.ErrCancelled) {
				j.add("cause %v", context.Cause(ctx))
			}
			return ctx.Err()
		}, func(ctx context.Context, _ *S) error {
			j.add("undo two, context %v", ctx.Err())
			return nil
		}, nil).
		Step("three", j.do("three"), nil, nil).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	<-running
	client := saga.NewRunner(store, nil, nil) // as another process
	must(t, client.Cancel(t.Context(), "x", saga.By{Actor: "user", Reason: "changed their mind"}))
	in := settled(t, r, "x", saga.Compensated)
	j.want(t, "one", "undo two, context <nil>", "undo one")
	if !strings.Contains(in.Cause, "changed their mind") {
		t.Errorf("cause %q", in.Cause)
	}
	wantErr(t, r.Cancel(t.Context(), "x", saga.By{}), saga.ErrState)
}

func testCancelWaiting(t *testing.T, store saga.Store) {
	var j journal
	s := saga.New[S]("a", 1).
		Step("one", j.do("one"), j.undo("one"), nil).
		Await("never", nil, nil).
		Build()
	r, _ := run(t, store, quick(), s)
	start(t, r, s, "x")
	eventually(t, "it to wait", func() bool {
		in, err := r.Get(t.Context(), "x")
		return err == nil && in.Owner == "" && len(in.Steps) == 2
	})
	must(t, r.Cancel(t.Context(), "x", saga.By{Actor: "user"}))
	settled(t, r, "x", saga.Compensated)
	j.want(t, "one", "undo one")
}

func testCancelAtThePivot(t *testing.T, store saga.Store) {
	for _, refuse := range []bool{false, true} {
		var j journal
		running, goOn := make(chan struct{}), make(chan struct{})
		s := pivotSaga(&j, func(ctx context.Context, _ *S) error {
			close(running)
			<-goOn
			if ctx.Err() != nil {
				j.add("the pivot was disturbed")
			}
			if refuse {
				return saga.Abort(errBroken)
			}
			return nil
		}, j.do("after"))
		r, stop := run(t, store, quick(), s)
		id := fmt.Sprint("refuse ", refuse)
		start(t, r, s, id)
		<-running
		must(t, r.Cancel(t.Context(), id, saga.By{Actor: "user", Reason: "late"}))
		close(goOn)
		if refuse {
			settled(t, r, id, saga.Compensated)
			j.want(t, "one", "undo one")
		} else {
			settled(t, r, id, saga.Done)
			j.want(t, "one", "after")
		}
		stop()
	}
}

func testPoison(t *testing.T, store saga.Store) {
	var j journal
	hang := make(chan struct{})
	defer close(hang)
	bad := saga.New[S]("bad", 1).
		Step("hangs", func(context.Context, *S) error { <-hang; return nil }, nil, nil). // deaf to its context
		Build()
	panics := saga.New[S]("panics", 1).Step("panics", func(context.Context, *S) error { panic("x") }, nil, nil).Build()
	good := saga.New[S]("good", 1).Step("one", j.do("one"), nil, nil).Build()
	opts := quick()
	opts.DrainTimeout = 50 * time.Millisecond
	r := saga.NewRunner(store, []saga.Definition{bad, panics, good}, opts)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	eventually(t, "the runner", func() bool { _, err := store.Sample(ctx); return err == nil })
	// One whose state cannot be read.
	rotten, err := good.Instance("rotten", S{})
	must(t, err)
	rotten.State = []byte("{")
	create(t, store, rotten)
	for i := range 3 {
		start(t, r, bad, fmt.Sprint("bad", i))
		start(t, r, panics, fmt.Sprint("panics", i))
	}
	for i := range 20 {
		start(t, r, good, fmt.Sprint("good", i))
	}
	for i := range 20 {
		settled(t, r, fmt.Sprint("good", i), saga.Done)
	}
	if in := settled(t, r, "rotten", saga.Stuck); !strings.Contains(in.Reason, saga.ErrIncompatible.Error()) {
		t.Errorf("reason %q", in.Reason)
	}
	stop()
	if err := <-done; err == nil {
		t.Error("Run = nil although steps go on")
	}
}

func testStartOnce(t *testing.T, store saga.Store) {
	var j journal
	a := saga.New[S]("a", 1).Step("one", j.do("one"), nil, nil).Build()
	b := saga.New[S]("b", 1).Step("one", j.do("b"), nil, nil).Build()
	r, _ := run(t, store, quick(), a, b)
	r2, _ := run(t, store, quick(), a, b)
	var wg sync.WaitGroup
	var n atomic.Int64
	for i := range 20 {
		wg.Go(func() {
			started, err := a.Start(t.Context(), []*saga.Runner{r, r2, saga.NewRunner(store, nil, nil)}[i%3], "x", S{})
			if err != nil {
				t.Error(err)
			}
			if started {
				n.Add(1)
			}
		})
	}
	wg.Wait()
	if n.Load() != 1 {
		t.Errorf("started %d times", n.Load())
	}
	settled(t, r, "x", saga.Done)
	j.want(t, "one")
	_, err := b.Start(t.Context(), r, "x", S{})
	wantErr(t, err, saga.ErrExists)
	for _, id := range []string{"", "a\nb", strings.Repeat("x", 256), "\xff"} {
		_, err := a.Start(t.Context(), r, id, S{})
		wantErr(t, err, saga.ErrInvalid)
	}
}

func testTakeover(t *testing.T, store saga.Store) {
	var j journal
	c := &cable{Store: store}
	stuckIn := make(chan string, 10)
	var second atomic.Bool
	s := saga.New[S]("a", 1).
		Step("one", j.do("one"), j.undo("one"), nil).
		Step("two", func(ctx context.Context, s *S) error {
			if !second.Load() {
				stuckIn <- saga.CurrentCall(ctx).Key()
				c.cut.Store(true)
				<-ctx.Done()
				return ctx.Err()
			}
			j.add("two")
			return nil
		}, j.undo("two"), nil).
		Step("three", j.do("three"), nil, nil).
		Build()
	opts := quick()
	opts.Lease = 300 * time.Millisecond
	opts.DrainTimeout = 50 * time.Millisecond
	first, _ := run(t, c, opts, s)
	eventually(t, "the start", func() bool { started, err := s.Start(t.Context(), first, "x", S{}); return err == nil && started })
	<-stuckIn
	second.Store(true)
	r, _ := run(t, store, quick(), s)
	in := settled(t, r, "x", saga.Done)
	j.want(t, "one", "two", "three")
	if in.Steps[1].Outcome != saga.OK {
		t.Errorf("%+v", in.Steps)
	}
}

func testZombie(t *testing.T, store saga.Store) {
	var other atomic.Bool
	var overlap atomic.Int64
	c := &cable{Store: store}
	running := make(chan struct{}, 1)
	cause := make(chan error, 1)
	s := saga.New[S]("a", 1).
		Step("one", func(ctx context.Context, _ *S) error {
			if other.Load() {
				overlap.Add(10)
				return nil
			}
			c.cut.Store(true)
			other.Store(true)
			running <- struct{}{}
			<-ctx.Done()
			overlap.Add(1)
			cause <- context.Cause(ctx)
			return ctx.Err()
		}, nil, nil).
		Build()
	opts := quick()
	opts.Lease = 500 * time.Millisecond
	opts.DrainTimeout = 50 * time.Millisecond
	first, _ := run(t, c, opts, s)
	_, err := s.Start(t.Context(), saga.NewRunner(store, nil, nil), "x", S{})
	must(t, err)
	first.Wake()
	<-running
	r, _ := run(t, store, quick(), s)
	settled(t, r, "x", saga.Done)
	// The zombie's context ended before the other could take the saga.
	select {
	case err := <-cause:
		wantErr(t, err, saga.ErrLeaseLost)
	default:
		t.Error("the zombie's context had not ended when another had run its step")
	}
}

func testDrain(t *testing.T, store saga.Store) {
	var j journal
	running, goOn := make(chan struct{}), make(chan struct{})
	s := saga.New[S]("a", 1).
		Step("one", func(context.Context, *S) error { close(running); <-goOn; j.add("one"); return nil }, nil, nil).
		Step("two", j.do("two"), nil, nil).
		Build()
	first, stop := run(t, store, quick(), s)
	start(t, first, s, "x")
	<-running
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	eventually(t, "the drain", func() bool { // it starts nothing any more in its own hand
		started, err := s.Start(t.Context(), first, fmt.Sprint(time.Now().UnixNano()), S{})
		_ = started
		return err == nil
	})
	close(goOn)
	<-stopped
	in, err := store.Get(t.Context(), "x")
	must(t, err)
	if in.Owner != "" || in.Deaths != 0 || in.Steps[0].Outcome != saga.OK {
		t.Errorf("after the drain: %+v", in)
	}
}

func testDyingRunners(t *testing.T, store saga.Store) {
	s := saga.New[S]("a", 1).Step("one", func(context.Context, *S) error { return nil }, nil, nil).Build()
	in, err := s.Instance("x", S{})
	must(t, err)
	create(t, store, in)
	n := 0
	for range 3 { // runners that die with it in hand
		eventually(t, "the takeover", func() bool {
			n++
			return len(die(t, store, fmt.Sprintf("00000000-0000-7000-8001-%012d", n), 1).Taken) == 1
		})
	}
	opts := quick()
	opts.MaxDeaths = 2
	r, _ := run(t, store, opts, s)
	got := settled(t, r, "x", saga.Stuck)
	if !strings.Contains(got.Reason, "3 runners") {
		t.Errorf("reason %q", got.Reason)
	}
	must(t, r.Retry(t.Context(), "x", saga.By{Actor: "ops"}))
	eventually(t, "the end", func() bool { in, err := r.Get(t.Context(), "x"); return err == nil && in.Status == saga.Done })
}

func testVersions(t *testing.T, store saga.Store) {
	ctx := t.Context()
	var j journal
	v1 := saga.New[S]("a", 1).Step("one", j.do("one"), j.undo("one"), nil).Await("go", nil, nil).Build()
	type S2 struct{ A, Sum int } // another state, read from the old one
	decode := func(b []byte, version int) (*S2, error) {
		if version == 1 {
			return &S2{Sum: 100}, nil
		}
		return &S2{Sum: len(b)}, nil
	}
	none := func(context.Context, *S2) error { return nil }
	v2 := saga.New[S2]("a", 2).
		Codec(func(s *S2) ([]byte, error) { return make([]byte, s.Sum), nil }, decode).
		Step("one", none, none, nil).Await("go", nil, nil).
		Step("two", func(_ context.Context, s *S2) error { s.Sum++; return nil }, nil, nil).
		Build()
	v3 := saga.New[S]("a", 3).Step("zero", j.do("zero"), nil, nil).Step("one", j.do("one"), j.undo("one"), nil).Await("go", nil, nil).Build()

	old, stop := run(t, store, quick(), v1)
	for _, id := range []string{"2", "3"} {
		start(t, old, v1, id)
		eventually(t, "it to wait", func() bool {
			in, err := old.Get(ctx, id)
			return err == nil && in.Owner == "" && len(in.Steps) == 2
		})
	}
	stop()
	r2, stop2 := run(t, store, quick(), v2)
	must(t, r2.Signal(ctx, "2", "go", nil))
	in := settled(t, r2, "2", saga.Done)
	if state, err := v2.State(in); err != nil || state.Sum != 101 || in.Version != 2 {
		t.Errorf("state %+v, %v, version %d", state, err, in.Version)
	}
	stop2()
	r3, stop3 := run(t, store, quick(), v3)
	must(t, r3.Signal(ctx, "3", "go", nil))
	in = settled(t, r3, "3", saga.Stuck)
	if !strings.Contains(in.Reason, `"zero"`) || v3.Check(in) == nil || v1.Check(in) != nil {
		t.Errorf("reason %q", in.Reason)
	}
	stop3()
	// With the fault mended it goes on.
	v4 := saga.New[S]("a", 4).Step("one", j.do("one"), j.undo("one"), nil).Await("go", nil, nil).Build()
	r4, _ := run(t, store, quick(), v4)
	must(t, r4.Retry(ctx, "3", saga.By{Actor: "ops"}))
	eventually(t, "the end", func() bool { in, err := r4.Get(ctx, "3"); return err == nil && in.Status == saga.Done })
}
