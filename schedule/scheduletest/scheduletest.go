// Package scheduletest is the conformance suite of the schedule package: what
// every [schedule.Store] must keep, and the methods of those who define
// schedules.
package scheduletest

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/schedule"
)

// A Store is what a backend has.
type Store interface {
	schedule.Store
	Define(ctx context.Context, d schedule.Definition) (changed bool, err error)
	Remove(ctx context.Context, name string) error
	Pause(ctx context.Context, name string) error
	Resume(ctx context.Context, name string) error
	Trigger(ctx context.Context, t schedule.Trigger) (id string, err error)
	List(ctx context.Context) ([]schedule.Status, error)
	Runs(ctx context.Context, name string, limit int) ([]schedule.Record, error)
}

// TestStore runs the suite. For each test it calls open, which returns a store
// that holds nothing yet, and frees what it needs with t.Cleanup.
func TestStore(t *testing.T, open func(t *testing.T) Store) {
	for _, test := range []struct {
		name string
		f    func(s suite)
	}{
		{"DefineAgainChangesNothing", defineAgainChangesNothing},
		{"ChangeTakesEffectFromThenOn", changeTakesEffectFromThenOn},
		{"Hostile", hostile},
		{"PauseAndResume", pauseAndResume},
		{"Remove", remove},
		{"List", list},
		{"Payloads", payloads},
		{"CancelledContext", cancelledContext},
		{"OneRowForATick", oneRowForATick},
		{"TickThatHasARow", tickThatHasARow},
		{"StaleDecision", staleDecision},
		{"NotDue", notDue},
		{"HandlersAreSeparate", handlersAreSeparate},
		{"Slots", slots},
		{"Unknown", unknown},
		{"OverlapSkip", overlapSkip},
		{"OverlapQueue", overlapQueue},
		{"OverlapAllow", overlapAllow},
		{"OverlapUnderConcurrency", overlapUnderConcurrency},
		{"TicksTogetherRunInOrder", ticksTogetherRunInOrder},
		{"BackfillIsNotSkipped", backfillIsNotSkipped},
		{"Finish", finish},
		{"Retry", retry},
		{"LeaseEndsThenTakeover", leaseEndsThenTakeover},
		{"OneOfManyTakesOver", oneOfManyTakesOver},
		{"LateOwnerMayFinish", lateOwnerMayFinish},
		{"ExtendKeepsTheRun", extendKeepsTheRun},
		{"AtMostOnce", atMostOnce},
		{"FiveDeaths", fiveDeaths},
		{"TriggerOnce", triggerOnce},
		{"TriggerWaitsItsTurn", triggerWaitsItsTurn},
		{"Prune", prune},
		{"RunnersShareTicks", runnersShareTicks},
		{"RunnerHandlesFailures", runnerHandlesFailures},
		{"RunnerDrains", runnerDrains},
	} {
		t.Run(test.name, func(t *testing.T) { test.f(suite{t, open(t)}) })
	}
}

const (
	short = 150 * time.Millisecond // a lease that a test sees end
	long  = time.Minute            // one that it does not
)

// A suite is a store and the test that it is under.
type suite struct {
	*testing.T
	store Store
}

// define defines a schedule whose ticks the test makes up, and returns its plan.
func (s suite) define(d schedule.Definition) schedule.Plan {
	s.Helper()
	if d.Spec == "" {
		d.Spec = "every 1h"
	}
	s.must(s.store.Define(s.Context(), d))
	return s.plan(d.Name)
}

func (s suite) must(_ any, err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s suite) ok(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// check and try are must and claim on any goroutine.
func (s suite) check(_ any, err error) {
	if err != nil {
		s.Error(err)
	}
}

func (s suite) try(req schedule.ClaimRequest) schedule.Claim {
	c, err := s.ask(req)
	s.check(c, err)
	return c
}

// ask claims as a runner does: again, where it is told so.
func (s suite) ask(req schedule.ClaimRequest) (schedule.Claim, error) {
	c, err := s.store.Claim(s.Context(), req)
	if err != nil || !c.Again {
		return c, err
	}
	req.Decisions = nil
	req.Slots -= len(c.Runs)
	rest, err := s.store.Claim(s.Context(), req)
	if rest.Again {
		s.Error("a request without decisions is told to be made again")
	}
	rest.Runs = append(c.Runs, rest.Runs...)
	return rest, err
}

// request is that of an instance with handlers for the names.
func request(instance string, names ...string) schedule.ClaimRequest {
	return schedule.ClaimRequest{
		Instance: instance, Handlers: names, Slots: 10, PerSchedule: 10, Lease: long, Ahead: 100 * 365 * 24 * time.Hour,
	}
}

func (s suite) claim(req schedule.ClaimRequest) schedule.Claim {
	s.Helper()
	c, err := s.ask(req)
	if err != nil {
		s.Fatal(err)
	}
	return c
}

// plan returns the plan of a schedule. It must be one that nothing of waits.
func (s suite) plan(name string) schedule.Plan {
	s.Helper()
	req := request("planner", name)
	req.Slots = 0
	for _, p := range s.claim(req).Plans {
		if p.Name == name {
			return p
		}
	}
	s.Fatalf("no plan of %q", name)
	return schedule.Plan{}
}

// now is the store's clock.
func (s suite) now() time.Time {
	s.Helper()
	req := request("watcher")
	return s.claim(req).Now
}

// decision is to run the ticks of a plan, and then to wait for a day.
func decision(p schedule.Plan, ticks ...time.Time) schedule.Decision {
	d := schedule.Decision{Name: p.Name, Version: p.Version, From: p.Next}
	for _, at := range ticks {
		d.Ticks = append(d.Ticks, tick(at))
		d.Next = at.Add(24 * time.Hour)
	}
	d.NextDue = d.Next
	return d
}

var ticks = make(chan string)

func init() {
	go func() {
		for i := 1; ; i++ {
			ticks <- fmt.Sprintf("00000000-0000-7000-8000-%012d", i)
		}
	}()
}

func tick(at time.Time) schedule.Tick { return schedule.Tick{ID: <-ticks, At: at, Due: at} }

// run has the ticks of a schedule become runs of an instance, and returns those
// it is granted.
func (s suite) run(instance, name string, lease time.Duration, at ...time.Time) []schedule.Run {
	s.Helper()
	req := request(instance, name)
	req.Lease = lease
	req.Decisions = []schedule.Decision{decision(s.plan(name), at...)}
	c, err := s.store.Claim(s.Context(), req)
	s.ok(err)
	return c.Runs
}

// one expects one run.
func (s suite) one(runs []schedule.Run) schedule.Run {
	s.Helper()
	if len(runs) != 1 {
		s.Fatalf("%d runs are granted, want one: %+v", len(runs), runs)
	}
	return runs[0]
}

func (s suite) none(runs []schedule.Run) {
	s.Helper()
	if len(runs) != 0 {
		s.Fatalf("runs are granted, want none: %+v", runs)
	}
}

func ref(r schedule.Run) schedule.Ref { return schedule.Ref{ID: r.ID, Attempt: r.Attempt} }

var done = schedule.Outcome{State: schedule.Done}

func (s suite) finish(r schedule.Run, o schedule.Outcome) (more bool) {
	s.Helper()
	more, err := s.store.Finish(s.Context(), ref(r), o)
	if err != nil {
		s.Fatalf("Finish = %v", err)
	}
	return more
}

// states returns those of the runs of a schedule, the earliest tick first.
func (s suite) states(name string) []schedule.State {
	s.Helper()
	runs, err := s.store.Runs(s.Context(), name, 1000)
	if err != nil {
		s.Fatal(err)
	}
	var out []schedule.State
	for _, r := range runs {
		out = append(out, r.State)
	}
	slices.Reverse(out)
	return out
}

func (s suite) expect(name string, want ...schedule.State) {
	s.Helper()
	if got := s.states(name); !slices.Equal(got, want) {
		s.Fatalf("the runs of %q are %v, want %v", name, got, want)
	}
}

func (s suite) poll(what string, ok func() bool) {
	s.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	s.Fatalf("still waiting for %s after 30 s", what)
}

// race calls f n times at once.
func race(n int, f func(i int)) {
	start, done := make(chan struct{}), make(chan struct{})
	for i := range n {
		go func() {
			defer func() { done <- struct{}{} }()
			<-start
			f(i)
		}()
	}
	close(start)
	for range n {
		<-done
	}
}
