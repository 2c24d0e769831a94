// Package execution joins a runner and the backends whose handlers record the
// outcome of their run themselves.
package execution

import (
	"context"
	"sync/atomic"
)

type key struct{}

// With returns ctx for a handler, and a function that tells whether the handler
// has recorded that its run is done.
func With(ctx context.Context) (context.Context, func() bool) {
	recorded := new(atomic.Bool)
	return context.WithValue(ctx, key{}, recorded), recorded.Load
}

// Recorded tells the runner that the run of ctx is recorded as done. It reports
// whether ctx is one that a runner gave to a handler.
func Recorded(ctx context.Context) bool {
	recorded, ok := ctx.Value(key{}).(*atomic.Bool)
	if ok {
		recorded.Store(true)
	}
	return ok
}
