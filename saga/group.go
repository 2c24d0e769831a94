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
// that of the call. Who finds no call under way makes one for itself, at once and
// with its own ctx; those who come meanwhile are served together after that.
func (g *group[T, R]) do(ctx context.Context, item T) (R, error) {
	m := &member[T, R]{item: item}
	g.mu.Lock()
	if g.busy {
		m.done = make(chan struct{})
		g.waiting = append(g.waiting, m)
		g.mu.Unlock()
		select {
		case <-m.done:
			return m.result, m.err
		case <-ctx.Done():
			var none R
			return none, context.Cause(ctx) // the call goes on all the same
		}
	}
	g.busy = true
	g.mu.Unlock()
	g.make(ctx, []*member[T, R]{m})
	if next := g.next(); next != nil {
		go func() {
			for ; next != nil; next = g.next() {
				g.make(g.ctx, next)
			}
		}()
	}
	return m.result, m.err
}

func (g *group[T, R]) make(ctx context.Context, ms []*member[T, R]) {
	items := make([]T, len(ms))
	for i, m := range ms {
		items[i] = m.item
	}
	results, err := g.call(ctx, items)
	for i, m := range ms {
		if m.err = err; err == nil {
			m.result = results[i]
		}
		if m.done != nil {
			close(m.done)
		}
	}
}

// next returns those who have waited for a call, or nil: then none is under way.
func (g *group[T, R]) next() []*member[T, R] {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := min(len(g.waiting), g.max)
	if g.busy = n > 0; !g.busy {
		return nil
	}
	ms := g.waiting[:n:n]
	g.waiting = g.waiting[n:]
	return ms
}
