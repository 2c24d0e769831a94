// Package execution is what the idempotency package shares with the
// transactional completions of its stores.
package execution

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// An Execution is a claim whose work is running. It travels in the context that
// the work is given.
type Execution struct {
	Scope, ID, Token string
	// Opaque means that the result has a form only its owner can make.
	Opaque bool

	completed atomic.Bool
}

// SetCompleted notes that the result is recorded, or will be when the
// transaction of the work commits. From then on nothing else must record it.
func (e *Execution) SetCompleted() { e.completed.Store(true) }

// Completed reports whether SetCompleted was called.
func (e *Execution) Completed() bool { return e.completed.Load() }

type contextKey struct{}

// With returns a context that carries e.
func With(ctx context.Context, e *Execution) context.Context {
	return context.WithValue(ctx, contextKey{}, e)
}

// From returns the execution that ctx carries, or nil.
func From(ctx context.Context) *Execution {
	e, _ := ctx.Value(contextKey{}).(*Execution)
	return e
}

// Poll waits before a duplicate looks again, for no longer than left.
func Poll(ctx context.Context, attempt int, left time.Duration) error {
	wait := backoff.Policy{Max: 250 * time.Millisecond}.Next(attempt)
	return backoff.Sleep(ctx, min(wait, left))
}

// Encode returns the stored form of a result: bytes as they are, all else as JSON.
func Encode[T any](v T) ([]byte, error) {
	if b, ok := any(v).([]byte); ok {
		return b, nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode the result: %w", err)
	}
	return b, nil
}

// Decode is the inverse of Encode. The value shares no memory with b.
func Decode[T any](b []byte) (v T, err error) {
	if p, ok := any(&v).(*[]byte); ok {
		*p = bytes.Clone(b)
		return v, nil
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return v, fmt.Errorf("decode the stored result: %w", err)
	}
	return v, nil
}
