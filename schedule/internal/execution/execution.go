// Package execution joins a runner and the backends whose handlers record the
// outcome of their run themselves.
package execution

import (
	"context"
	"sync/atomic"
)

type key struct{}

// A Record is what a handler says that it has recorded.
type Record struct {
	// More reports whether another run of the schedule waits.
	More bool
}

// With returns ctx for a handler, and a function that returns the record that
// its run is done, or nil if the handler has made none.
func With(ctx context.Context) (context.Context, func() *Record) {
	record := new(atomic.Pointer[Record])
	return context.WithValue(ctx, key{}, record), record.Load
}

// Recorded tells the runner that the run of ctx is recorded as done. It reports
// whether ctx is one that a runner gave to a handler.
func Recorded(ctx context.Context, r Record) bool {
	record, ok := ctx.Value(key{}).(*atomic.Pointer[Record])
	if ok {
		record.Store(&r)
	}
	return ok
}
