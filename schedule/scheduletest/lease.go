package scheduletest

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/schedule"
)

// refused expects everything that the owner of a run may try to be refused.
func (s suite) refused(r schedule.Run) {
	s.Helper()
	kept, lost, err := s.store.Extend(s.Context(), []schedule.Ref{ref(r)}, long)
	if err != nil || len(kept) != 0 || len(lost) != 1 || lost[0] != ref(r) {
		s.Fatalf("Extend of attempt %d, which is over = %v, %v, %v; want it lost", r.Attempt, kept, lost, err)
	}
	for _, o := range []schedule.Outcome{done, {State: schedule.Failed, Err: "stale"}, {State: schedule.Waiting, Err: "stale"}} {
		if _, err := s.store.Finish(s.Context(), ref(r), o); !errors.Is(err, schedule.ErrLeaseLost) {
			s.Fatalf("Finish of attempt %d as %s = %v, want ErrLeaseLost", r.Attempt, o.State, err)
		}
	}
}

// takeOver claims until a run is granted, which must not be before the time at
// which its lease was last asked for plus the lease.
func (s suite) takeOver(instance, name string, lease time.Duration, free time.Time) schedule.Run {
	s.Helper()
	req := request(instance, name)
	req.Lease = lease
	var runs []schedule.Run
	s.poll("the lease to end", func() bool {
		c := s.claim(req)
		if len(c.Runs) > 0 && time.Now().Before(free) {
			s.Fatalf("the run was granted %v before its lease ended", time.Until(free))
		}
		if now := time.Now(); len(c.Runs) == 0 && now.Before(free) && (c.Next.IsZero() || c.Next.Sub(c.Now) > short) {
			s.Errorf("the next look is told to be at %v, want within %v of %v", c.Next, short, c.Now)
		}
		runs = c.Runs
		return len(runs) > 0
	})
	return s.one(runs)
}

func finish(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	at := p.Since.Add(-time.Minute)
	r := s.one(s.run("a", "n", long, at))
	if !r.Tick.Equal(at) || !r.Due.Equal(at) || r.Attempt != 1 || r.Failures != 0 || r.Manual || r.Claimed.Before(p.Since) || r.ID == "" {
		s.Errorf("the run is %+v", r)
	}
	for range 3 { // after a lost reply
		s.finish(r, done)
	}
	if _, err := s.store.Finish(s.Context(), ref(r), schedule.Outcome{State: schedule.Failed, Err: "no"}); !errors.Is(err, schedule.ErrLeaseLost) {
		s.Errorf("Finish of a run that is done, as failed = %v, want ErrLeaseLost", err)
	}
	if _, err := s.store.Finish(s.Context(), schedule.Ref{ID: <-ticks, Attempt: 1}, done); !errors.Is(err, schedule.ErrLeaseLost) {
		s.Errorf("Finish of no run = %v, want ErrLeaseLost", err)
	}
	records, err := s.store.Runs(s.Context(), "n", 10)
	if err != nil || len(records) != 1 {
		s.Fatalf("Runs = %+v, %v", records, err)
	}
	rec := records[0]
	if rec.State != schedule.Done || rec.Instance != "a" || rec.ID != r.ID || rec.Started.IsZero() || rec.Finished.Before(rec.Started) || rec.Err != "" || rec.Attempt != 1 {
		s.Errorf("the record is %+v", rec)
	}
	failed := s.one(s.run("a", "n", long, at.Add(time.Second)))
	s.finish(failed, schedule.Outcome{State: schedule.Failed, Err: "out of paper"})
	if records, err = s.store.Runs(s.Context(), "n", 1); err != nil || records[0].State != schedule.Failed || records[0].Err != "out of paper" {
		s.Errorf("the record of a failure is %+v, %v", records, err)
	}
}

func retry(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	first := s.one(s.run("a", "n", long, p.Since.Add(-time.Minute)))
	again := schedule.Outcome{State: schedule.Waiting, Err: "busy", RetryIn: short}
	sent := time.Now()
	s.finish(first, again)
	second := s.takeOver("b", "n", long, sent.Add(short))
	if second.ID != first.ID || second.Attempt != 2 || second.Failures != 1 || !second.Tick.Equal(first.Tick) {
		s.Errorf("the second attempt is %+v", second)
	}
	s.refused(first)
	s.finish(second, schedule.Outcome{State: schedule.Waiting}) // given back
	third := s.one(s.claim(request("c", "n")).Runs)
	if third.Attempt != 3 || third.Failures != 1 {
		s.Errorf("the third attempt is %+v; what is given back is no failure", third)
	}
	s.finish(third, done)
	records, err := s.store.Runs(s.Context(), "n", 10)
	if err != nil || len(records) != 1 || records[0].Attempt != 3 || records[0].Err != "busy" || records[0].Instance != "c" {
		s.Errorf("the record is %+v, %v", records, err)
	}
}

func leaseEndsThenTakeover(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	sent := time.Now()
	first := s.one(s.run("a", "n", short, p.Since.Add(-time.Minute)))
	second := s.takeOver("b", "n", long, sent.Add(short))
	if second.ID != first.ID || second.Attempt != 2 || second.Failures != 0 {
		s.Errorf("the run that was taken over is %+v", second)
	}
	s.refused(first)
	s.none(s.claim(request("c", "n")).Runs)
	s.finish(second, done)
	s.refused(first)
	s.expect("n", schedule.Done)
}

func oneOfManyTakesOver(s suite) {
	p := s.define(schedule.Definition{Name: "n", Overlap: schedule.OverlapAllow})
	for i := range 10 {
		s.one(s.run("dead", "n", 1, p.Since.Add(-time.Hour).Add(time.Duration(i)*time.Second)))
		s.poll("the lease to end", func() bool {
			var mu sync.Mutex
			var runs []schedule.Run
			race(8, func(j int) {
				got := s.try(request(fmt.Sprint("instance ", j), "n")).Runs
				mu.Lock()
				defer mu.Unlock()
				runs = append(runs, got...)
			})
			if len(runs) > 1 {
				s.Fatalf("a run was taken over %d times at once", len(runs))
			}
			for _, r := range runs {
				s.finish(r, done)
			}
			return len(runs) == 1
		})
	}
}

// An owner that comes late, while nobody has taken the run over, did the work
// all the same.
func lateOwnerMayFinish(s suite) {
	for _, name := range []string{"finish", "extend", "over"} {
		s.must(s.store.Define(s.Context(), schedule.Definition{Name: name, Spec: "every 1h"}))
	}
	runs := make(map[string]schedule.Run)
	sent := time.Now()
	for _, name := range []string{"finish", "extend", "over"} { // "over" is the last to end
		runs[name] = s.one(s.run("a", name, short, s.plan(name).Since.Add(-time.Minute)))
	}
	s.takeOver("b", "over", long, sent.Add(short))
	s.finish(runs["finish"], done)
	kept, lost, err := s.store.Extend(s.Context(), []schedule.Ref{ref(runs["extend"]), ref(runs["over"])}, long)
	if err != nil || len(kept) != 1 || kept[0] != ref(runs["extend"]) || len(lost) != 1 || lost[0] != ref(runs["over"]) {
		s.Errorf("Extend = kept %v, lost %v, %v", kept, lost, err)
	}
	s.none(s.claim(request("b", "extend", "finish")).Runs)
}

func extendKeepsTheRun(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	r := s.one(s.run("a", "n", short, p.Since.Add(-time.Minute)))
	kept, _, err := s.store.Extend(s.Context(), []schedule.Ref{ref(r)}, long)
	if err != nil || len(kept) != 1 {
		s.Fatalf("Extend = %v, %v", kept, err)
	}
	for start := time.Now(); time.Since(start) < 2*short; time.Sleep(short / 10) {
		s.none(s.claim(request("b", "n")).Runs)
	}
	sent := time.Now()
	s.must(nil, func() error { _, _, err := s.store.Extend(s.Context(), []schedule.Ref{ref(r)}, short); return err }())
	s.takeOver("b", "n", long, sent.Add(short))
	if kept, lost, err := s.store.Extend(s.Context(), nil, long); err != nil || len(kept)+len(lost) != 0 {
		s.Errorf("Extend of nothing = %v, %v, %v", kept, lost, err)
	}
}

func atMostOnce(s suite) {
	p := s.define(schedule.Definition{Name: "n", AtMostOnce: true})
	r := s.one(s.run("a", "n", short, p.Since.Add(-time.Minute)))
	s.poll("the run to be lost", func() bool {
		s.none(s.claim(request("b", "n")).Runs)
		return s.states("n")[0] == schedule.Lost
	})
	s.refused(r)
	s.one(s.run("b", "n", long, p.Since.Add(-time.Second))) // it does not hold the next one up
}

// A run of which one instance after the other dies is not given to a sixth.
func fiveDeaths(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	r := s.one(s.run("a", "n", 1, p.Since.Add(-time.Minute)))
	for r.Attempt < 6 {
		r = s.takeOver("a", "n", 1, time.Time{})
	}
	s.poll("the run to be lost", func() bool {
		s.none(s.claim(request("b", "n")).Runs)
		return s.states("n")[0] == schedule.Lost
	})
	if records, err := s.store.Runs(s.Context(), "n", 1); err != nil || records[0].Err == "" || records[0].Finished.IsZero() {
		s.Errorf("the record is %+v, %v", records, err)
	}
}

func triggerOnce(s suite) {
	s.define(schedule.Definition{Name: "n", Payload: []byte("usual")})
	s.define(schedule.Definition{Name: "m"})
	var mu sync.Mutex
	ids := make(map[string]bool)
	race(8, func(int) {
		id, err := s.store.Trigger(s.Context(), schedule.Trigger{Name: "n", Key: "order 7", Payload: []byte("special")})
		s.check(id, err)
		mu.Lock()
		defer mu.Unlock()
		ids[id] = true
	})
	if len(ids) != 1 {
		s.Fatalf("one key gave the IDs %v", ids)
	}
	r := s.one(s.claim(request("a", "n")).Runs)
	if !ids[r.ID] || string(r.Payload) != "special" || !r.Manual {
		s.Errorf("the run is %+v", r)
	}
	s.finish(r, done)
	if id, err := s.store.Trigger(s.Context(), schedule.Trigger{Name: "n", Key: "order 7"}); err != nil || id != r.ID {
		s.Errorf("after the run the key gave %q, %v; want %q", id, err, r.ID)
	}
	if id, err := s.store.Trigger(s.Context(), schedule.Trigger{Name: "m", Key: "order 7"}); err != nil || id == r.ID {
		s.Errorf("for another schedule the key gave %q, %v", id, err)
	}
	s.must(s.store.Trigger(s.Context(), schedule.Trigger{Name: "n"}))
	if r := s.one(s.claim(request("a", "n")).Runs); string(r.Payload) != "usual" {
		s.Errorf("without a payload the run has %q", r.Payload)
	}
	if _, err := s.store.Trigger(s.Context(), schedule.Trigger{Name: "nobody", Key: "k"}); !errors.Is(err, schedule.ErrNotFound) {
		s.Errorf("Trigger of no schedule = %v, want ErrNotFound", err)
	}
}

func triggerWaitsItsTurn(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	r := s.one(s.run("a", "n", long, p.Since.Add(-time.Minute)))
	first, err := s.store.Trigger(s.Context(), schedule.Trigger{Name: "n"})
	s.ok(err)
	s.must(s.store.Trigger(s.Context(), schedule.Trigger{Name: "n"}))
	s.none(s.claim(request("b", "n")).Runs)
	s.finish(r, done)
	second := s.one(s.claim(request("b", "n")).Runs)
	if second.ID != first {
		s.Errorf("the run is %s, want the first that was asked for, %s", second.ID, first)
	}
	s.none(s.claim(request("c", "n")).Runs)
	s.finish(second, done)
	s.one(s.claim(request("c", "n")).Runs)
}

func prune(s suite) {
	p := s.define(schedule.Definition{Name: "n", Overlap: schedule.OverlapAllow})
	s.define(schedule.Definition{Name: "m"})
	at := p.Since.Add(-time.Hour)
	for i := range 5 {
		s.finish(s.one(s.run("a", "n", long, at.Add(time.Duration(i)*time.Second))), done)
	}
	s.one(s.run("a", "n", long, at.Add(-time.Hour))) // goes on, and is of an earlier tick
	s.finish(s.one(s.run("a", "m", long, at)), done)
	removed := func(keep time.Duration, limit, want int) {
		s.Helper()
		if n, err := s.store.Prune(s.Context(), keep, limit); err != nil || n != want {
			s.Fatalf("Prune(%v, %d) = %d, %v; want %d", keep, limit, n, err, want)
		}
	}
	removed(time.Hour, 10, 0)
	removed(0, 3, 3)
	removed(0, 10, 1)
	removed(0, 10, 0)
	s.expect("n", schedule.Running, schedule.Done)
	s.expect("m", schedule.Done)
	s.ok(s.store.Remove(s.Context(), "m"))
	removed(0, 10, 1)
	s.expect("m")
}
