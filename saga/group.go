package saga

import (
	"context"
	"sync"
)

// A group makes calls that come at the same time into one: while a call is under
// way, those that come wait and are then made together.
type group[T, R any] struct {
	ctx  context.Context // of the calls
	call func(ctx context.Context, items []T) ([]R, error)
	max  int // items of one call

	mu      sync.Mutex
	waiting []*member[T, R]
	busy    bool
}

type member[T, R any] struct {
	item   T
	result R
	err    error
	done   chan struct{}
}

// do returns the result for item of a call that it was part of. The error is
// that of the call, or says that ctx has ended; the call goes on all the same.
func (g *group[T, R]) do(ctx context.Context, item T) (R, error) {
	m := &member[T, R]{item: item, done: make(chan struct{})}
	g.mu.Lock()
	if g.busy {
		g.waiting = append(g.waiting, m)
	} else {
		g.busy = true
		go g.make([]*member[T, R]{m})
	}
	g.mu.Unlock()
	select {
	case <-m.done:
		return m.result, m.err
	case <-ctx.Done():
		var none R
		return none, context.Cause(ctx)
	}
}

// make makes calls until nobody waits for one.
func (g *group[T, R]) make(ms []*member[T, R]) {
	for len(ms) > 0 {
		items := make([]T, len(ms))
		for i, m := range ms {
			items[i] = m.item
		}
		results, err := g.call(g.ctx, items)
		for i, m := range ms {
			if m.err = err; err == nil {
				m.result = results[i]
			}
			close(m.done)
		}
		g.mu.Lock()
		n := min(len(g.waiting), g.max)
		ms = g.waiting[:n:n]
		g.waiting = g.waiting[n:]
		g.busy = n > 0
		g.mu.Unlock()
	}
}
