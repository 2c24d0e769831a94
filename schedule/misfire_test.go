package schedule

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

func plan(misfire Misfire, backfill int, grace time.Duration) *Plan {
	d, err := Prepare(Definition{Name: "n", Spec: "every 1m", Misfire: misfire, Backfill: backfill, Grace: grace})
	if err != nil {
		panic(err)
	}
	return &Plan{Definition: d, Version: 3}
}

// Each policy, for times without an instance that are shorter and longer than
// the interval and the grace.
func TestMisfire(t *testing.T) {
	next := time.Date(2026, 1, 1, 0, 1, 0, 0, time.UTC) // the first tick that nobody decided about
	timing := interval(time.Minute)
	for _, test := range []struct {
		down     time.Duration // after it
		misfire  Misfire
		backfill int
		grace    time.Duration
		ticks    []int // minutes that are run
		missed   int
	}{
		{-1, MisfireOnce, 0, 0, nil, 0},
		{0, MisfireOnce, 0, 0, []int{1}, 0},
		{0, MisfireSkip, 0, 0, []int{1}, 0},
		{0, MisfireBackfill, 2, 0, []int{1}, 0},
		{10 * time.Second, MisfireSkip, 0, 0, []int{1}, 0}, // within the grace of 10 s
		{11 * time.Second, MisfireSkip, 0, 0, nil, 1},
		{11 * time.Second, MisfireOnce, 0, 0, []int{1}, 0},
		{11 * time.Second, MisfireBackfill, 2, 0, []int{1}, 0},
		{65 * time.Second, MisfireSkip, 0, 0, []int{2}, 1}, // one missed, one in time
		{65 * time.Second, MisfireOnce, 0, 0, []int{2}, 1},
		{65 * time.Second, MisfireBackfill, 2, 0, []int{1, 2}, 0},
		{90 * time.Second, MisfireSkip, 0, 0, nil, 2},
		{90 * time.Second, MisfireOnce, 0, 0, []int{2}, 1},
		{90 * time.Second, MisfireBackfill, 1, 0, []int{2}, 1},
		{5*time.Minute + 30*time.Second, MisfireSkip, 0, 0, nil, 6},
		{5*time.Minute + 30*time.Second, MisfireOnce, 0, 0, []int{6}, 5},
		{5*time.Minute + 30*time.Second, MisfireBackfill, 3, 0, []int{4, 5, 6}, 3},
		{5*time.Minute + 30*time.Second, MisfireBackfill, 100, 0, []int{1, 2, 3, 4, 5, 6}, 0},
		{5*time.Minute + 5*time.Second, MisfireBackfill, 3, 0, []int{3, 4, 5, 6}, 2}, // the last is in time
		{5 * time.Minute, MisfireSkip, 0, 2 * time.Minute, []int{4, 5, 6}, 3},        // three are
		{5 * time.Minute, MisfireOnce, 0, time.Hour, []int{1, 2, 3, 4, 5, 6}, 0},
	} {
		name := fmt.Sprintf("%s %d after %v with grace %v", test.misfire, test.backfill, test.down, test.grace)
		p := plan(test.misfire, test.backfill, test.grace)
		p.Next = next
		now := next.Add(test.down)
		d, ok := decide(p, timing, now)
		if ok != (test.down >= 0) {
			t.Errorf("%s: decided %v", name, ok)
		}
		if !ok {
			continue
		}
		var got []int
		for _, tick := range d.Ticks {
			got = append(got, tick.At.Minute())
		}
		if !slices.Equal(got, test.ticks) || d.Missed != test.missed {
			t.Errorf("%s: ticks %v, missed %d; want %v, %d", name, got, d.Missed, test.ticks, test.missed)
		}
		if len(d.Ticks) > 0 && d.Ticks[0].Missed != test.missed {
			t.Errorf("%s: the first tick stands for %d", name, d.Ticks[0].Missed)
		}
		for _, tick := range d.Ticks {
			if late := tick.Late; late != (test.misfire == MisfireBackfill && now.Sub(tick.At) > p.Grace) {
				t.Errorf("%s: tick %v is late: %v", name, tick.At, late)
			}
		}
		if !d.Next.After(now) || d.Next.Sub(now) > time.Minute || d.From != next || d.Version != 3 || !d.NextDue.Equal(d.Next) {
			t.Errorf("%s: the decision is %+v", name, d)
		}
	}
}

// A schedule of seconds that nobody ran for years is decided about in a moment.
func TestMisfireAfterYears(t *testing.T) {
	now := time.Date(2036, 1, 1, 0, 0, 0, 500, time.UTC)
	for _, timing := range []string{"every 1s", "* * * * * *", "* * 3 1 1 *", "every 10ms"} {
		parsed, err := Parse(timing, "UTC")
		if err != nil {
			t.Fatal(err)
		}
		p := plan(MisfireBackfill, 5, time.Second)
		p.Next = parsed.Next(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
		d, ok := decide(p, parsed, now)
		if !ok || len(d.Ticks) < 5 || len(d.Ticks) > 5+maxOnTime || d.Missed == 0 || d.Missed > maxCounted {
			t.Fatalf("%s: %d ticks, missed %d, decided %v", timing, len(d.Ticks), d.Missed, ok)
		}
		for i, tick := range d.Ticks[1:] {
			if !parsed.Next(d.Ticks[i].At).Equal(tick.At) {
				t.Errorf("%s: after %v comes %v", timing, d.Ticks[i].At, tick.At)
			}
		}
		last := d.Ticks[len(d.Ticks)-1].At
		if !parsed.Next(last).Equal(d.Next) || !d.Next.After(now) {
			t.Errorf("%s: the last tick is %v, the next %v", timing, last, d.Next)
		}
	}
}

func TestFirstPlan(t *testing.T) {
	p := plan(MisfireOnce, 0, 0)
	p.Since = time.Date(2026, 1, 1, 0, 0, 30, 0, time.UTC)
	first := p.Since.Add(30 * time.Second)
	d, ok := decide(p, interval(time.Minute), p.Since)
	if !ok || len(d.Ticks) != 0 || !d.Next.Equal(first) || !d.From.IsZero() {
		t.Errorf("the first plan is %+v, %v", d, ok)
	}
	// Found late, it has its ticks.
	if d, ok = decide(p, interval(time.Minute), first); !ok || len(d.Ticks) != 1 || !d.Ticks[0].At.Equal(first) {
		t.Errorf("the first plan found late is %+v, %v", d, ok)
	}
	// A timing that has ended ends the schedule.
	if d, ok = decide(p, timingFunc(func(time.Time) time.Time { return time.Time{} }), p.Since); !ok || !d.Next.IsZero() || len(d.Ticks) != 0 {
		t.Errorf("the plan of no ticks is %+v, %v", d, ok)
	}
}

type timingFunc func(time.Time) time.Time

func (f timingFunc) Next(t time.Time) time.Time { return f(t) }

// Jitter is the same on each instance, spreads schedules, and never lets a tick
// overtake another or be early.
func TestJitter(t *testing.T) {
	p := plan(MisfireOnce, 0, 0)
	p.Jitter = 45 * time.Second
	tick := time.Date(2026, 1, 1, 0, 1, 0, 0, time.UTC)
	seen := make(map[time.Duration]bool)
	for i := range 1000 {
		p.Name = fmt.Sprint("tenant ", i)
		j := jitter(p, tick)
		if j < 0 || j >= p.Jitter || j != jitter(p, tick.In(time.FixedZone("", 3600))) {
			t.Fatalf("the jitter is %v", j)
		}
		seen[j] = true
		p.Next = tick
		if _, ok := decide(p, interval(time.Minute), tick.Add(j-1)); ok {
			t.Fatal("decided before the jitter was over")
		}
		d, ok := decide(p, interval(time.Minute), tick.Add(j))
		if !ok || len(d.Ticks) != 1 || !d.Ticks[0].Due.Equal(tick.Add(j)) || !d.NextDue.Equal(d.Next.Add(jitter(p, d.Next))) {
			t.Fatalf("the decision is %+v, %v", d, ok)
		}
		// Late is what is late behind the jitter.
		if p.missed(tick, tick.Add(j+p.Grace)) || !p.missed(tick, tick.Add(j+p.Grace+1)) {
			t.Fatal("the grace does not begin when the jitter ends")
		}
	}
	if len(seen) < 900 {
		t.Errorf("1000 schedules have %d different jitters", len(seen))
	}
}

func TestTimingsThatDoNotAdvance(t *testing.T) {
	p := plan(MisfireOnce, 0, 0)
	p.Next = time.Date(2026, 1, 1, 0, 1, 0, 0, time.UTC)
	for name, f := range map[string]timingFunc{
		"the same":       func(t time.Time) time.Time { return t },
		"before":         func(t time.Time) time.Time { return t.Add(-1) },
		"a nanosecond":   func(t time.Time) time.Time { return t.Add(1) }, // less than stores keep
		"half of a step": func(t time.Time) time.Time { return t.Truncate(time.Microsecond).Add(999) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a timing that returns %s is believed", name)
				}
			}()
			decide(p, f, p.Next.Add(time.Hour))
		}()
	}
}

// What the clock says is never ahead of the store's, and soon close to it,
// whatever the local clock says and whatever the round trips take.
func TestClock(t *testing.T) {
	var c clock
	if !c.now().IsZero() {
		t.Error("it knows a time that it was not told")
	}
	local := time.Now()
	for i, test := range []struct {
		offset, sent, received time.Duration // the store's answer is of the middle
		behind                 time.Duration // how far the clock may be behind then
	}{
		{5 * time.Second, 0, 400 * time.Millisecond, 200 * time.Millisecond},
		{5 * time.Second, 1000 * time.Millisecond, 1002 * time.Millisecond, time.Millisecond},
		{5 * time.Second, 2000 * time.Millisecond, 2800 * time.Millisecond, time.Millisecond}, // a slow one does not spoil it
		{-5 * time.Second, 3000 * time.Millisecond, 3010 * time.Millisecond, 5 * time.Millisecond},
		{-5 * time.Second, 90 * time.Second, 91 * time.Second, 5 * time.Millisecond}, // old, but not yet dropped
		{3 * time.Second, 95 * time.Second, 95*time.Second + 2*time.Millisecond, time.Millisecond},
	} {
		store := func(d time.Duration) time.Time { return local.Add(d + test.offset) }
		c.told(store((test.sent+test.received)/2), local.Add(test.sent), local.Add(test.received))
		now := max(c.best.at(local.Add(test.received)).Sub(store(test.received)), c.older.at(local.Add(test.received)).Sub(store(test.received)))
		if now > 0 || now < -test.behind {
			t.Errorf("reading %d: the clock is %v off, want at most %v behind", i, now, test.behind)
		}
	}
}
