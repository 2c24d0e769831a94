package outbox

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ashlar-go/ashlar/internal/ids"
)

// Lanes is the number of independent logs an outbox is divided into. A key
// always belongs to the same lane; relays share the work by lane.
const Lanes = 16

var (
	// ErrRejected marks a failure that lies in the message, not in the broker:
	// too large, a topic that does not exist, a header it refuses. A [Publisher]
	// wraps it so that a [Relay] charges the message with the failure even when
	// nothing else gets through.
	ErrRejected = errors.New("outbox: message rejected")

	// ErrInvalid is wrapped by the errors of messages that cannot be appended.
	ErrInvalid = errors.New("outbox: invalid message")

	// ErrNotMigrated is wrapped by the errors of a store whose tables are
	// missing. [Relay.Run] returns it at once; every other error is retried.
	ErrNotMigrated = errors.New("outbox: tables are missing")
)

// A Message is what a service wants delivered.
type Message struct {
	// ID identifies the message to its consumers, which use it to drop
	// duplicates. At most 255 bytes; empty means a new UUIDv7.
	ID string
	// Topic names where it goes. Required, at most 255 bytes.
	Topic string
	// Key orders it: messages of one key are delivered in the order they were
	// appended. At most 1024 bytes of UTF-8; empty means no order.
	Key string
	// Payload is delivered as it is; it may be empty.
	Payload []byte
	// Headers travel with it, as UTF-8.
	Headers map[string]string
	// Delay holds it back for that long after Append, by the store's clock.
	// It takes its place in the order of its key when the delay is over.
	Delay time.Duration
}

// Prepare returns m with its ID set and the lane it belongs to, or an error
// that wraps [ErrInvalid]. Stores call it; writers need not.
//
// The lane is the first two bytes of SHA-256 of the key (of the ID where there
// is no key), big-endian, modulo [Lanes]: a rule that any language can follow
// and that no database upgrade changes.
func Prepare(m Message) (Message, int, error) {
	if m.ID == "" {
		m.ID = ids.New()
	}
	switch {
	case m.Topic == "":
		return m, 0, fmt.Errorf("%w: no topic", ErrInvalid)
	case m.Delay < 0:
		return m, 0, fmt.Errorf("%w: negative delay %v", ErrInvalid, m.Delay)
	}
	for _, f := range []struct {
		name, value string
		limit       int
	}{{"id", m.ID, 255}, {"topic", m.Topic, 255}, {"key", m.Key, 1024}} {
		if len(f.value) > f.limit {
			return m, 0, fmt.Errorf("%w: %s of %d bytes, the limit is %d", ErrInvalid, f.name, len(f.value), f.limit)
		}
		if !isText(f.value) {
			return m, 0, fmt.Errorf("%w: %s %q is not UTF-8 without NUL", ErrInvalid, f.name, f.value)
		}
	}
	for name, value := range m.Headers {
		if !isText(name) || !isText(value) {
			return m, 0, fmt.Errorf("%w: header %q is not UTF-8 without NUL", ErrInvalid, name)
		}
	}
	by := m.Key
	if by == "" {
		by = m.ID
	}
	sum := sha256.Sum256([]byte(by))
	return m, (int(sum[0])<<8 | int(sum[1])) % Lanes, nil
}

func isText(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsRune(s, 0)
}

// A Record is a message in the log of its lane.
type Record struct {
	Message
	Lane      int
	Seq       int64     // position in the lane; rises in the order of delivery, with gaps
	CreatedAt time.Time // by the store's clock
	Attempts  int       // failures charged to the message so far
	Parked    bool      // it had been set aside and is now tried again
}

// A Lane is a relay's hold on one log.
type Lane struct {
	Number int
	Epoch  int64            // fencing token: rises each time the lane changes hands
	Cursor int64            // every record up to it is delivered, parked or dead
	Parked map[string]int64 // keys with parked records, and the highest Seq of those
}

// A LeaseRequest is a relay's heartbeat.
type LeaseRequest struct {
	Relay   string        // unique to the running relay
	TTL     time.Duration // how long the lanes are held; zero ends the membership
	Release []int         // lanes to give up
}

// A Grant answers a [LeaseRequest].
type Grant struct {
	Lanes []Lane // all that the relay holds now
	Share int    // how many it should hold, given how many relays live
}

// A Position asks for the records of one lane.
type Position struct {
	Lane  int
	After int64 // the Seq of the last record read
	Retry bool  // also the parked records that are due
}

// A Failure is a record that could not be delivered.
type Failure struct {
	Record
	Err     string
	RetryIn time.Duration // for parked records: how long to wait
}

// A Settlement is what became of records that were fetched.
type Settlement struct {
	Advance   []Lane    // Number, Epoch and the new Cursor
	Delivered []Record  // parked records that were delivered now
	Park      []Failure // records to set aside, with Attempts as it shall be stored
	Dead      []Failure // records to move to the dead letters
}

// A Store keeps messages for a [Relay]. Writers use the methods of a concrete
// store instead, such as outboxpg.Append.
//
// Lease is safe to call beside the others; Fetch and Settle may run at the same
// time as each other but not as themselves.
type Store interface {
	// Lease renews the relay's lanes, gives up those named, takes free ones up
	// to its share, and returns what it holds.
	Lease(ctx context.Context, req LeaseRequest) (Grant, error)

	// Fetch returns at most limit records after the given positions, in order
	// within each lane and fair among them. It never returns a record while one
	// that comes before it in its lane may still be committed.
	Fetch(ctx context.Context, from []Position, limit int) ([]Record, error)

	// Settle stores outcomes. Lanes whose epoch is no longer current are left
	// as they are and returned.
	Settle(ctx context.Context, s Settlement) (lost []int, err error)

	// Maintain moves delayed messages that are due into the log and frees the
	// space of delivered ones. A relay calls it about every 200 ms.
	Maintain(ctx context.Context) error
}

// A Publisher hands messages to a broker.
type Publisher interface {
	// Publish delivers msgs in their order and returns when each is either
	// acknowledged by the broker or has failed: nil when all are acknowledged,
	// a [*PublishError] when some are, any other error when none is known to be.
	//
	// Once a message has failed, no later message of the same key may be
	// delivered in the same call.
	Publish(ctx context.Context, msgs []Message) error
}

// A PublishError tells which messages of one Publish call failed.
type PublishError struct {
	Errs []error // one for each message, nil where it was acknowledged
}

func (e *PublishError) Error() string {
	failed, first := 0, error(nil)
	for _, err := range e.Errs {
		if err != nil {
			failed++
			if first == nil {
				first = err
			}
		}
	}
	return fmt.Sprintf("outbox: %d of %d messages failed, the first: %v", failed, len(e.Errs), first)
}

// Unwrap returns the errors of the messages that failed.
func (e *PublishError) Unwrap() []error {
	var errs []error
	for _, err := range e.Errs {
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// A Sample is the state of an outbox at one moment, for metrics and alerts.
type Sample struct {
	Pending   int64         // records not yet delivered, an upper bound
	OldestAge time.Duration // age of the oldest of them; zero when there is none
	Delayed   int64         // messages whose delay is not over
	Parked    int64         // records set aside: a failed one and those behind it
	Dead      int64         // dead letters
}

// A DeadLetter is a message that failed too often.
type DeadLetter struct {
	Record
	Err      string // its last failure
	FailedAt time.Time
}
