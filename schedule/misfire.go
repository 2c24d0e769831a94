package schedule

import (
	"hash/fnv"
	"strconv"
	"time"

	"github.com/ashlar-go/ashlar/internal/ids"
)

const (
	maxCounted = 10_000    // missed ticks
	maxOnTime  = 1000      // ticks run at once that are late and not missed
	maxWalk    = 1_000_000 // calls of a timing for one decision
)

// decide tells what is to become of the ticks that are due at now. It reports
// false if there is nothing to decide. Ticks are taken in order: one whose
// jitter is not over holds those behind it up.
func decide(p *Plan, t Timing, now time.Time) (Decision, bool) {
	d := Decision{Name: p.Name, Version: p.Version, From: p.Next}
	first := p.Next
	if first.IsZero() {
		first = next(t, p.Since)
	}
	due, following := walk(p, t, first, now, maxCounted)
	if len(due) == 0 && !p.Next.IsZero() {
		return d, false
	}
	counted := len(due)
	if counted == maxCounted {
		due, following = latest(p, t, due[counted-1], now)
	}
	d.Next = following
	if !following.IsZero() {
		d.NextDue = following.Add(jitter(p, following))
	}
	onTime := 0
	for onTime < min(len(due), maxOnTime) && !p.missed(due[len(due)-1-onTime], now) {
		onTime++
	}
	missed := due[:len(due)-onTime]
	late := 0
	switch {
	case p.Misfire == MisfireBackfill:
		late = min(p.Backfill, len(missed))
	case p.Misfire == MisfireOnce && onTime == 0:
		late = min(1, len(missed))
	}
	run := due[len(missed)-late:]
	d.Missed = counted - min(counted, len(run))
	for i, at := range run {
		tick := Tick{ID: ids.New(), At: at, Due: at.Add(jitter(p, at)), Late: i < late && p.Misfire == MisfireBackfill}
		if i == 0 {
			tick.Missed = d.Missed
		}
		d.Ticks = append(d.Ticks, tick)
	}
	return d, true
}

func (p *Plan) missed(tick, now time.Time) bool {
	return now.Sub(tick.Add(jitter(p, tick))) > p.Grace
}

// walk returns the ticks from first on that are due at now, at most limit of
// them, and the one behind.
func walk(p *Plan, t Timing, first, now time.Time, limit int) (due []time.Time, following time.Time) {
	for at := first; ; at = next(t, at) {
		if at.IsZero() || len(due) == limit || at.Add(jitter(p, at)).After(now) {
			return due, at
		}
		due = append(due, at)
	}
}

// latest returns the last ticks that are due at now, as many as may be run, and
// the one behind. All of them are after a tick from which it is too far to walk.
func latest(p *Plan, t Timing, after, now time.Time) (due []time.Time, following time.Time) {
	keep := maxOnTime + p.Backfill
	for span := p.Grace + p.Jitter + time.Second; ; span *= 4 {
		from := now.Add(-span)
		whole := from.Before(after)
		if whole {
			from = after
		}
		due = due[:0]
		following = next(t, from)
		for range maxWalk {
			if following.IsZero() || following.Add(jitter(p, following)).After(now) {
				break
			}
			due = append(due, following)
			following = next(t, following)
		}
		if whole || len(due) >= keep || span > 100*year {
			return due[max(0, len(due)-keep):], following
		}
	}
}

// next guards against a timing that does not go forward, and cuts what a store
// does not keep.
func next(t Timing, after time.Time) time.Time {
	at := t.Next(after)
	if cut := at.Truncate(time.Microsecond); cut.After(after) {
		return cut.UTC()
	}
	if at.IsZero() {
		return at
	}
	panic("schedule: the timing returned " + at.String() + ", which is not after " + after.String())
}

// jitter is the same for a tick wherever it is computed.
func jitter(p *Plan, tick time.Time) time.Duration {
	if p.Jitter < time.Millisecond {
		return 0
	}
	h := fnv.New64a()
	h.Write([]byte(p.Name))
	h.Write(strconv.AppendInt([]byte{0}, tick.UnixMicro(), 10))
	return time.Duration(h.Sum64()%uint64(p.Jitter.Milliseconds())) * time.Millisecond
}
