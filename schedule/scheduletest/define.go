package scheduletest

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"time"

	"github.com/ashlar-go/ashlar/schedule"
)

func defineAgainChangesNothing(s suite) {
	d := schedule.Definition{
		Name: "report", Spec: "30 4 * * MON-FRI", Zone: "Europe/Berlin", Handler: "reports", Payload: []byte("tenant 7"),
		Misfire: schedule.MisfireBackfill, Backfill: 3, Grace: time.Minute, Overlap: schedule.OverlapQueue, Jitter: time.Second,
		Timeout: time.Hour, Attempts: 5, RetryBase: time.Second, RetryMax: time.Minute, AtMostOnce: true, Revision: 2,
	}
	for i := range 3 {
		changed, err := s.store.Define(s.Context(), d)
		if err != nil || changed != (i == 0) {
			s.Fatalf("Define for the %dth time = %v, %v", i+1, changed, err)
		}
	}
	req := request("a", "reports")
	before := s.claim(req).Plans[0]
	at := s.now().Add(-time.Second)
	req.Decisions = []schedule.Decision{decision(before, at)}
	s.claim(req)
	after := s.claim(request("a", "reports")).Plans[0]
	if changed, err := s.store.Define(s.Context(), d); changed || err != nil {
		s.Fatalf("Define after a tick = %v, %v", changed, err)
	}
	again := s.claim(request("a", "reports")).Plans[0]
	if !again.Next.Equal(after.Next) || again.Next.IsZero() || again.Version != before.Version {
		s.Errorf("after Define the next tick is %v in version %d, want %v in version %d", again.Next, again.Version, after.Next, before.Version)
	}
	got := again.Definition
	if !bytes.Equal(got.Payload, d.Payload) {
		s.Errorf("the payload is %q, want %q", got.Payload, d.Payload)
	}
	got.Payload, d.Payload = nil, nil
	got.Zone, got.Handler = d.Zone, d.Handler
	for name, equal := range map[string]bool{
		"name": got.Name == d.Name, "spec": got.Spec == d.Spec, "misfire": got.Misfire == d.Misfire, "backfill": got.Backfill == d.Backfill,
		"grace": got.Grace == d.Grace, "overlap": got.Overlap == d.Overlap, "jitter": got.Jitter == d.Jitter, "timeout": got.Timeout == d.Timeout,
		"attempts": got.Attempts == d.Attempts, "retry": got.RetryBase == d.RetryBase && got.RetryMax == d.RetryMax,
		"at most once": got.AtMostOnce == d.AtMostOnce, "revision": got.Revision == d.Revision,
	} {
		if !equal {
			s.Errorf("the %s is not what was defined: %+v", name, got)
		}
	}
}

func changeTakesEffectFromThenOn(s suite) {
	p := s.define(schedule.Definition{Name: "n", Revision: 5})
	at := p.Since.Add(-time.Hour)
	s.finish(s.one(s.run("a", "n", long, at)), done)
	planned := s.plan("n")
	change := func(d schedule.Definition) (changed bool) {
		s.Helper()
		changed, err := s.store.Define(s.Context(), d)
		if err != nil {
			s.Fatal(err)
		}
		return changed
	}
	if change(schedule.Definition{Name: "n", Spec: "every 1m", Revision: 4}) {
		s.Error("an older revision changed the definition")
	}
	if !change(schedule.Definition{Name: "n", Spec: "every 1h", Revision: 5, Payload: []byte("new")}) {
		s.Error("a new payload changed nothing")
	}
	kept := s.plan("n")
	if !kept.Next.Equal(planned.Next) || kept.Version <= planned.Version {
		s.Errorf("a new payload gave the plan %v in version %d, want %v in a later one than %d", kept.Next, kept.Version, planned.Next, planned.Version)
	}
	before := s.now()
	if !change(schedule.Definition{Name: "n", Spec: "every 1m", Revision: 6}) {
		s.Error("a new spec changed nothing")
	}
	anew := s.plan("n")
	if !anew.Next.IsZero() || anew.Since.Before(before) {
		s.Errorf("a new spec is planned from %v (next %v), want from %v", anew.Since, anew.Next, before)
	}
}

func hostile(s suite) {
	good := schedule.Definition{Name: "n", Spec: "every 1h"}
	for what, breakIt := range map[string]func(d *schedule.Definition){
		"no name":         func(d *schedule.Definition) { d.Name = "" },
		"long name":       func(d *schedule.Definition) { d.Name = strings.Repeat("x", 256) },
		"NUL":             func(d *schedule.Definition) { d.Name = "a\x00b" },
		"no UTF-8":        func(d *schedule.Definition) { d.Handler = "\xff" },
		"no spec":         func(d *schedule.Definition) { d.Spec = "" },
		"bad spec":        func(d *schedule.Definition) { d.Spec = "every day" },
		"30th February":   func(d *schedule.Definition) { d.Spec = "30 2 30 2 *" },
		"no zone":         func(d *schedule.Definition) { d.Zone = "Mars/Olympus" },
		"zone is a path":  func(d *schedule.Definition) { d.Zone = "../../etc/passwd" },
		"misfire":         func(d *schedule.Definition) { d.Misfire = "often" },
		"overlap":         func(d *schedule.Definition) { d.Overlap = "never" },
		"backfill":        func(d *schedule.Definition) { d.Misfire = schedule.MisfireBackfill },
		"much backfill":   func(d *schedule.Definition) { d.Misfire, d.Backfill = schedule.MisfireBackfill, 1001 },
		"needless":        func(d *schedule.Definition) { d.Backfill = 1 },
		"negative grace":  func(d *schedule.Definition) { d.Grace = -1 },
		"negative jitter": func(d *schedule.Definition) { d.Jitter = -1 },
		"attempts":        func(d *schedule.Definition) { d.Attempts = -1 },
		"endless timeout": func(d *schedule.Definition) { d.Timeout = 1<<63 - 1 },
	} {
		d := good
		breakIt(&d)
		if changed, err := s.store.Define(s.Context(), d); changed || !errors.Is(err, schedule.ErrInvalid) {
			s.Errorf("%s: Define = %v, %v; want ErrInvalid", what, changed, err)
		}
	}
	for _, name := range []string{`'; DROP TABLE schedule_run; --`, `"quoted" \ 日本語 %s $1`, strings.Repeat("ä", 127)} {
		p := s.define(schedule.Definition{Name: name, Payload: []byte("\x00\xff")})
		r := s.one(s.run("a", name, long, p.Since.Add(-time.Second)))
		if r.Schedule.Name != name || string(r.Payload) != "\x00\xff" {
			s.Errorf("the run is of %q with the payload %q", r.Schedule.Name, r.Payload)
		}
	}
	if _, err := s.store.Trigger(s.Context(), schedule.Trigger{Name: "n", Key: "a\x00b"}); !errors.Is(err, schedule.ErrInvalid) {
		s.Errorf("Trigger with a NUL in its key = %v, want ErrInvalid", err)
	}
}

func pauseAndResume(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	s.ok(s.store.Pause(s.Context(), "n"))
	s.ok(s.store.Pause(s.Context(), "n"))
	req := request("a", "n")
	req.Decisions = []schedule.Decision{decision(p, p.Since.Add(-time.Second))}
	if c := s.claim(req); len(c.Plans)+len(c.Runs) != 0 {
		s.Errorf("a paused schedule has the claim %+v", c)
	}
	s.must(s.store.Define(s.Context(), schedule.Definition{Name: "n", Spec: "every 2h"}))
	if st := s.status("n"); !st.Paused || st.Spec != "every 2h" {
		s.Errorf("Define ended the pause: %+v", st)
	}
	id, err := s.store.Trigger(s.Context(), schedule.Trigger{Name: "n"})
	s.ok(err)
	r := s.one(s.claim(request("a", "n")).Runs)
	if r.ID != id {
		s.Errorf("the run has the ID %s, want %s", r.ID, id)
	}
	before := s.now()
	s.ok(s.store.Resume(s.Context(), "n"))
	resumed := s.plan("n")
	if !resumed.Next.IsZero() || resumed.Since.Before(before) {
		s.Errorf("after Resume the plan goes on from %v, next %v; want from %v", resumed.Since, resumed.Next, before)
	}
	s.ok(s.store.Resume(s.Context(), "n"))
	if again := s.plan("n"); again.Version != resumed.Version || !again.Since.Equal(resumed.Since) {
		s.Error("a Resume of what is not paused changed the plan")
	}
	for _, f := range []func(context.Context, string) error{s.store.Pause, s.store.Resume, s.store.Remove} {
		if err := f(s.Context(), "nobody"); !errors.Is(err, schedule.ErrNotFound) {
			s.Errorf("the error for an unknown name is %v, want ErrNotFound", err)
		}
	}
}

func (s suite) status(name string) schedule.Status {
	s.Helper()
	all, err := s.store.List(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	for _, st := range all {
		if st.Name == name {
			return st
		}
	}
	s.Fatalf("List has no %q", name)
	return schedule.Status{}
}

func remove(s suite) {
	p := s.define(schedule.Definition{Name: "n"})
	r := s.one(s.run("a", "n", long, p.Since.Add(-time.Second)))
	s.must(s.store.Trigger(s.Context(), schedule.Trigger{Name: "n"})) // waits
	s.ok(s.store.Remove(s.Context(), "n"))
	if c := s.claim(request("a", "n")); len(c.Plans)+len(c.Runs) != 0 {
		s.Errorf("a schedule that was removed has the claim %+v", c)
	}
	s.finish(r, done)
	s.expect("n", schedule.Done)
	p = s.define(schedule.Definition{Name: "n"})
	s.one(s.run("a", "n", long, p.Since.Add(-2*time.Second)))
}

func list(s suite) {
	p := s.define(schedule.Definition{Name: "b", Overlap: schedule.OverlapAllow})
	s.must(s.store.Define(s.Context(), schedule.Definition{Name: "a", Spec: "@daily"}))
	at := p.Since.Add(-time.Hour)
	req := request("x", "b")
	d := decision(p, at, at.Add(time.Second), at.Add(2*time.Second), at.Add(3*time.Second))
	d.Missed = 7
	req.Decisions = []schedule.Decision{d}
	runs := s.claim(req).Runs
	if len(runs) != 4 {
		s.Fatalf("%d runs", len(runs))
	}
	s.finish(runs[0], done)
	s.finish(runs[1], schedule.Outcome{State: schedule.Failed, Err: "no"})
	s.finish(runs[2], schedule.Outcome{State: schedule.Lost, Err: "gone"})
	s.must(s.store.Trigger(s.Context(), schedule.Trigger{Name: "b"}))
	all, err := s.store.List(s.Context())
	if err != nil || len(all) != 2 || all[0].Name != "a" || all[1].Name != "b" {
		s.Fatalf("List = %+v, %v", all, err)
	}
	st := all[1]
	if st.Running != 1 || st.Waiting != 1 || st.Failing != 2 || st.Last != schedule.Lost || !st.LastRun.Equal(runs[2].Tick) ||
		st.Missed != 7 || !st.Next.Equal(d.Next) || st.Paused {
		s.Errorf("the status is %+v", st)
	}
	if st := all[0]; st.Last != "" || !st.LastRun.IsZero() || !st.Next.IsZero() || st.Lag != 0 {
		s.Errorf("the status of what never ran is %+v", st)
	}
	records, err := s.store.Runs(s.Context(), "b", 2)
	if err != nil || len(records) != 2 || !records[0].Manual || !records[1].Tick.Equal(runs[3].Tick) {
		s.Errorf("Runs = %+v, %v", records, err)
	}
	s.finish(runs[3], done)
	if st := s.status("b"); st.Failing != 0 || st.Last != schedule.Done {
		s.Errorf("after a success the status is %+v", st)
	}
}

func payloads(s suite) {
	big := bytes.Repeat([]byte{0, 1, 2, 255}, 1<<18)
	for name, payload := range map[string][]byte{"none": nil, "empty": {}, "big": big} {
		p := s.define(schedule.Definition{Name: name, Payload: payload})
		if r := s.one(s.run("a", name, long, p.Since.Add(-time.Second))); !bytes.Equal(r.Payload, payload) {
			s.Errorf("the %s payload came as %d bytes", name, len(r.Payload))
		}
	}
}

func cancelledContext(s suite) {
	s.define(schedule.Definition{Name: "n"})
	ctx, cancel := context.WithCancel(s.Context())
	cancel()
	for name, f := range map[string]func() error{
		"Define": func() error {
			_, err := s.store.Define(ctx, schedule.Definition{Name: "x", Spec: "@daily"})
			return err
		},
		"Remove":  func() error { return s.store.Remove(ctx, "n") },
		"Pause":   func() error { return s.store.Pause(ctx, "n") },
		"Resume":  func() error { return s.store.Resume(ctx, "n") },
		"Trigger": func() error { _, err := s.store.Trigger(ctx, schedule.Trigger{Name: "n"}); return err },
		"List":    func() error { _, err := s.store.List(ctx); return err },
		"Runs":    func() error { _, err := s.store.Runs(ctx, "n", 1); return err },
		"Claim":   func() error { _, err := s.store.Claim(ctx, request("a", "n")); return err },
		"Extend": func() error {
			_, _, err := s.store.Extend(ctx, []schedule.Ref{{ID: <-ticks, Attempt: 1}}, long)
			return err
		},
		"Finish": func() error { _, err := s.store.Finish(ctx, schedule.Ref{ID: <-ticks, Attempt: 1}, done); return err },
		"Prune":  func() error { _, err := s.store.Prune(ctx, 0, 1); return err },
	} {
		if err := f(); !errors.Is(err, context.Canceled) {
			s.Errorf("%s with a context that has ended = %v, want context.Canceled", name, err)
		}
	}
	s.expect("n")
}
