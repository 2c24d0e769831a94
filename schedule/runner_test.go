package schedule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// A world is a store and runners in a bubble of synctest, whose time goes on
// only when all wait.
type world struct {
	*testing.T
	store Store
	mem   *MemoryStore
}

func newWorld(t *testing.T) *world {
	mem := new(MemoryStore)
	return &world{t, mem, mem}
}

func (w *world) define(d Definition) {
	w.Helper()
	if _, err := w.mem.Define(w.Context(), d); err != nil {
		w.Fatal(err)
	}
}

// start runs a runner; stop has it drain and returns what Run returned.
func (w *world) start(opts Options, handlers map[string]Handler) (r *Runner, stop func() error) {
	opts.Logger = quiet
	r = New(w.store, &opts)
	for name, h := range handlers {
		r.Handle(name, h)
	}
	ctx, cancel := context.WithCancel(w.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	return r, func() error { cancel(); return <-ended }
}

func (w *world) runs(name string) []Record {
	w.Helper()
	runs, err := w.mem.Runs(w.Context(), name, 10_000)
	if err != nil {
		w.Fatal(err)
	}
	return runs
}

// Ticks start at their moment by the store's clock, however wrong the local one
// is, and each once.
func TestWrongClock(t *testing.T) {
	for _, skew := range []time.Duration{0, 5 * time.Second, -5 * time.Second, 100 * 24 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.mem.skew = skew
			w.define(Definition{Name: "n", Spec: "every 1m"})
			var ticks []time.Time
			_, stop := w.start(Options{}, map[string]Handler{"n": func(_ context.Context, run Run) error {
				if late := time.Now().Add(skew).Sub(run.Tick); late < 0 || late > time.Millisecond {
					t.Errorf("skew %v: the tick ran %v late", skew, late)
				}
				ticks = append(ticks, run.Tick)
				return nil
			}})
			time.Sleep(10*time.Minute + time.Second)
			if err := stop(); err != nil {
				t.Error(err)
			}
			if len(ticks) != 10 {
				t.Errorf("skew %v: %d ticks in ten minutes", skew, len(ticks))
			}
		})
	}
}

// A store's clock that is put forward or back while a runner sleeps costs no
// tick and repeats none.
func TestClockThatJumps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.define(Definition{Name: "n", Spec: "every 1m", Misfire: MisfireBackfill, Backfill: 100})
		_, stop := w.start(Options{}, map[string]Handler{"n": func(context.Context, Run) error { return nil }})
		for _, jump := range []time.Duration{time.Hour, -30 * time.Minute, 10 * time.Minute, -time.Second} {
			time.Sleep(90 * time.Second)
			w.mem.mu.Lock()
			w.mem.skew += jump
			w.mem.mu.Unlock()
		}
		time.Sleep(30 * time.Minute)
		if err := stop(); err != nil {
			t.Error(err)
		}
		runs := w.runs("n")
		for i := range runs[1:] {
			if runs[i].Tick.Sub(runs[i+1].Tick) != time.Minute || runs[i].State != Done {
				t.Errorf("the ticks %v and %v follow one another, %s", runs[i+1].Tick, runs[i].Tick, runs[i].State)
			}
		}
		if len(runs) < 60 {
			t.Errorf("%d ticks", len(runs))
		}
	})
}

// counting counts calls, and can make them fail or wait.
type counting struct {
	Store
	claims, extends, finishes, prunes atomic.Int64
	fail                              func(op string) error
	hold                              func(ctx context.Context, op string)
}

func (c *counting) before(ctx context.Context, op string, n *atomic.Int64) error {
	n.Add(1)
	if c.hold != nil {
		c.hold(ctx, op)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if c.fail != nil {
		return c.fail(op)
	}
	return nil
}

func (c *counting) Claim(ctx context.Context, req ClaimRequest) (Claim, error) {
	if err := c.before(ctx, "claim", &c.claims); err != nil {
		return Claim{}, err
	}
	return c.Store.Claim(ctx, req)
}

func (c *counting) Extend(ctx context.Context, runs []Ref, lease time.Duration) (kept, lost []Ref, err error) {
	if err := c.before(ctx, "extend", &c.extends); err != nil {
		return nil, nil, err
	}
	return c.Store.Extend(ctx, runs, lease)
}

func (c *counting) Finish(ctx context.Context, run Ref, o Outcome) (bool, error) {
	if err := c.before(ctx, "finish", &c.finishes); err != nil {
		return false, err
	}
	return c.Store.Finish(ctx, run, o)
}

func (c *counting) Prune(ctx context.Context, keep time.Duration, limit int) (int, error) {
	if err := c.before(ctx, "prune", &c.prunes); err != nil {
		return 0, err
	}
	return c.Store.Prune(ctx, keep, limit)
}

// An idle runner looks once in each poll; one that has a tick, twice more.
func TestLooksAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		store := &counting{Store: w.mem}
		w.store = store
		w.define(Definition{Name: "n", Spec: "every 1m"})
		_, stop := w.start(Options{}, map[string]Handler{"n": func(context.Context, Run) error { return nil }})
		time.Sleep(time.Hour + time.Second)
		if err := stop(); err != nil {
			t.Error(err)
		}
		if n := store.claims.Load(); n > 3600+3*60+5 {
			t.Errorf("%d looks in an hour of polls of 1 s, with 60 ticks", n)
		}
		if len(w.runs("n")) != 60 {
			t.Errorf("%d ticks", len(w.runs("n")))
		}
		if store.extends.Load() != 0 || store.prunes.Load() == 0 {
			t.Errorf("%d extensions, %d prunes", store.extends.Load(), store.prunes.Load())
		}
	})
}

// Whoever comes new is found at the next poll, or at once after a Wake.
func TestWake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.define(Definition{Name: "n", Spec: "@yearly"})
		var claimed []time.Time
		r, stop := w.start(Options{Poll: time.Minute}, map[string]Handler{"n": func(_ context.Context, run Run) error {
			claimed = append(claimed, time.Now())
			return nil
		}})
		trigger := func() {
			if _, err := w.mem.Trigger(t.Context(), Trigger{Name: "n"}); err != nil {
				t.Fatal(err)
			}
		}
		start := time.Now()
		time.Sleep(90 * time.Second)
		trigger()
		time.Sleep(40 * time.Second)
		time.Sleep(10 * time.Second)
		trigger()
		r.Wake()
		r.Wake()
		synctest.Wait()
		if err := stop(); err != nil {
			t.Error(err)
		}
		if len(claimed) != 2 || claimed[0].Sub(start) != 2*time.Minute || claimed[1].Sub(start) != 140*time.Second {
			t.Errorf("claimed at %v after %v", claimed, start)
		}
	})
}

// A run that waits for the end of another starts when that ends, not at a poll.
func TestQueueGoesOnAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.define(Definition{Name: "n", Spec: "every 1m", Overlap: OverlapQueue})
		_, stop := w.start(Options{Poll: 30 * time.Second, DrainTimeout: time.Hour}, map[string]Handler{"n": func(context.Context, Run) error {
			time.Sleep(83 * time.Second)
			return nil
		}})
		time.Sleep(4*time.Minute + 10*time.Second)
		if err := stop(); err != nil {
			t.Error(err)
		}
		runs := w.runs("n")
		if len(runs) < 3 {
			t.Fatalf("%d runs", len(runs))
		}
		first, second := runs[len(runs)-1], runs[len(runs)-2]
		if wait := second.Started.Sub(first.Finished); wait < 0 || wait > time.Millisecond {
			t.Errorf("the second run started %v after the end of the first", wait)
		}
	})
}

func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.define(Definition{Name: "n", Spec: "@yearly"})
		if _, err := w.mem.Trigger(t.Context(), Trigger{Name: "n"}); err != nil {
			t.Fatal(err)
		}
		var executed atomic.Int64
		work := func(ctx context.Context, _ Run) error {
			executed.Add(1)
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(10 * time.Minute):
				return nil
			}
		}
		_, stop := w.start(Options{DrainTimeout: time.Hour}, map[string]Handler{"n": work})
		_, other := w.start(Options{DrainTimeout: time.Hour}, map[string]Handler{"n": work})
		time.Sleep(time.Second)
		if err := errors.Join(stop(), other()); err != nil {
			t.Error(err)
		}
		if r := w.runs("n")[0]; r.State != Done || r.Attempt != 1 || executed.Load() != 1 {
			t.Errorf("a run of ten minutes ended as %+v, executed %d times", r, executed.Load())
		}
	})
}

// When the store does not answer, the context of a run ends before its lease
// does, with the reason; then another repeats the run.
func TestContextEndsBeforeTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var silent atomic.Bool
		store := &counting{Store: w.mem, hold: func(ctx context.Context, _ string) {
			if silent.Load() {
				<-ctx.Done()
			}
		}}
		w.store = store
		w.define(Definition{Name: "n", Spec: "@yearly"})
		if _, err := w.mem.Trigger(t.Context(), Trigger{Name: "n"}); err != nil {
			t.Fatal(err)
		}
		var cause error
		var ended, again time.Time
		started := make(chan struct{})
		_, stop := w.start(Options{}, map[string]Handler{"n": func(ctx context.Context, _ Run) error {
			close(started)
			<-ctx.Done()
			cause, ended = context.Cause(ctx), time.Now()
			return ctx.Err()
		}})
		<-started
		time.Sleep(4 * time.Second) // one extension
		silent.Store(true)
		w.store = w.mem
		_, other := w.start(Options{}, map[string]Handler{"n": func(context.Context, Run) error { again = time.Now(); return nil }})
		time.Sleep(time.Minute)
		silent.Store(false)
		if err := errors.Join(stop(), other()); err != nil {
			t.Error(err)
		}
		if !errors.Is(cause, ErrLeaseLost) || again.IsZero() || ended.After(again) {
			t.Errorf("the context ended at %v with %v, the other began at %v", ended, cause, again)
		}
		if r := w.runs("n")[0]; r.State != Done || r.Attempt != 2 {
			t.Errorf("the run ended as %+v", r)
		}
	})
}

// What hangs, panics or cannot be read disturbs nobody else.
func TestPoisonedSchedules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.define(Definition{Name: "good", Spec: "every 1m"})
		w.define(Definition{Name: "hangs", Spec: "every 10s", Overlap: OverlapAllow})
		w.define(Definition{Name: "hangs alone", Spec: "every 10s"})
		w.define(Definition{Name: "panics", Spec: "every 10s"})
		w.define(Definition{Name: "timing panics", Spec: "func panics", Handler: "good"})
		w.define(Definition{Name: "timing stands", Spec: "func stands", Handler: "good"})
		w.define(Definition{Name: "timing unknown", Spec: "func unknown", Handler: "good"})
		w.define(Definition{Name: "unreadable", Spec: "every 1m", Handler: "good"})
		w.mem.definitions["unreadable"].Spec = "of a newer version"
		var good atomic.Int64
		hang := make(chan struct{})
		_, stop := w.start(Options{
			Concurrency: 8, DrainTimeout: time.Second, FinishTimeout: time.Second,
			Funcs: map[string]Timing{
				"panics": timingFunc(func(time.Time) time.Time { panic("a bug") }),
				"stands": timingFunc(func(t time.Time) time.Time { return t }),
			},
		}, map[string]Handler{
			"good":        func(context.Context, Run) error { good.Add(1); return nil },
			"hangs":       func(context.Context, Run) error { <-hang; return nil },
			"hangs alone": func(context.Context, Run) error { <-hang; return nil },
			"panics":      func(context.Context, Run) error { panic("a bug") },
		})
		time.Sleep(time.Hour + time.Second)
		if n := good.Load(); n != 60 {
			t.Errorf("the good schedule ran %d times in an hour of minutes", n)
		}
		for _, r := range w.runs("panics") {
			if r.State != Failed || !strings.Contains(r.Err, "a bug") || !strings.Contains(r.Err, "runner_test.go") {
				t.Errorf("a panic ended as %+v", r)
			}
		}
		err := stop()
		if err == nil || !strings.Contains(err.Error(), "3 handlers go on") {
			t.Errorf("Run with handlers that hang = %v", err)
		}
		close(hang)
		synctest.Wait()
	})
}

// However much is due, no more handlers run at once than there may.
func TestConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for i := range 50 {
			w.define(Definition{Name: fmt.Sprint("n", i), Spec: "every 1h", Handler: "h", Grace: time.Hour})
		}
		var now, most, all atomic.Int64
		_, stop := w.start(Options{Concurrency: 5, Poll: time.Hour, DrainTimeout: time.Hour}, map[string]Handler{"h": func(context.Context, Run) error {
			most.Store(max(most.Load(), now.Add(1)))
			time.Sleep(time.Minute)
			now.Add(-1)
			all.Add(1)
			return nil
		}})
		time.Sleep(2 * time.Hour)
		if err := stop(); err != nil {
			t.Error(err)
		}
		if most.Load() != 5 || all.Load() < 50 {
			t.Errorf("%d handlers at once, %d in all; want 5 and at least 50", most.Load(), all.Load())
		}
	})
}

// A store that fails for a while is asked again; an outcome is recorded when it
// answers; what is not is told.
func TestStoreFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var down atomic.Bool
		w.store = &counting{Store: w.mem, fail: func(string) error {
			if down.Load() {
				return errors.New("connection refused")
			}
			return nil
		}}
		w.define(Definition{Name: "n", Spec: "every 1m", Misfire: MisfireBackfill, Backfill: 10})
		var mu sync.Mutex
		var lost []error
		states := make(map[State]int)
		_, stop := w.start(Options{Observer: Observer{
			Lost: func(_ context.Context, _ Run, err error) { mu.Lock(); lost = append(lost, err); mu.Unlock() },
			Finished: func(_ context.Context, _ Run, state State, _ error, _ time.Duration) {
				mu.Lock()
				states[state]++
				mu.Unlock()
			},
		}}, map[string]Handler{"n": func(_ context.Context, run Run) error {
			if down.Load() {
				t.Error("a run started while the store was down")
			}
			switch {
			case run.Tick.Minute()%10 == 3 && run.Attempt == 1: // fails for 2 s, then for 20 s
				down.Store(true)
				time.AfterFunc(2*time.Second, func() { down.Store(false) })
			case run.Tick.Minute()%10 == 6 && run.Attempt == 1:
				down.Store(true)
				time.AfterFunc(20*time.Second, func() { down.Store(false) })
			}
			return nil
		}})
		time.Sleep(9*time.Minute + 50*time.Second)
		if err := stop(); err != nil {
			t.Error(err)
		}
		runs := w.runs("n")
		attempts := 0
		for i, r := range runs {
			attempts += r.Attempt
			if r.State != Done || i > 0 && runs[i-1].Tick.Sub(r.Tick) != time.Minute {
				t.Errorf("run %d is %+v", i, r)
			}
		}
		if len(lost) != 1 || !strings.Contains(lost[0].Error(), "connection refused") || attempts != len(runs)+1 || states[Done] != len(runs) {
			t.Errorf("%d runs, %d attempts, told %v, lost %v", len(runs), attempts, states, lost)
		}
	})
}

func TestNotMigrated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.store = &counting{Store: w.mem, fail: func(string) error { return fmt.Errorf("x: %w", ErrNotMigrated) }}
		_, stop := w.start(Options{}, map[string]Handler{"n": func(context.Context, Run) error { return nil }})
		synctest.Wait()
		if err := stop(); !errors.Is(err, ErrNotMigrated) {
			t.Errorf("Run without tables = %v", err)
		}
	})
}

// A claim that is on its way when the instance is told to stop is given back.
func TestClaimedWhileStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.define(Definition{Name: "n", Spec: "@yearly"})
		if _, err := w.mem.Trigger(t.Context(), Trigger{Name: "n"}); err != nil {
			t.Fatal(err)
		}
		on := make(chan struct{})
		w.store = &counting{Store: w.mem, hold: func(_ context.Context, op string) {
			if op == "claim" {
				<-on
			}
		}}
		_, stop := w.start(Options{}, map[string]Handler{"n": func(context.Context, Run) error {
			t.Error("a run started although the instance was told to stop")
			return nil
		}})
		synctest.Wait()
		time.AfterFunc(time.Second, func() { close(on) })
		if err := stop(); err != nil {
			t.Error(err)
		}
		if r := w.runs("n")[0]; r.State != Waiting || r.Attempt != 1 {
			t.Errorf("the run is %+v", r)
		}
	})
}

func TestAtMostOnceIsNotRepeatedAfterADrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.define(Definition{Name: "n", Spec: "@yearly", AtMostOnce: true})
		if _, err := w.mem.Trigger(t.Context(), Trigger{Name: "n"}); err != nil {
			t.Fatal(err)
		}
		_, stop := w.start(Options{DrainTimeout: time.Second}, map[string]Handler{"n": func(ctx context.Context, _ Run) error { <-ctx.Done(); return ctx.Err() }})
		time.Sleep(2 * time.Second)
		if err := stop(); err != nil {
			t.Error(err)
		}
		if r := w.runs("n")[0]; r.State != Lost {
			t.Errorf("the run is %+v", r)
		}
	})
}

// A timing of the program's own is planned by the instances that have it.
func TestFuncs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.define(Definition{Name: "n", Spec: "func quarter past"})
		run := func(context.Context, Run) error { return nil }
		_, without := w.start(Options{}, map[string]Handler{"n": run})
		time.Sleep(2 * time.Hour)
		if runs := w.runs("n"); len(runs) != 0 {
			t.Errorf("an instance without the function made %+v", runs)
		}
		_, with := w.start(Options{Funcs: map[string]Timing{"quarter past": timingFunc(func(t time.Time) time.Time {
			return t.Add(45 * time.Minute).Truncate(time.Hour).Add(15 * time.Minute)
		})}}, map[string]Handler{"n": run})
		time.Sleep(3 * time.Hour)
		if err := errors.Join(without(), with()); err != nil {
			t.Error(err)
		}
		runs := w.runs("n")
		if len(runs) < 3 || len(runs) > 4 { // and one for those that were missed
			t.Errorf("%d runs in three hours", len(runs))
		}
		for _, r := range runs {
			if r.Tick.Minute() != 15 || r.State != Done {
				t.Errorf("the run is %+v", r)
			}
		}
	})
}

func TestHandleTwicePanics(t *testing.T) {
	r := New(new(MemoryStore), nil)
	h := func(context.Context, Run) error { return nil }
	r.Handle("n", h)
	for what, f := range map[string]func(){
		"the same name": func() { r.Handle("n", h) }, "no handler": func() { r.Handle("m", nil) }, "no store": func() { New(nil, nil) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", what)
				}
			}()
			f()
		}()
	}
}
