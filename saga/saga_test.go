package saga_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagatest"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func nothing(context.Context, *Trip) error { return nil }

func TestDefinitionsThatMakeNoSense(t *testing.T) {
	for what, define := range map[string]func(){
		"no steps":       func() { saga.New[Trip]("s", 1).Build() },
		"no name":        func() { saga.New[Trip]("", 1) },
		"control in it":  func() { saga.New[Trip]("s", 1).Step("a\nb", nothing, nil, nil) },
		"same names":     func() { saga.New[Trip]("s", 1).Step("a", nothing, nil, nil).Step("a", nothing, nil, nil) },
		"does nothing":   func() { saga.New[Trip]("s", 1).Step("a", nil, nothing, nil) },
		"after Build":    func() { d := saga.New[Trip]("s", 1).Step("a", nothing, nil, nil); d.Build(); d.Sleep("b", 1) },
		"two pivots":     func() { d := saga.New[Trip]("s", 1); d.Pivot("a", nothing, nil); d.Pivot("b", nothing, nil) },
		"undo after it":  func() { d := saga.New[Trip]("s", 1); d.Pivot("a", nothing, nil); d.Step("b", nothing, nothing, nil) },
		"pivot branched": func() { saga.New[Trip]("s", 1).Parallel(func(d *saga.Draft[Trip]) { d.Pivot("a", nothing, nil) }) },
		"no store":       func() { saga.NewRunner(nil, nil, nil) },
		"outside":        func() { saga.CurrentCall(t.Context()) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", what)
				}
			}()
			define()
		}()
	}
}

func TestSteps(t *testing.T) {
	s := saga.New[Trip]("s", 1).
		Step("a", nothing, nil, nil).
		Parallel(
			func(d *saga.Draft[Trip]) { d.Step("b1", nothing, nil, nil).Step("b2", nothing, nil, nil) },
			func(d *saga.Draft[Trip]) { d.Sleep("c", time.Second) },
		).
		Pivot("d", nothing, nil).
		Parallel(func(c *saga.Committed[Trip]) { c.Await("e", nil, nil) }, func(c *saga.Committed[Trip]) { c.Sleep("f", 1) }).
		Build()
	if got := fmt.Sprint(s.Name(), s.Steps()); got != "s[a b1 b2 c d e f]" {
		t.Error(got)
	}
}

func TestReplay(t *testing.T) {
	s := saga.New[Trip]("trip", 2).Step("hotel", nothing, nothing, nil).Step("car", nothing, nothing, nil).Pivot("charge", nothing, nil).Build()
	record := func(steps, state string) fs.FS {
		text := `{"id": "1", "saga": "trip", "version": 1, "status": "running", "state": "` + state + `", "steps": [` + steps + `]}`
		return fstest.MapFS{"one.json": {Data: []byte(text)}}
	}
	const empty = "e30=" // {}
	sagatest.Replay(t, s, record(`{"name": "hotel", "outcome": "ok"}, {"name": "car", "outcome": "begun"}`, empty))
	for why, in := range map[string]saga.Instance{
		"no step":     {Saga: "trip", State: []byte("{}"), Steps: []saga.StepRecord{{Name: "train", Outcome: saga.OK}}},
		"done first":  {Saga: "trip", State: []byte("{}"), Steps: []saga.StepRecord{{Name: "car", Outcome: saga.OK}}},
		"as pivot":    {Saga: "trip", State: []byte("{}"), Steps: []saga.StepRecord{{Name: "hotel", Pivot: true, Outcome: saga.OK}}},
		"is of other": {Saga: "other", State: []byte("{}")},
		"state":       {Saga: "trip", State: []byte("{")},
	} {
		if err := s.Check(in); !errors.Is(err, saga.ErrIncompatible) || !strings.Contains(err.Error(), strings.Fields(why)[0]) {
			t.Errorf("%s: %v", why, err)
		}
	}
}

// bubble runs a runner in synthetic time.
func bubble(t *testing.T, opts *saga.Options, defs []saga.Definition, f func(ctx context.Context, r *saga.Runner)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		r := saga.NewRunner(&saga.MemoryStore{}, defs, opts)
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		synctest.Wait()
		f(ctx, r)
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestLongWaits(t *testing.T) {
	asked := 0
	s := saga.New[Trip]("s", 1).
		Sleep("a night", 8*time.Hour).
		Step("ask", func(context.Context, *Trip) error {
			if asked++; asked < 100 {
				return saga.Again(time.Minute)
			}
			return nil
		}, nil, nil).
		Await("answer", nil, &saga.AwaitOptions{Deadline: 6 * time.Hour}).
		Build()
	bubble(t, &saga.Options{Lease: time.Hour, Poll: time.Minute}, []saga.Definition{s}, func(ctx context.Context, r *saga.Runner) {
		start := time.Now()
		if _, err := s.Start(ctx, r, "1", Trip{}); err != nil {
			t.Fatal(err)
		}
		in, err := r.Wait(ctx, "1")
		want := 8*time.Hour + 99*time.Minute + 6*time.Hour
		if took := time.Since(start); err != nil || in.Status != saga.Compensated || took < want || took > want+time.Minute {
			t.Errorf("%s after %v, want the deadline after %v; %v", in.Status, took, want, err)
		}
	})
}

func TestTimeoutAndRetries(t *testing.T) {
	var began []time.Duration
	start := time.Time{}
	s := saga.New[Trip]("s", 1).
		Step("slow", func(ctx context.Context, _ *Trip) error {
			began = append(began, time.Since(start))
			<-ctx.Done()
			return ctx.Err()
		}, nil, &saga.StepOptions{Timeout: time.Second, MaxAttempts: 4, RetryBase: 10 * time.Second, RetryMax: 15 * time.Second}).
		Build()
	bubble(t, nil, []saga.Definition{s}, func(ctx context.Context, r *saga.Runner) {
		start = time.Now()
		if _, err := s.Start(ctx, r, "1", Trip{}); err != nil {
			t.Fatal(err)
		}
		in, err := r.Wait(ctx, "1")
		if err != nil || in.Status != saga.Compensated || len(began) != 4 || began[3] < 3*time.Second || began[3] > time.Minute {
			t.Errorf("%s, %v, attempts at %v", in.Status, err, began)
		}
	})
}

// A runner that works for longer than its lease keeps it by renewing it.
func TestLeaseIsRenewed(t *testing.T) {
	var lost atomic.Int64
	s := saga.New[Trip]("s", 1).
		Step("long", func(ctx context.Context, _ *Trip) error {
			time.Sleep(10 * time.Minute)
			return ctx.Err()
		}, nil, &saga.StepOptions{Timeout: 2 * time.Hour}).
		Build()
	opts := &saga.Options{Lease: 5 * time.Second, Observer: saga.Observer{Lost: func(int) { lost.Add(1) }}}
	bubble(t, opts, []saga.Definition{s}, func(ctx context.Context, r *saga.Runner) {
		if _, err := s.Start(ctx, r, "1", Trip{}); err != nil {
			t.Fatal(err)
		}
		if in, err := r.Wait(ctx, "1"); err != nil || in.Status != saga.Done || lost.Load() != 0 {
			t.Errorf("%s, %v, lost %d leases", in.Status, err, lost.Load())
		}
	})
}

// No more sagas are in hand than the runner may have, and all of them end.
func TestConcurrency(t *testing.T) {
	var now, most atomic.Int64
	s := saga.New[Trip]("s", 1).
		Step("one", func(context.Context, *Trip) error {
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
			}
			time.Sleep(time.Second)
			now.Add(-1)
			return nil
		}, nil, nil).
		Build()
	bubble(t, &saga.Options{Concurrency: 7}, []saga.Definition{s}, func(ctx context.Context, r *saga.Runner) {
		for i := range 50 {
			if _, err := s.Start(ctx, r, fmt.Sprint(i), Trip{}); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 50 {
			if in, err := r.Wait(ctx, fmt.Sprint(i)); err != nil || in.Status != saga.Done {
				t.Errorf("%s, %v", in.Status, err)
			}
		}
		if n := most.Load(); n < 2 || n > 7 {
			t.Errorf("%d steps at a time, want at most 7", n)
		}
	})
}
