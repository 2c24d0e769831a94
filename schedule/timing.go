package schedule

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/netresearch/go-cron"
)

// A Timing tells the ticks of a schedule.
type Timing interface {
	// Next returns the first tick after t, or the zero time if there is none. It
	// returns the same whenever and wherever it is called.
	Next(t time.Time) time.Time
}

// errFunc tells that a spec names a function, which is not known here.
var errFunc = errors.New("schedule: the spec names a function")

// The finest interval, and the years within which a cron expression must have a
// tick: a Friday that is a 29th of February comes after up to 40.
const (
	minInterval = 10 * time.Millisecond
	searchYears = 41
)

// Parse returns the timing of a spec, which is one of
//
//	30 4 * * MON-FRI     a cron expression: minute, hour, day of month, month, day of week
//	*/10 30 4 * * *      with seconds before them
//	@daily               @yearly, @monthly, @weekly, @daily, @hourly
//	every 90s            an interval, as time.ParseDuration reads it, at least 10 ms
//	func NAME            a function of [Options].Funcs
//
// A day matches if the day of month or the day of week does, where both are
// given (as in POSIX); L, W and # have their usual meaning. Times of a cron
// expression are of the zone. Where its clock is put forward, the ticks of the
// skipped hour are one tick, at the moment of the change. Where it is put back,
// a tick of the hour that comes twice is at the first of the two. An expression
// that matches every hour of a day goes by elapsed time instead: it has no tick
// in the hour that does not exist and ticks in both that do.
//
// The ticks of an interval are its multiples since 1970-01-01 UTC, so they do
// not depend on when it was defined or by whom.
//
// An error wraps [ErrInvalid]. A function has no timing here and is an error.
func Parse(spec, zone string) (Timing, error) {
	if zone == "" {
		zone = "UTC"
	}
	loc, err := time.LoadLocation(zone)
	if err != nil || zone == "Local" {
		return nil, fmt.Errorf("%w: no time zone %q", ErrInvalid, zone)
	}
	word, rest, _ := strings.Cut(strings.TrimSpace(spec), " ")
	rest = strings.TrimSpace(rest)
	switch {
	case word == "func" && rest != "":
		return nil, errFunc
	case word == "every":
		d, err := time.ParseDuration(rest)
		if err != nil {
			return nil, fmt.Errorf("%w: spec %q: %w", ErrInvalid, spec, err)
		}
		if d < minInterval || d > 100*year || d%time.Microsecond != 0 {
			return nil, fmt.Errorf("%w: spec %q: an interval is whole microseconds from %v to 100 years", ErrInvalid, spec, minInterval)
		}
		return interval(d), nil
	case strings.HasPrefix(word, "@every"):
		return nil, fmt.Errorf("%w: spec %q: write %q", ErrInvalid, spec, "every "+rest)
	case strings.Contains(word, "TZ="):
		return nil, fmt.Errorf("%w: spec %q: give the time zone in Zone", ErrInvalid, spec)
	}
	return parseCron(spec, loc)
}

var cronParser = cron.MustNewParser(cron.SecondOptional | cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow |
	cron.Descriptor | cron.Extended | cron.DowOrDom).WithMaxSearchYears(searchYears)

func parseCron(spec string, loc *time.Location) (Timing, error) {
	parsed, err := cronParser.Parse(strings.TrimSpace(spec))
	if err != nil {
		return nil, fmt.Errorf("%w: spec %q: %w", ErrInvalid, spec, err)
	}
	fields, ok := parsed.(*cron.SpecSchedule)
	if !ok {
		return nil, fmt.Errorf("%w: spec %q is not a cron expression", ErrInvalid, spec)
	}
	// The parser is asked for times of a clock that is never changed. What a zone
	// makes of them is decided here.
	fields.Location = time.UTC
	const everyHour = 1<<24 - 1
	c := &calendar{fields: fields, loc: loc, elapsed: fields.Hour&everyHour == everyHour}
	if fields.Next(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).IsZero() {
		return nil, fmt.Errorf("%w: spec %q has no tick in %d years", ErrInvalid, spec, searchYears)
	}
	return c, nil
}

// An interval ticks at its multiples since 1970, in microseconds: nanoseconds
// would overflow in 2262.
type interval time.Duration

func (i interval) Next(t time.Time) time.Time {
	us, step := t.UnixMicro(), time.Duration(i).Microseconds()
	n := us / step
	if us < 0 && us%step != 0 {
		n--
	}
	if n >= math.MaxInt64/step-1 {
		return time.Time{}
	}
	return time.UnixMicro((n + 1) * step).UTC()
}

// A calendar has the ticks of a cron expression in a time zone.
type calendar struct {
	fields  *cron.SpecSchedule
	loc     *time.Location
	elapsed bool // goes by elapsed time where the zone's clock is changed
}

// Next goes through the spans of time in which the offset of the zone is the
// same. Within one, what its clocks show is UTC and a constant.
func (c *calendar) Next(t time.Time) time.Time {
	for t = t.In(c.loc); ; {
		start, end := t.ZoneBounds()
		offset := offsetAt(t)
		shown := wall(t, offset)
		if !c.elapsed && !start.IsZero() {
			// What the clock has shown before does not come again.
			if before := wall(start, offsetAt(start.Add(-1))).Add(-1); before.After(shown) {
				shown = before
			}
		}
		next := c.fields.Next(shown)
		if next.IsZero() {
			return time.Time{}
		}
		tick := next.Add(-offset).In(c.loc)
		if end.IsZero() || tick.Before(end) {
			return tick.UTC()
		}
		// In the hour that the clock of the next span skips?
		if after := wall(end, offsetAt(end)); !c.elapsed && next.Before(after) {
			return end.UTC()
		}
		if c.first(end) {
			return end.UTC()
		}
		t = end.In(c.loc)
	}
}

// first reports whether there is a tick at the moment of a change.
func (c *calendar) first(change time.Time) bool {
	shown := wall(change, offsetAt(change))
	if !c.elapsed && wall(change, offsetAt(change.Add(-1))).After(shown) {
		return false // the clock is put back, and has shown this before
	}
	return c.fields.Next(shown.Add(-1)).Equal(shown)
}

func offsetAt(t time.Time) time.Duration {
	_, seconds := t.Zone()
	return time.Duration(seconds) * time.Second
}

// wall returns what a clock with that offset shows at t, as if it were UTC.
func wall(t time.Time, offset time.Duration) time.Time { return t.UTC().Add(offset) }

// funcName returns the name in a spec that names a function.
func funcName(spec string) string {
	_, name, _ := strings.Cut(strings.TrimSpace(spec), " ")
	return strings.TrimSpace(name)
}
