package saga

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

var (
	// ErrInvalid is wrapped by the errors of IDs and names that break a rule.
	ErrInvalid = errors.New("saga: invalid")

	// ErrNotFound is wrapped when there is no saga of that ID.
	ErrNotFound = errors.New("saga: not found")

	// ErrExists is wrapped when the ID belongs to a saga of another definition.
	ErrExists = errors.New("saga: the ID belongs to another saga")

	// ErrIncompatible is wrapped when a definition cannot go on with a saga that
	// another version of it has begun.
	ErrIncompatible = errors.New("saga: the definition does not fit what was begun")

	// ErrPastPivot is wrapped when a saga whose pivot is done is to be cancelled.
	ErrPastPivot = errors.New("saga: past its pivot")

	// ErrState is wrapped when an operation does not fit the saga's status.
	ErrState = errors.New("saga: not in a state for that")

	// ErrLeaseLost is the cause of the cancelled context of a step whose runner
	// may have been replaced: another instance goes on with the saga.
	ErrLeaseLost = errors.New("saga: lease lost")

	// ErrCancelled is the cause of the cancelled context of a step whose saga is
	// to be cancelled, and the first part of that saga's Cause.
	ErrCancelled = errors.New("saga: cancelled")

	// ErrDeadline is the failure of an Await whose signal did not come in time.
	ErrDeadline = errors.New("saga: the signal did not come in time")

	// ErrNotMigrated is wrapped by the errors of a store whose tables are
	// missing. [Runner.Run] returns it at once; every other error is retried.
	ErrNotMigrated = errors.New("saga: tables are missing")
)

// A Status is where a saga stands.
type Status string

// A saga is Running, then Done; or Running, Compensating, then Compensated. From
// either of the two that are not final it can become Stuck, where it needs a
// person: see [Runner.Retry], [Runner.Skip] and [Runner.Resolve].
const (
	Running      Status = "running"
	Compensating Status = "compensating"
	Done         Status = "done"
	Compensated  Status = "compensated"
	Stuck        Status = "stuck"
)

// Ended reports whether the saga will not go on by any means.
func (s Status) Ended() bool { return s == Done || s == Compensated }

// An Outcome is what became of a step, or of its compensation.
type Outcome string

const (
	Begun   Outcome = "begun"   // it may or may not have taken effect
	OK      Outcome = "ok"      // it has
	Refused Outcome = "refused" // it has not, and will not; see [Abort]
	Unknown Outcome = "unknown" // it was given up; it may have taken effect
	Skipped Outcome = "skipped" // a person has seen to it
)

// A StepRecord is the history of one step. Times are of the store's clock.
type StepRecord struct {
	Name      string    `json:"name"`
	Pivot     bool      `json:"pivot,omitempty"`
	Outcome   Outcome   `json:"outcome"`
	Attempts  int       `json:"attempts,omitempty"` // that ended, since the last Retry
	Error     string    `json:"error,omitempty"`    // of the last attempt that failed
	BegunAt   time.Time `json:"begun_at,omitzero"`
	EndedAt   time.Time `json:"ended_at,omitzero"`
	NotBefore time.Time `json:"not_before,omitzero"` // when it is tried again, or its sleep or deadline ends
	Undo      *Undo     `json:"undo,omitempty"`
}

// An Undo is the history of a step's compensation.
type Undo struct {
	Outcome   Outcome   `json:"outcome"`
	Attempts  int       `json:"attempts,omitempty"`
	Error     string    `json:"error,omitempty"`
	BegunAt   time.Time `json:"begun_at,omitzero"`
	EndedAt   time.Time `json:"ended_at,omitzero"`
	NotBefore time.Time `json:"not_before,omitzero"`
}

// An Instance is a saga as it is stored. Times are of the store's clock.
type Instance struct {
	ID      string            `json:"id"`
	Saga    string            `json:"saga"`    // name of the definition
	Version int               `json:"version"` // of the definition that stored it last
	Status  Status            `json:"status"`
	State   []byte            `json:"state"`            // by the definition's Codec
	Steps   []StepRecord      `json:"steps"`            // in the order in which they were begun
	Cause   string            `json:"cause,omitempty"`  // why it is compensated
	Reason  string            `json:"reason,omitempty"` // why it is stuck
	Cancel  string            `json:"cancel,omitempty"` // why it is to be cancelled
	Signals map[string][]byte `json:"signals,omitempty"`

	Owner     string    `json:"owner,omitempty"`  // the runner that has it in hand
	WakeAt    time.Time `json:"wake_at,omitzero"` // when it is to be taken in hand, if nobody has it
	Deaths    int       `json:"deaths,omitempty"` // runners that died with it in hand, since it last moved on
	StartedAt time.Time `json:"started_at"`
	EndedAt   time.Time `json:"ended_at,omitzero"`

	// Audit is what people have done to it, filled in by Get only.
	Audit []Audit `json:"audit,omitempty"`
}

// An Audit is a record of what a person has done to a saga.
type Audit struct {
	At     time.Time `json:"at"`
	Actor  string    `json:"actor"`  // who
	Action string    `json:"action"` // retry, skip, resolve, cancel
	Detail string    `json:"detail"` // to what
	Reason string    `json:"reason"` // why
}

// step returns the record of the named step, or nil if it was not begun.
func (in *Instance) step(name string) *StepRecord {
	for i := range in.Steps {
		if in.Steps[i].Name == name {
			return &in.Steps[i]
		}
	}
	return nil
}

// pastPivot reports whether there is no way back.
func (in *Instance) pastPivot() bool {
	return slices.ContainsFunc(in.Steps, func(s StepRecord) bool { return s.Pivot && (s.Outcome == OK || s.Outcome == Skipped) })
}

// atPivot reports whether there may be no way back: the pivot has begun, and
// only its end can tell.
func (in *Instance) atPivot() bool {
	return slices.ContainsFunc(in.Steps, func(s StepRecord) bool { return s.Pivot && s.Outcome != Refused })
}

// clone returns a copy that shares nothing that changes.
func (in *Instance) clone() Instance {
	c := *in
	c.Steps = slices.Clone(in.Steps)
	for i, s := range c.Steps {
		if s.Undo != nil {
			u := *s.Undo
			c.Steps[i].Undo = &u
		}
	}
	return c
}

// A Checkpoint is what a runner stores of a saga that it has in hand.
type Checkpoint struct {
	ID      string
	Version int
	Status  Status
	State   []byte
	Steps   []StepRecord
	Cause   string
	Reason  string
	// Release gives the saga up: it has ended, is stuck, or has to wait.
	Release bool
	// WakeAt is when a saga that waits is to be taken in hand again; the zero
	// time means never. It is at once if a signal of Await is there.
	WakeAt time.Time
	Await  []string
	// Cancel is the saga's as far as the runner knows it: one that it does not
	// know wakes the saga at once.
	Cancel string
}

// An Ack answers a [Checkpoint].
type Ack struct {
	Held    bool // false: the saga is not the runner's, and nothing was stored
	Cancel  string
	Signals map[string][]byte

	invalid error // why this one cannot be stored
}

// A LeaseRequest is what a runner asks for from time to time.
type LeaseRequest struct {
	Runner string         // a UUID, unique to the running runner
	TTL    time.Duration  // how long it holds its sagas from now; zero: it leaves and gives all up
	Beat   bool           // renew the lease
	Sagas  map[string]int // names of the definitions that it has, and the highest version of each
	Limit  int            // how many sagas it takes in hand at most
}

// A Grant answers a [LeaseRequest].
type Grant struct {
	Now    time.Time     // the store's clock
	Taken  []Instance    // now the runner's
	Cancel []string      // sagas of the runner that are to be cancelled
	Next   time.Duration // until the next saga is due; negative if none is known to be
}

// A Store keeps sagas for a [Runner]. It is safe for concurrent use by many
// processes; its own clock decides what is due and what has expired.
type Store interface {
	// Create stores sagas, all in one step, each with its Owner if that runner
	// holds a lease. It reports for each the name of its definition if the ID
	// was there before, which changes nothing, and "" otherwise.
	Create(ctx context.Context, sagas []Instance) (existing []string, err error)

	// Lease renews the runner's lease, takes sagas in hand that are due or
	// whose runner is dead, and tells what is to be cancelled. It wraps
	// ErrLeaseLost if the lease was over and others may have the sagas; the
	// runner's name is then used up.
	Lease(ctx context.Context, req LeaseRequest) (Grant, error)

	// Save stores checkpoints of sagas that the runner has in hand, all in one
	// step. Those of sagas that are another's are refused. If one of them can
	// never be stored, such as a state that is too large, nothing is and the
	// error wraps ErrInvalid. Repeating it does no harm.
	Save(ctx context.Context, runner string, cs []Checkpoint) ([]Ack, error)

	// Maintain moves sagas that have ended out of the way. A runner calls it
	// about every second.
	Maintain(ctx context.Context) error

	Registry
}

// A Registry is the side of a [Store] that people and other services use.
type Registry interface {
	// Get returns a saga, or wraps ErrNotFound.
	Get(ctx context.Context, id string) (Instance, error)

	// List returns the sagas that q asks for, by ID.
	List(ctx context.Context, q Query) ([]Instance, error)

	// Edit changes a saga in one step: f is given its present form, and what f
	// leaves is stored, with the Audit record that it may return. Of a saga that a
	// runner has in hand only Cancel and Signals may be changed. An error of f
	// is returned as it is, and nothing is stored.
	Edit(ctx context.Context, id string, f func(*Instance) (*Audit, error)) error

	// Sample returns the state of all sagas.
	Sample(ctx context.Context) (Sample, error)
}

// A Query asks for sagas.
type Query struct {
	Saga   string // name of the definition; empty means all
	Status Status // empty means all
	After  string // IDs after it
	Limit  int    // default 100
}

// A Sample is the state of a store's sagas at one moment, for metrics and alerts.
type Sample struct {
	Running      int64 // of these some are in hand, others wait
	Compensating int64
	Stuck        int64
	InHand       int64         // of a runner
	Due          int64         // should be in hand and are not
	Lag          time.Duration // for how long the oldest of these has been due
}

func validate(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: no %s", ErrInvalid, what)
	case len(s) > 255:
		return fmt.Errorf("%w: %s of %d bytes, the limit is 255", ErrInvalid, what, len(s))
	case !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("%w: %s %q is not UTF-8 without control characters", ErrInvalid, what, s)
	}
	return nil
}

// text makes an error storable: valid, without NUL, and not too long.
func text(s string) string {
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
	if len(s) > 2000 {
		s = strings.ToValidUTF8(s[:2000], "") + " …"
	}
	return s
}
