package scheduletest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-go/ashlar/schedule"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// start runs a runner, and returns a function that has it drain.
func (s suite) start(opts schedule.Options, handlers map[string]schedule.Handler) (stop func()) {
	opts.Logger = quiet
	if opts.Poll == 0 {
		opts.Poll = 50 * time.Millisecond
	}
	r := schedule.New(s.store, &opts)
	for name, h := range handlers {
		r.Handle(name, h)
	}
	ctx, cancel := context.WithCancel(s.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-ended; err != nil {
				s.Errorf("Run = %v", err)
			}
		})
	}
	s.Cleanup(stop)
	return stop
}

// Several runners, some of which come and go, run each tick of an interval once,
// and leave none out.
func runnersShareTicks(s suite) {
	const interval = 20 * time.Millisecond
	s.must(s.store.Define(s.Context(), schedule.Definition{Name: "n", Spec: "every " + interval.String(), Overlap: schedule.OverlapAllow}))
	var mu sync.Mutex
	executed := make(map[time.Time]int)
	handlers := map[string]schedule.Handler{"n": func(_ context.Context, run schedule.Run) error {
		mu.Lock()
		defer mu.Unlock()
		executed[run.Tick]++
		return nil
	}}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(executed)
	}
	s.start(schedule.Options{Instance: "stays"}, handlers)
	for i := range 5 {
		stop := s.start(schedule.Options{Instance: fmt.Sprint("goes ", i)}, handlers)
		reached := count() + 10
		s.poll("ten more ticks", func() bool { return count() >= reached })
		stop()
	}
	s.ok(s.store.Pause(s.Context(), "n"))
	s.poll("the last run", func() bool { st := s.status("n"); return st.Running+st.Waiting == 0 })
	records, err := s.store.Runs(s.Context(), "n", 100_000)
	s.ok(err)
	for i, r := range records {
		// One that was claimed by a runner that stops is given back: a second attempt.
		if r.State != schedule.Done || executed[r.Tick] != 1 {
			s.Errorf("tick %v is %s, attempt %d, executed %d times", r.Tick, r.State, r.Attempt, executed[r.Tick])
		}
		if i > 0 && records[i-1].Tick.Sub(r.Tick) != interval {
			s.Errorf("between the ticks %v and %v are %v", r.Tick, records[i-1].Tick, records[i-1].Tick.Sub(r.Tick))
		}
	}
	if len(records) != len(executed) {
		s.Errorf("%d rows, %d ticks executed", len(records), len(executed))
	}
}

func runnerHandlesFailures(s suite) {
	for _, name := range []string{"panics", "exits", "fails", "heals", "times out"} {
		s.must(s.store.Define(s.Context(), schedule.Definition{
			Name: name, Spec: "@yearly", Attempts: 3, RetryBase: time.Millisecond, RetryMax: time.Millisecond, Timeout: map[bool]time.Duration{true: short}[name == "times out"],
		}))
		s.must(s.store.Trigger(s.Context(), schedule.Trigger{Name: name}))
	}
	var tries atomic.Int64
	s.start(schedule.Options{Concurrency: 2}, map[string]schedule.Handler{
		"panics": func(context.Context, schedule.Run) error { panic("a bug\x00") },
		"exits":  func(context.Context, schedule.Run) error { runtime.Goexit(); return nil },
		"fails":  func(context.Context, schedule.Run) error { return errors.New("\xff no\x00") },
		"heals": func(_ context.Context, run schedule.Run) error {
			if tries.Add(1); run.Failures < 2 {
				return errors.New("not yet")
			}
			return nil
		},
		"times out": func(ctx context.Context, _ schedule.Run) error { <-ctx.Done(); return ctx.Err() },
	})
	for name, want := range map[string]schedule.State{
		"panics": schedule.Failed, "exits": schedule.Failed, "fails": schedule.Failed, "heals": schedule.Done, "times out": schedule.Failed,
	} {
		s.poll(name+" to end", func() bool { st := s.states(name)[0]; return st != schedule.Waiting && st != schedule.Running })
		records, err := s.store.Runs(s.Context(), name, 1)
		s.ok(err)
		if r := records[0]; r.State != want || r.Attempt != 3 || r.Err == "" {
			s.Errorf("%s ended as %+v, want %s at attempt 3", name, r, want)
		}
	}
	if n := tries.Load(); n != 3 {
		s.Errorf("the run that heals was tried %d times", n)
	}
}

// A runner that stops lets its runs end; what does not end in time is given
// back and repeated by another at once, not when its lease ends.
func runnerDrains(s suite) {
	for _, name := range []string{"ends", "does not"} {
		s.must(s.store.Define(s.Context(), schedule.Definition{Name: name, Spec: "@yearly"}))
		s.must(s.store.Trigger(s.Context(), schedule.Trigger{Name: name}))
	}
	started := make(chan struct{}, 2)
	release := make(chan struct{})
	stop := s.start(schedule.Options{Lease: long, DrainTimeout: short, Instance: "first"}, map[string]schedule.Handler{
		"ends":     func(context.Context, schedule.Run) error { started <- struct{}{}; <-release; return nil },
		"does not": func(ctx context.Context, _ schedule.Run) error { started <- struct{}{}; <-ctx.Done(); return ctx.Err() },
	})
	<-started
	<-started
	time.AfterFunc(short/10, func() { close(release) })
	stop()
	s.expect("ends", schedule.Done)
	s.expect("does not", schedule.Waiting)
	s.start(schedule.Options{Lease: long}, map[string]schedule.Handler{"does not": func(context.Context, schedule.Run) error { return nil }})
	s.poll("the other instance", func() bool { return s.states("does not")[0] == schedule.Done })
	if records, err := s.store.Runs(s.Context(), "does not", 1); err != nil || records[0].Attempt != 2 || records[0].Instance == "first" {
		s.Errorf("the record is %+v, %v", records, err)
	}
}
