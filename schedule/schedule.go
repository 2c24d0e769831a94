package schedule

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

var (
	// ErrInvalid is wrapped by the errors of definitions and triggers that break a
	// rule.
	ErrInvalid = errors.New("schedule: invalid")

	// ErrNotFound is wrapped when no schedule has the name.
	ErrNotFound = errors.New("schedule: no such schedule")

	// ErrLeaseLost is wrapped when a run is no longer its owner's: the lease
	// ended and another took the run over, or it has ended already. It is also
	// the cause of the cancelled context when that happens to a running handler.
	ErrLeaseLost = errors.New("schedule: lease lost")

	// ErrNotMigrated is wrapped by the errors of a store whose tables are
	// missing. [Runner.Run] returns it at once; every other error is retried.
	ErrNotMigrated = errors.New("schedule: tables are missing")
)

// Misfire says what becomes of ticks that nobody ran in time, because all
// instances were down or busy.
type Misfire string

const (
	// MisfireOnce runs the latest missed tick, for all of them; none if a tick
	// that is not missed is due as well. It is the default.
	MisfireOnce Misfire = "once"
	// MisfireSkip runs none.
	MisfireSkip Misfire = "skip"
	// MisfireBackfill runs each, the last [Definition].Backfill of them, in order.
	MisfireBackfill Misfire = "backfill"
)

// Overlap says what becomes of a tick while an earlier run of the schedule has
// not ended, on whatever instance.
type Overlap string

const (
	// OverlapSkip does not run it; the history has it as skipped. The default.
	OverlapSkip Overlap = "skip"
	// OverlapQueue lets one run wait for the end of the other; the ticks that
	// come while it waits are skipped.
	OverlapQueue Overlap = "queue"
	// OverlapAllow runs it at the same time.
	OverlapAllow Overlap = "allow"
)

// A Definition is a schedule: when to run what. The zero value of each field
// but Name and Spec means its default.
type Definition struct {
	// Name identifies the schedule. Required, at most 255 bytes.
	Name string
	// Spec says when; see [Parse]. Required.
	Spec string
	// Zone is the IANA name of the time zone of a cron expression, such as
	// "Europe/Berlin". Default "UTC".
	Zone string
	// Handler is the name under which instances have registered what to do.
	// Many schedules may share one and differ in their payload. Default Name.
	Handler string
	// Payload is given to the handler as it is.
	Payload []byte
	// Misfire is what becomes of missed ticks. Default MisfireOnce.
	Misfire Misfire
	// Backfill is how many missed ticks MisfireBackfill runs. Required with it,
	// at most 1000.
	Backfill int
	// Grace is how late a tick may start and not be missed. Default 10 s.
	Grace time.Duration
	// Overlap is what becomes of a tick while another run has not ended.
	// Default OverlapSkip.
	Overlap Overlap
	// Jitter delays each tick by up to that long: by an amount that depends on
	// name and tick only, so that schedules of the same moment spread out. A
	// tick waits for the one before it. Default 0.
	Jitter time.Duration
	// Timeout bounds one run: then its context ends. Default 0, no bound.
	Timeout time.Duration
	// Attempts is how often a run that fails is tried. Default 1.
	Attempts int
	// RetryBase and RetryMax bound the waits between attempts: exponential with
	// full jitter. Defaults 1 s and 5 min.
	RetryBase, RetryMax time.Duration
	// AtMostOnce never repeats a run whose instance died: it ends as lost.
	// Default: another instance repeats it when its lease has ended.
	AtMostOnce bool
	// Revision guards against older programs: a definition with a lower revision
	// than the stored one changes nothing. Default 0.
	Revision int64
}

// Prepare returns d with its defaults set, or an error that wraps [ErrInvalid].
// Stores call it; those who define need not.
func Prepare(d Definition) (Definition, error) {
	setDefault(&d.Zone, "UTC")
	setDefault(&d.Handler, d.Name)
	setDefault(&d.Misfire, MisfireOnce)
	setDefault(&d.Overlap, OverlapSkip)
	setDefault(&d.Grace, 10*time.Second)
	setDefault(&d.Attempts, 1)
	setDefault(&d.RetryBase, time.Second)
	setDefault(&d.RetryMax, 5*time.Minute)
	for _, f := range []struct{ name, value string }{{"name", d.Name}, {"spec", d.Spec}, {"zone", d.Zone}, {"handler", d.Handler}} {
		switch {
		case f.value == "":
			return d, fmt.Errorf("%w: no %s", ErrInvalid, f.name)
		case len(f.value) > 255:
			return d, fmt.Errorf("%w: %s of %d bytes, the limit is 255", ErrInvalid, f.name, len(f.value))
		case !utf8.ValidString(f.value) || strings.ContainsFunc(f.value, isControl):
			return d, fmt.Errorf("%w: %s %q is not UTF-8 without control characters", ErrInvalid, f.name, f.value)
		}
	}
	for _, f := range []struct {
		name  string
		value time.Duration
		limit time.Duration
	}{
		{"grace", d.Grace, year},
		{"jitter", d.Jitter, year},
		{"timeout", d.Timeout, year},
		{"retry base", d.RetryBase, year},
		{"retry max", d.RetryMax, year},
	} {
		if f.value < 0 || f.value > f.limit {
			return d, fmt.Errorf("%w: %s of %v is not between 0 and %v", ErrInvalid, f.name, f.value, f.limit)
		}
	}
	switch {
	case d.Misfire != MisfireOnce && d.Misfire != MisfireSkip && d.Misfire != MisfireBackfill:
		return d, fmt.Errorf("%w: no misfire policy %q", ErrInvalid, d.Misfire)
	case d.Overlap != OverlapSkip && d.Overlap != OverlapQueue && d.Overlap != OverlapAllow:
		return d, fmt.Errorf("%w: no overlap policy %q", ErrInvalid, d.Overlap)
	case d.Misfire == MisfireBackfill && (d.Backfill < 1 || d.Backfill > maxBackfill):
		return d, fmt.Errorf("%w: backfill of %d is not between 1 and %d", ErrInvalid, d.Backfill, maxBackfill)
	case d.Misfire != MisfireBackfill && d.Backfill != 0:
		return d, fmt.Errorf("%w: backfill of %d without MisfireBackfill", ErrInvalid, d.Backfill)
	case d.Attempts < 0 || d.Attempts > 1000:
		return d, fmt.Errorf("%w: %d attempts are not between 1 and 1000", ErrInvalid, d.Attempts)
	}
	if _, err := Parse(d.Spec, d.Zone); err != nil && !errors.Is(err, errFunc) {
		return d, err
	}
	return d, nil
}

const (
	year        = 366 * 24 * time.Hour
	maxBackfill = 1000
)

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// A State is where a run stands.
type State string

const (
	Waiting State = "waiting" // for its time, a free slot, or the end of another run
	Running State = "running"
	Done    State = "done"
	Failed  State = "failed"  // each of its attempts
	Skipped State = "skipped" // by the overlap policy
	Lost    State = "lost"    // its instance died, and it must not be repeated, or five did
)

// A Run is one execution of a schedule: of a tick, or one that was asked for by
// hand.
type Run struct {
	// ID is unique to the run and the same in each of its attempts.
	ID string
	// Schedule is the definition as it is when the run is claimed.
	Schedule Definition
	// Tick is the time that the run is for, which identifies it among those of
	// its schedule. That of a manual run is when it was asked for.
	Tick time.Time
	// Due is when it was to start: the tick and its jitter, or a retry's time.
	Due time.Time
	// Claimed is when this attempt was claimed, by the store's clock.
	Claimed time.Time
	// Manual tells that it was asked for with Trigger.
	Manual bool
	// Payload is that of the trigger, or else of the definition.
	Payload []byte
	// Attempt counts how often the run was claimed, from 1. It is the fencing
	// token: whatever a claim reports is refused once there is a later one.
	Attempt int
	// Failures counts the attempts that have failed.
	Failures int
	// Missed is the number of ticks before this one that were missed and are not
	// run, counted up to 10,000.
	Missed int
}

// A Trigger asks for a run by hand.
type Trigger struct {
	// Name is that of the schedule.
	Name string
	// Key makes a repeated request the same one: it returns the ID of the first
	// for as long as the history has it. At most 255 bytes; empty means none.
	Key string
	// Payload replaces the definition's, unless it is nil.
	Payload []byte
}

// Validate returns an error that wraps [ErrInvalid] if t breaks a rule of its
// fields. Whatever takes a Trigger calls it.
func (t Trigger) Validate() error {
	if len(t.Key) > 255 || !utf8.ValidString(t.Key) || strings.ContainsFunc(t.Key, isControl) {
		return fmt.Errorf("%w: the key of a trigger is not at most 255 bytes of UTF-8 without control characters", ErrInvalid)
	}
	return nil
}

// A Record is a run in the history.
type Record struct {
	ID        string
	Name      string // of the schedule
	Tick, Due time.Time
	Manual    bool
	State     State
	Attempt   int
	Missed    int
	Instance  string    // that ran it last
	Started   time.Time // its last attempt; zero if there was none
	Finished  time.Time // zero unless the run has ended
	Err       string    // of the last attempt that failed
}

// A Status is how a schedule is doing, for metrics and a page of operators.
type Status struct {
	Definition
	Paused  bool
	Next    time.Time     // the next tick; zero if there is none or it is not planned yet
	Lag     time.Duration // by how much the next tick or a waiting run is overdue
	Running int
	Waiting int
	Missed  int64     // ticks that were not run, since the schedule was defined
	Last    State     // how the last run ended; empty if none has
	LastRun time.Time // its tick
	Failing int       // runs since the last that was done that failed or were lost
}
