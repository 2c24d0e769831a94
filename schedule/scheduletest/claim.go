package scheduletest

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-go/ashlar/schedule"
)

// Of any number of instances that decide about a tick, one makes its row, and
// one is granted the run. Each tick is decided by all of them at once.
func oneRowForATick(s suite) {
	p := s.define(schedule.Definition{Name: "n", Overlap: schedule.OverlapAllow})
	const instances, rounds = 8, 20
	start := p.Since.Add(-time.Hour)
	for i := range rounds {
		at := start.Add(time.Duration(i) * time.Second)
		plan := s.plan("n")
		var grants atomic.Int64
		race(instances, func(j int) {
			req := request(fmt.Sprint("instance ", j), "n")
			d := decision(plan, at)
			d.Next = at.Add(time.Second)
			req.Decisions = []schedule.Decision{d}
			grants.Add(int64(len(s.try(req).Runs)))
		})
		if n := grants.Load(); n != 1 {
			s.Fatalf("%d instances were granted tick %d, want one", n, i)
		}
	}
	records, err := s.store.Runs(s.Context(), "n", 1000)
	if err != nil || len(records) != rounds {
		s.Fatalf("%d rows for %d ticks, %v", len(records), rounds, err)
	}
	for i, r := range records {
		if want := start.Add(time.Duration(rounds-1-i) * time.Second); !r.Tick.Equal(want) || r.Attempt != 1 {
			s.Errorf("row %d is of the tick %v, attempt %d; want %v, 1", i, r.Tick, r.Attempt, want)
		}
	}
}

// A tick that has its row, because the schedule was changed and changed back,
// does not get another, and does not hold the schedule up.
func tickThatHasARow(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	at := p.Since.Add(-time.Minute)
	s.finish(s.one(s.run("a", "n", long, at)), done)
	s.must(s.store.Define(s.Context(), schedule.Definition{Name: "n", Spec: "every 2h"}))
	s.none(s.run("b", "n", long, at))
	s.expect("n", schedule.Done)
	if next := s.plan("n").Next; !next.Equal(at.Add(24 * time.Hour)) {
		s.Errorf("the next tick is %v, want %v", next, at.Add(24*time.Hour))
	}
}

func staleDecision(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	at := p.Since.Add(-time.Minute)
	d := decision(p, at)
	req := request("a", "n")
	wrong := func(what string, f func(d *schedule.Decision)) {
		s.Helper()
		stale := d
		f(&stale)
		req.Decisions = []schedule.Decision{stale}
		if runs := s.claim(req).Runs; len(runs) > 0 {
			s.Errorf("a decision with %s was carried out", what)
		}
	}
	wrong("another version", func(d *schedule.Decision) { d.Version++ })
	wrong("another next tick", func(d *schedule.Decision) { d.From = at })
	wrong("another name", func(d *schedule.Decision) { d.Name = "m" })
	s.expect("n")
	req.Decisions = []schedule.Decision{d}
	s.one(s.claim(req).Runs)
	wrong("a tick that is decided", func(d *schedule.Decision) { d.Ticks = []schedule.Tick{tick(at.Add(time.Second))} })
	s.expect("n", schedule.Running)
}

// The store's clock decides whether a tick is due, whatever the instance thinks.
func notDue(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	s.none(s.run("a", "n", long, p.Since.Add(-time.Minute), p.Since.Add(time.Hour)))
	s.expect("n")
	if next := s.plan("n").Next; !next.IsZero() {
		s.Errorf("the schedule has gone on to %v", next)
	}
	at := s.now().Add(short)
	s.poll("the tick to be due", func() bool {
		runs := s.run("a", "n", long, at)
		if len(runs) == 1 && runs[0].Claimed.Before(at) {
			s.Errorf("a tick of %v was granted at %v", at, runs[0].Claimed)
		}
		return len(runs) == 1
	})
	// A schedule that has no more ticks has no plan.
	req := request("a", "n")
	req.Decisions = []schedule.Decision{{Name: "n", Version: p.Version, From: s.plan("n").Next}}
	if plans := s.claim(req).Plans; len(plans) != 0 {
		s.Errorf("a schedule that has ended has the plan %+v", plans)
	}
	if st := s.status("n"); !st.Next.IsZero() {
		s.Errorf("its next tick is %v", st.Next)
	}
}

func handlersAreSeparate(s suite) {
	p := s.define(schedule.Definition{Name: "n", Handler: "n"})
	s.must(s.store.Trigger(s.Context(), schedule.Trigger{Name: "n"}))
	req := request("a", "other")
	req.Decisions = []schedule.Decision{decision(p, p.Since.Add(-time.Second))}
	if c := s.claim(req); len(c.Plans)+len(c.Runs) != 0 {
		s.Fatalf("an instance without the handler has the claim %+v", c)
	}
	s.must(s.store.Define(s.Context(), schedule.Definition{Name: "m", Handler: "other", Spec: "@hourly"}))
	s.must(s.store.Trigger(s.Context(), schedule.Trigger{Name: "m"}))
	if r := s.one(s.claim(request("a", "other")).Runs); r.Schedule.Name != "m" || r.Schedule.Handler != "other" {
		s.Errorf("the run is of %+v", r.Schedule)
	}
	s.one(s.claim(request("a", "n", "other")).Runs)
}

// No more runs are granted than there are slots; the others wait for any
// instance, whatever the overlap policy.
func slots(s suite) {
	req := request("a", "h")
	for _, name := range []string{"x", "y", "z"} {
		s.must(s.store.Define(s.Context(), schedule.Definition{Name: name, Handler: "h", Spec: "every 1h"}))
	}
	c := s.claim(req)
	for _, p := range c.Plans {
		req.Decisions = append(req.Decisions, decision(p, p.Since.Add(-time.Second)))
	}
	req.Slots = 2
	c = s.claim(req)
	if len(c.Runs) != 2 {
		s.Fatalf("%d runs are granted, want 2", len(c.Runs))
	}
	req.Decisions = nil
	req.Slots = 0
	s.none(s.claim(req).Runs)
	req.Slots = 2
	req.Busy = []string{"x", "y", "z"}
	s.none(s.claim(req).Runs)
	req.Busy = []string{c.Runs[0].Schedule.Name}
	third := s.one(s.claim(req).Runs)
	for _, r := range c.Runs {
		if r.ID == third.ID || r.Schedule.Name == third.Schedule.Name {
			s.Errorf("%q was granted twice", r.Schedule.Name)
		}
	}
	// Of one schedule, too.
	p := s.define(schedule.Definition{Name: "many", Overlap: schedule.OverlapAllow})
	req = request("a", "many")
	at := p.Since.Add(-time.Minute)
	req.PerSchedule = 2
	req.Decisions = []schedule.Decision{decision(p, at, at.Add(time.Second), at.Add(2*time.Second), at.Add(3*time.Second), at.Add(4*time.Second))}
	if n := len(s.claim(req).Runs); n < 2 || n > 4 { // those of the ticks, and as many that wait
		s.Errorf("%d runs of one schedule are granted, want 2 to 4", n)
	}
}

func unknown(s suite) {
	s.define(schedule.Definition{Name: "n"})
	s.must(s.store.Define(s.Context(), schedule.Definition{Name: "m", Spec: "@hourly"}))
	req := request("a", "n", "m")
	req.Unknown = []string{"m"}
	if plans := s.claim(req).Plans; len(plans) != 1 || plans[0].Name != "n" {
		s.Errorf("the plans are %+v, want that of n", plans)
	}
}

func overlapSkip(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	at := p.Since.Add(-time.Hour)
	first := s.one(s.run("a", "n", long, at))
	s.none(s.run("b", "n", long, at.Add(time.Second)))
	s.expect("n", schedule.Running, schedule.Skipped)
	s.finish(first, schedule.Outcome{State: schedule.Waiting, Err: "once more", RetryIn: time.Hour})
	s.none(s.run("b", "n", long, at.Add(2*time.Second))) // a retry is to come
	s.expect("n", schedule.Waiting, schedule.Skipped, schedule.Skipped)
	p = s.define(schedule.Definition{Name: "m"})
	s.finish(s.one(s.run("a", "m", long, p.Since.Add(-time.Hour))), done)
	s.one(s.run("b", "m", long, p.Since.Add(-time.Minute)))
}

func overlapQueue(s suite) {
	p := s.define(schedule.Definition{Name: "n", Overlap: schedule.OverlapQueue})
	at := p.Since.Add(-time.Hour)
	first := s.one(s.run("a", "n", long, at))
	for i := range 3 {
		s.none(s.run("b", "n", long, at.Add(time.Duration(i+1)*time.Second)))
	}
	s.expect("n", schedule.Running, schedule.Waiting, schedule.Skipped, schedule.Skipped)
	s.none(s.claim(request("b", "n")).Runs)
	if !s.finish(first, done) {
		s.Error("Finish does not tell of the run that waits")
	}
	second := s.one(s.claim(request("b", "n")).Runs)
	if !second.Tick.Equal(at.Add(time.Second)) {
		s.Errorf("the tick %v runs, want %v", second.Tick, at.Add(time.Second))
	}
	if s.finish(second, done) {
		s.Error("Finish tells of a run that waits, and none does")
	}
}

func overlapAllow(s suite) {
	p := s.define(schedule.Definition{Name: "n", Overlap: schedule.OverlapAllow})
	at := p.Since.Add(-time.Hour)
	for i := range 3 {
		s.one(s.run("a", "n", long, at.Add(time.Duration(i)*time.Second)))
	}
	s.expect("n", schedule.Running, schedule.Running, schedule.Running)
}

// However many instances decide, trigger and claim at once: of a schedule
// without overlap, one run is given out.
func overlapUnderConcurrency(s suite) {
	for _, policy := range []schedule.Overlap{schedule.OverlapSkip, schedule.OverlapQueue} {
		name := string(policy)
		start := s.define(schedule.Definition{Name: name, Overlap: policy}).Since.Add(-time.Hour)
		for round := range 20 {
			plan := s.plan(name)
			var mu sync.Mutex
			var granted []schedule.Run
			race(8, func(i int) {
				req := request(fmt.Sprint("instance ", i), name)
				if i == 0 && round%2 == 0 {
					s.check(s.store.Trigger(s.Context(), schedule.Trigger{Name: name}))
				} else {
					req.Decisions = []schedule.Decision{decision(plan, start.Add(time.Duration(round*1000+i)*time.Millisecond))}
				}
				runs := s.try(req).Runs
				mu.Lock()
				defer mu.Unlock()
				granted = append(granted, runs...)
			})
			if len(granted) > 1 {
				s.Fatalf("%s: %d runs are given out at once", policy, len(granted))
			}
			s.poll("all runs to end", func() bool {
				for _, r := range granted {
					s.finish(r, done)
				}
				granted = s.claim(request("last", name)).Runs
				st := s.status(name)
				return st.Running+st.Waiting == 0
			})
		}
	}
}

// Ticks that are found together, after a stall of all instances, run one after
// the other; none of them skips the next.
func ticksTogetherRunInOrder(s suite) {
	for _, policy := range []schedule.Overlap{schedule.OverlapSkip, schedule.OverlapQueue} {
		name := string(policy)
		p := s.define(schedule.Definition{Name: name, Overlap: policy})
		at := p.Since.Add(-time.Hour)
		runs := s.run("a", name, long, at, at.Add(time.Second), at.Add(2*time.Second))
		var order []time.Time
		for len(runs) > 0 {
			r := s.one(runs)
			order = append(order, r.Tick)
			s.none(s.claim(request("b", name)).Runs)
			s.finish(r, done)
			runs = s.claim(request("b", name)).Runs
		}
		if len(order) != 3 || !slices.IsSortedFunc(order, time.Time.Compare) {
			s.Errorf("%s: the ticks %v ran, want 3 in order", policy, order)
		}
	}
	p := s.define(schedule.Definition{Name: "allow", Overlap: schedule.OverlapAllow})
	at := p.Since.Add(-time.Hour)
	if n := len(s.run("a", "allow", long, at, at.Add(time.Second), at.Add(2*time.Second))); n != 3 {
		s.Errorf("%d of 3 ticks run at once", n)
	}
}

func backfillIsNotSkipped(s suite) {
	for _, policy := range []schedule.Overlap{schedule.OverlapSkip, schedule.OverlapQueue} {
		name := string(policy)
		p := s.define(schedule.Definition{Name: name, Overlap: policy})
		at := p.Since.Add(-time.Hour)
		first := s.one(s.run("a", name, long, at))
		d := decision(s.plan(name), at.Add(time.Second), at.Add(2*time.Second))
		d.Ticks[0].Late, d.Ticks[1].Late, d.Ticks[0].Missed = true, true, 3
		req := request("b", name)
		req.Decisions = []schedule.Decision{d}
		s.none(s.claim(req).Runs)
		s.finish(first, done)
		second := s.one(s.claim(request("b", name)).Runs)
		if !second.Tick.Equal(at.Add(time.Second)) || second.Missed != 3 {
			s.Errorf("%s: the run is %+v", policy, second)
		}
		s.finish(second, done)
		s.finish(s.one(s.claim(request("b", name)).Runs), done)
		s.expect(name, schedule.Done, schedule.Done, schedule.Done)
	}
}
