package idempotency

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// Global is the scope of keys that belong to no tenant. It is a scope like any
// other: keys in it meet only keys in it.
const Global = "*"

var (
	// ErrInProgress is wrapped when another execution of the key is running.
	ErrInProgress = errors.New("idempotency: the key is in progress")

	// ErrMismatch is wrapped when the key was used before with another fingerprint.
	ErrMismatch = errors.New("idempotency: the key was used for another request")

	// ErrUnknown is wrapped when an earlier execution of the key ended without an
	// outcome and [Options].AtMostOnce forbids to run it again.
	ErrUnknown = errors.New("idempotency: the outcome of an earlier execution is unknown")

	// ErrLeaseLost is wrapped when a claim is no longer its owner's: the lease
	// ended and another took the key over, or the record is gone. It is also the
	// cause of the cancelled context when that happens to running work.
	ErrLeaseLost = errors.New("idempotency: lease lost")

	// ErrNotRecorded is wrapped when the work was done but its result could not
	// be recorded, so that a duplicate may do it again.
	ErrNotRecorded = errors.New("idempotency: the work was done but its result is not recorded")

	// ErrInvalid is wrapped by the errors of keys that break a rule.
	ErrInvalid = errors.New("idempotency: invalid key")
)

// A Key identifies one intended operation.
type Key struct {
	// Scope separates those who choose IDs independently of one another, such as
	// tenants: equal IDs in different scopes are different keys. Required, so
	// that nobody is handed another tenant's result by mistake; [Global] is the
	// scope of no tenant. At most 255 bytes.
	Scope string
	// ID is chosen by whoever wants the operation and repeated with every retry
	// of it: the value of an Idempotency-Key header, the ID of a message.
	// Required, at most 255 bytes.
	ID string
	// Fingerprint is a digest of what is asked for. Reuse of the key with other
	// bytes is refused with [ErrMismatch]. At most 255 bytes; may be empty.
	Fingerprint []byte
}

// Validate returns an error that wraps [ErrInvalid] if k breaks a rule of its
// fields. Whatever takes a Key calls it.
func (k Key) Validate() error {
	for _, f := range []struct{ name, value string }{{"scope", k.Scope}, {"id", k.ID}} {
		switch {
		case f.value == "":
			return fmt.Errorf("%w: no %s", ErrInvalid, f.name)
		case len(f.value) > 255:
			return fmt.Errorf("%w: %s of %d bytes, the limit is 255", ErrInvalid, f.name, len(f.value))
		case !utf8.ValidString(f.value) || strings.ContainsFunc(f.value, isControl):
			return fmt.Errorf("%w: %s %q is not UTF-8 without control characters", ErrInvalid, f.name, f.value)
		}
	}
	if n := len(k.Fingerprint); n > 255 {
		return fmt.Errorf("%w: fingerprint of %d bytes, the limit is 255", ErrInvalid, n)
	}
	return nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

// A ClaimRequest is how a key is to be claimed.
type ClaimRequest struct {
	Token string        // names the claim: unique to it, repeated when the call is
	Lease time.Duration // how long the claim lasts unless it is extended
	TTL   time.Duration // how long the record lasts from now on; at least Lease
	// AtMostOnce refuses a key whose earlier claim ended without an outcome.
	AtMostOnce bool
}

// A Claim is the answer to a [ClaimRequest] that was not refused.
type Claim struct {
	// Done tells that the operation was completed before; Result is its outcome,
	// and the key is not claimed. The caller does not modify Result.
	Done   bool
	Result []byte
	// TTL is how much longer the record of a completed operation lasts, by the
	// store's clock.
	TTL time.Duration
	// Lease is how much longer the other claim lasts where the error is
	// [ErrInProgress], by the store's clock.
	Lease time.Duration
}

// A Store keeps one record per scope and ID. Only its own clock decides what has
// expired. It is safe for concurrent use by many processes.
//
// Each method may be repeated with the same token after a lost reply: a
// repetition has the outcome of the first call.
type Store interface {
	// Claim takes the key, atomically: of any number of callers one is granted
	// it. A key is free where there is no record, where the record's TTL and
	// lease are over, and where only the lease is and AtMostOnce is not set.
	// Otherwise Claim returns the result, or wraps ErrInProgress or ErrUnknown.
	// Another fingerprint than the record's is refused with ErrMismatch first.
	Claim(ctx context.Context, key Key, req ClaimRequest) (Claim, error)

	// Extend makes the claim last for lease from now on. It wraps ErrLeaseLost
	// unless the key is claimed by token.
	Extend(ctx context.Context, key Key, token string, lease time.Duration) error

	// Complete records the result and ends the claim. It wraps ErrLeaseLost
	// unless the key is claimed, or was completed, by token.
	Complete(ctx context.Context, key Key, token string, result []byte) error

	// Release frees the key. It wraps ErrLeaseLost if the key is completed or
	// claimed by another token.
	Release(ctx context.Context, key Key, token string) error
}
