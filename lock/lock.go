package lock

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
	// ErrHeld is wrapped when somebody else holds a key; see [HeldError].
	ErrHeld = errors.New("lock: held by another")

	// ErrLost is wrapped when a lease is no longer its owner's: it ended, and
	// another may have the key. It is also the cause of a lease's context when
	// that happens to running work.
	ErrLost = errors.New("lock: lease lost")

	// ErrInvalid is wrapped by the errors of keys that break a rule.
	ErrInvalid = errors.New("lock: invalid keys")
)

// A HeldError tells of a key that somebody else holds. It wraps [ErrHeld].
type HeldError struct {
	Key string // the first of them
	// RetryAfter is how long the key stays held at most, by the store's clock,
	// unless its holder extends the lease.
	RetryAfter time.Duration
}

func (e *HeldError) Error() string { return fmt.Sprintf("%v: key %q", ErrHeld, e.Key) }
func (e *HeldError) Unwrap() error { return ErrHeld }

// MaxKeys is how many keys one lease may have.
const MaxKeys = 64

// A Request names a lease, or what is wanted of one.
type Request struct {
	// Keys are 1 to [MaxKeys], sorted, none twice; each of 1 to 255 bytes of UTF-8
	// without control characters.
	Keys []string
	// Owner is unique to one acquisition, and the same in each repetition of it.
	Owner string
	// TTL is how long the lease lasts from now on.
	TTL time.Duration
	// Waiting means that whoever asks waits if a key is held: where the store is a
	// [Watcher], it remembers to tell when the key becomes free.
	Waiting bool
}

// Validate returns an error that wraps [ErrInvalid] if the keys break a rule.
func (r Request) Validate() error {
	if n := len(r.Keys); n == 0 || n > MaxKeys {
		return fmt.Errorf("%w: %d keys, want 1 to %d", ErrInvalid, n, MaxKeys)
	}
	for i, key := range r.Keys {
		switch {
		case key == "":
			return fmt.Errorf("%w: an empty key", ErrInvalid)
		case len(key) > 255:
			return fmt.Errorf("%w: a key of %d bytes, the limit is 255", ErrInvalid, len(key))
		case !utf8.ValidString(key) || strings.ContainsFunc(key, isControl):
			return fmt.Errorf("%w: %q is not UTF-8 without control characters", ErrInvalid, key)
		case i > 0 && r.Keys[i-1] >= key:
			return fmt.Errorf("%w: not sorted, or %q twice", ErrInvalid, key)
		}
	}
	return nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// sorted returns keys in order, each once.
func sorted(keys []string) []string {
	keys = slices.Clone(keys)
	slices.Sort(keys)
	return slices.Compact(keys)
}

// A Store keeps who holds which key. Only its own clock decides what has ended.
// It is safe for concurrent use by many processes.
//
// Each method may be repeated after a lost reply: a repetition has the outcome
// of the first call.
type Store interface {
	// Acquire takes all of the keys or none, atomically. It fails with a
	// [HeldError] if another owner holds one of them; it may do so, too, while
	// another call for one of them is under way. The token it returns is greater than
	// every token that was granted for one of the keys before; the owner that holds
	// the keys already is told the token it has.
	Acquire(ctx context.Context, req Request) (token int64, err error)

	// Extend makes the lease last for the TTL from now on. It wraps [ErrLost],
	// and changes nothing, unless the owner holds all of the keys.
	Extend(ctx context.Context, req Request) error

	// Release frees those keys that the owner holds. It wraps [ErrLost] if another
	// owner holds one of them. To release what nobody holds is no error.
	Release(ctx context.Context, req Request) error
}

// A Watcher is a [Store] that can tell when keys become free, so that whoever
// waits need not poll.
type Watcher interface {
	// Watch calls wake, which does not block, each time that one of the keys may
	// have become free since an Acquire with Request.Waiting was refused, and once
	// as soon as it is able to notice. What it misses costs the waiter a poll. It
	// does not block for long; ctx bounds that, not the watch, which goes on until
	// stop is called.
	Watch(ctx context.Context, keys []string, wake func()) (stop func())
}
