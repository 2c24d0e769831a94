package lock

import (
	"context"
	"slices"
	"sync"
)

// lines are the queues of a process, one for each key that is wanted or held.
// The zero value is empty.
type lines struct {
	mu      sync.Mutex
	waiting map[string][]chan struct{} // behind the one whose turn it is
}

// enter returns true when it is the caller's turn, and false when ctx has ended
// before, or without waiting if wait is false.
func (l *lines) enter(ctx context.Context, key string, wait bool) bool {
	l.mu.Lock()
	if l.waiting == nil {
		l.waiting = make(map[string][]chan struct{})
	}
	queue, busy := l.waiting[key]
	if !busy {
		l.waiting[key] = nil
		l.mu.Unlock()
		return true
	}
	if !wait {
		l.mu.Unlock()
		return false
	}
	turn := make(chan struct{})
	l.waiting[key] = append(queue, turn)
	l.mu.Unlock()
	select {
	case <-turn:
		return true
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	queue = l.waiting[key]
	if i := slices.Index(queue, turn); i >= 0 {
		l.waiting[key] = slices.Delete(queue, i, i+1)
	} else {
		l.next(key) // it came at the same moment
	}
	return false
}

// leave gives the turns of the keys to those who are next.
func (l *lines) leave(keys []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range keys {
		l.next(key)
	}
}

func (l *lines) next(key string) {
	queue := l.waiting[key]
	if len(queue) == 0 {
		delete(l.waiting, key)
		return
	}
	close(queue[0])
	l.waiting[key] = slices.Delete(queue, 0, 1)
}
