package schedule

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// A loop is one run of a runner: it decides about ticks, claims runs and starts
// them.
type loop struct {
	r        *Runner
	instance string
	handlers map[string]Handler
	names    []string // of the handlers
	keeper   *keeper
	clock    clock
	timings  map[[2]string]timing // by spec and zone
	plans    []Plan
	tried    map[string]time.Time // From of the last decisions
	stalls   int                  // claims in a row that left a due plan as it was
	unknown  map[string]bool      // schedules that cannot be planned here
	forget   time.Time            // when to look at those again
	freed    chan struct{}        // a run has ended, and it may be worth looking

	wg      sync.WaitGroup // of the runs
	mu      sync.Mutex
	running map[string]int // by schedule
	total   int
	full    bool                            // the last claim had no room for more
	cancels map[int]context.CancelCauseFunc // of the runs
	started int
}

// A timing is what a spec was parsed to.
type timing struct {
	Timing
	err error
}

func newLoop(r *Runner, handlers map[string]Handler) *loop {
	l := &loop{
		r: r, instance: instanceName(r.opts.Instance), handlers: handlers,
		timings: make(map[[2]string]timing), unknown: make(map[string]bool),
		freed: make(chan struct{}, 1), running: make(map[string]int), cancels: make(map[int]context.CancelCauseFunc),
		keeper: &keeper{store: r.store, lease: r.opts.Lease, log: r.opts.Logger, held: make(map[Ref]*hold)},
	}
	for name := range handlers {
		l.names = append(l.names, name)
	}
	slices.Sort(l.names)
	return l
}

// run returns when ctx ends, or ErrNotMigrated.
func (l *loop) run(ctx context.Context) error {
	failures := 0
	for ctx.Err() == nil {
		wait := time.Duration(-1) // until a slot is free
		if l.free() > 0 {
			var err error
			if wait, err = l.step(ctx); err != nil {
				if errors.Is(err, ErrNotMigrated) {
					return err
				}
				l.r.opts.Logger.WarnContext(ctx, "schedule: claim failed", "error", err)
				_ = backoff.Sleep(ctx, backoff.Policy{Max: l.r.opts.Poll}.Next(failures)) // ends with ctx, as the loop does
				failures++
				continue
			}
			failures = 0
		}
		l.sleep(ctx, wait)
	}
	return nil
}

func (l *loop) sleep(ctx context.Context, wait time.Duration) {
	var due <-chan time.Time
	if wait >= 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		due = t.C
	}
	select {
	case <-ctx.Done():
	case <-due:
	case <-l.freed:
	case <-l.r.wake:
		clear(l.unknown)
	}
}

// step is one look at the store. It returns how long to wait for the next.
func (l *loop) step(ctx context.Context) (time.Duration, error) {
	req := l.request()
	l.tried = make(map[string]time.Time)
	l.decideAll(&req)
	claim, err := l.claim(ctx, req)
	if err == nil && claim.Again {
		claim, err = l.claim(ctx, l.request())
	}
	if err != nil {
		return 0, err
	}
	l.plans = claim.Plans
	return l.wait(claim), nil
}

func (l *loop) claim(ctx context.Context, req ClaimRequest) (Claim, error) {
	// A claim that was sent is waited for, so that no run is claimed unnoticed.
	sending, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(l.r.opts.Lease, 10*time.Second))
	defer cancel()
	sent := time.Now()
	claim, err := l.r.store.Claim(sending, req)
	if err != nil {
		return claim, err
	}
	if !claim.Again {
		l.clock.told(claim.Now, sent, time.Now())
	}
	for _, run := range claim.Runs {
		l.start(ctx, run, sent.Add(l.r.opts.Lease))
	}
	l.mu.Lock()
	l.full = len(claim.Runs) == req.Slots
	l.mu.Unlock()
	return claim, nil
}

func (l *loop) free() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.r.opts.Concurrency - l.total
}

func (l *loop) request() ClaimRequest {
	if !time.Now().Before(l.forget) {
		clear(l.unknown)
		l.forget = time.Now().Add(10 * time.Second)
	}
	req := ClaimRequest{
		Instance: l.instance, Handlers: l.names, Slots: l.free(), PerSchedule: l.perSchedule(),
		Lease: l.r.opts.Lease, Ahead: 2 * l.r.opts.Poll,
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, n := range l.running {
		if n >= req.PerSchedule {
			req.Busy = append(req.Busy, name)
		}
	}
	for name := range l.unknown {
		req.Unknown = append(req.Unknown, name)
	}
	return req
}

// decideAll decides about the ticks that are due.
func (l *loop) decideAll(req *ClaimRequest) {
	now := l.clock.now()
	for i := range l.plans {
		p := &l.plans[i]
		if slices.Contains(req.Busy, p.Name) {
			continue // left to others, and missed if that goes on for too long
		}
		if d, ok := l.decide(p, now); ok {
			req.Decisions = append(req.Decisions, d)
			l.tried[p.Name] = d.From
		}
	}
	l.plans = nil
}

func (l *loop) perSchedule() int { return max(1, l.r.opts.Concurrency/4) }

// decide decides about a plan; one that it cannot make sense of is left to
// others.
func (l *loop) decide(p *Plan, now time.Time) (d Decision, ok bool) {
	defer func() {
		if v := recover(); v != nil {
			l.skip(p, fmt.Errorf("panic: %v", v))
			ok = false
		}
	}()
	t := l.timing(p)
	if t.err != nil {
		l.skip(p, t.err)
		return d, false
	}
	return decide(p, t, now)
}

// due returns when the next tick of p is to run; zero if it cannot be told.
func (l *loop) due(p *Plan) (due time.Time) {
	defer func() {
		if v := recover(); v != nil {
			l.skip(p, fmt.Errorf("panic: %v", v))
			due = time.Time{}
		}
	}()
	t := l.timing(p)
	if t.err != nil {
		l.skip(p, t.err)
		return time.Time{}
	}
	if p.Next.IsZero() {
		return p.Since // its first tick is to be planned
	}
	return p.Next.Add(jitter(p, p.Next))
}

func (l *loop) timing(p *Plan) timing {
	key := [2]string{p.Spec, p.Zone}
	t, ok := l.timings[key]
	if ok {
		return t
	}
	if len(l.timings) >= 10_000 {
		clear(l.timings)
	}
	t.Timing, t.err = Parse(p.Spec, p.Zone)
	if errors.Is(t.err, errFunc) {
		if f := l.r.opts.Funcs[funcName(p.Spec)]; f != nil {
			t = timing{Timing: f}
		}
	}
	l.timings[key] = t
	return t
}

func (l *loop) skip(p *Plan, err error) {
	if !l.unknown[p.Name] && !errors.Is(err, errFunc) {
		l.r.opts.Logger.Warn("schedule: a schedule is left to other instances", "schedule", p.Name, "spec", p.Spec, "error", err)
	}
	l.unknown[p.Name] = true
}

// wait returns how long there is nothing to do, unless something is told.
func (l *loop) wait(claim Claim) time.Duration {
	now := l.clock.now()
	wait := l.r.opts.Poll
	until := func(t time.Time) { wait = min(wait, max(t.Sub(now), 0)) }
	stalled := false
	for i := range l.plans {
		p := &l.plans[i]
		due := l.due(p)
		if due.IsZero() || l.busy(p.Name) {
			continue
		}
		if from, ok := l.tried[p.Name]; ok && from.Equal(p.Next) && !due.After(now) {
			stalled = true // another instance is at it, or the store's clock is behind what it was
			continue
		}
		until(due)
	}
	if !claim.Next.IsZero() {
		until(claim.Next.Add(time.Millisecond))
	}
	if stalled {
		wait = min(wait, min(5*time.Millisecond<<min(l.stalls, 10), l.r.opts.Poll))
		l.stalls++
	} else {
		l.stalls = 0
	}
	return wait
}

func (l *loop) busy(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.running[name] >= l.perSchedule()
}
