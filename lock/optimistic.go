package lock

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// ErrConflict is wrapped when what is to be replaced is not of the version that
// was read; see [ConflictError].
var ErrConflict = errors.New("lock: version conflict")

// A ConflictError tells what was found in place of the version that was expected.
// It wraps [ErrConflict].
type ConflictError struct {
	Expected int64
	// Version is the current one. Zero if Exists is false.
	Version int64
	// Exists is false where there is nothing of that key any more.
	Exists bool
	// Current is the value of that version, of the type of the [Register], or nil
	// where it was not read.
	Current any
}

func (e *ConflictError) Error() string {
	if !e.Exists {
		return fmt.Sprintf("%v: want version %d, found none", ErrConflict, e.Expected)
	}
	return fmt.Sprintf("%v: want version %d, found %d", ErrConflict, e.Expected, e.Version)
}

func (e *ConflictError) Unwrap() error { return ErrConflict }

// A Register keeps a value and its version for each key. It is safe for concurrent
// use by many processes.
type Register[T any] interface {
	// Load returns the value and its version, which is greater than zero.
	Load(ctx context.Context, key string) (value T, version int64, err error)

	// Store replaces the value if it is of the given version, atomically, and
	// returns the new version, which is greater. Otherwise it fails with a
	// [ConflictError], which best has the current value, and changes nothing. After
	// any other error it is not known whether the value was replaced.
	Store(ctx context.Context, key string, value T, version int64) (newVersion int64, err error)
}

// A MemoryRegister is a [Register] in memory, for tests and examples. A key that
// was never stored has the zero T as version 1. The zero value is ready to use; it
// is safe for concurrent use. T should share no memory.
type MemoryRegister[T any] struct {
	mu     sync.Mutex
	values map[string]memoryValue[T]
}

type memoryValue[T any] struct {
	value  T
	stored int64 // how often
}

// Load implements [Register].
func (r *MemoryRegister[T]) Load(ctx context.Context, key string) (value T, version int64, err error) {
	if err := ctx.Err(); err != nil {
		return value, 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.values[key]
	return v.value, v.stored + 1, nil
}

// Store implements [Register].
func (r *MemoryRegister[T]) Store(ctx context.Context, key string, value T, version int64) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.values[key]
	if v.stored+1 != version {
		return 0, &ConflictError{Expected: version, Version: v.stored + 1, Exists: true, Current: v.value}
	}
	if r.values == nil {
		r.values = make(map[string]memoryValue[T])
	}
	r.values[key] = memoryValue[T]{value, v.stored + 1}
	return version + 1, nil
}
