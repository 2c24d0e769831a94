package saga

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A Call names one use of a step, for those who take part in a saga.
type Call struct {
	Saga         string // ID of the saga
	Step         string
	Compensating bool
	Attempt      int // from 1, of this runner's knowledge
}

// Key is the same for every attempt of the step, and of its compensation: pass
// it on as the idempotency key of what the step does.
func (c Call) Key() string { return c.Saga + "/" + c.Step }

type callKey struct{}

// CurrentCall returns the call that ctx was made for. It panics if ctx does not
// come from a step.
func CurrentCall(ctx context.Context) Call {
	c, ok := ctx.Value(callKey{}).(Call)
	if !ok {
		panic("saga: CurrentCall outside of a step")
	}
	return c
}

type abortError struct{ error }

func (e abortError) Unwrap() error { return e.error }

// Abort says of a step that it has definitely had no effect and never will: the
// card is declined, the room is taken. The saga is compensated at once, without
// a compensation of this step. Any other error leaves open what happened: the
// step is tried again, and if it is given up, it is compensated too.
//
// After the pivot, where there is no way back, and in compensations it makes the
// saga stuck.
func Abort(err error) error {
	if err == nil {
		return nil
	}
	return abortError{err}
}

func isAbort(err error) bool {
	var a abortError
	return errors.As(err, &a)
}

type againError struct{ after time.Duration }

func (e againError) Error() string { return fmt.Sprintf("saga: again after %v", e.after) }

// Again makes the step run again after d, without counting as a failure: for
// work whose end one has to ask for. No goroutine waits meanwhile, and the wait
// survives a crash. What the step has changed in the state is kept.
func Again(d time.Duration) error { return againError{max(d, 0)} }

// A PanicError is the failure of a step that panicked or called runtime.Goexit.
type PanicError struct {
	Value any // nil after runtime.Goexit
	Stack []byte
}

func (e *PanicError) Error() string {
	if e.Value == nil {
		return "saga: the step called runtime.Goexit"
	}
	return fmt.Sprintf("saga: the step panicked: %v\n%s", e.Value, e.Stack)
}
