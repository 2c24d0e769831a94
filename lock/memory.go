package lock

import (
	"context"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/lock/internal/wake"
)

// A MemoryStore is a [Store] and [Watcher] in memory, for tests, examples and
// programs of one process. It keeps every rule of the others, but its content
// ends with the process. The zero value is empty and ready to use; it is safe for
// concurrent use.
type MemoryStore struct {
	mu    sync.Mutex
	held  map[string]memoryLease
	token int64
	hub   wake.Hub
}

type memoryLease struct {
	owner   string
	token   int64
	expires time.Time
}

var (
	_ Store   = (*MemoryStore)(nil)
	_ Watcher = (*MemoryStore)(nil)
)

// Acquire implements [Store].
func (s *MemoryStore) Acquire(ctx context.Context, req Request) (int64, error) {
	if err := check(ctx, req); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = make(map[string]memoryLease)
	}
	now := time.Now()
	for _, key := range req.Keys {
		if h, ok := s.live(key, now); ok && h.owner != req.Owner {
			return 0, &HeldError{Key: key, RetryAfter: h.expires.Sub(now)}
		}
	}
	if s.holds(req, now) {
		return s.held[req.Keys[0]].token, nil
	}
	s.token++
	for _, key := range req.Keys {
		s.held[key] = memoryLease{req.Owner, s.token, now.Add(req.TTL)}
	}
	return s.token, nil
}

// live returns the lease on key, and forgets one that has ended.
func (s *MemoryStore) live(key string, now time.Time) (memoryLease, bool) {
	h, ok := s.held[key]
	if ok && !now.Before(h.expires) {
		delete(s.held, key)
		return h, false
	}
	return h, ok
}

func (s *MemoryStore) holds(req Request, now time.Time) bool {
	for _, key := range req.Keys {
		if h, ok := s.live(key, now); !ok || h.owner != req.Owner {
			return false
		}
	}
	return true
}

// Extend implements [Store].
func (s *MemoryStore) Extend(ctx context.Context, req Request) error {
	if err := check(ctx, req); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if !s.holds(req, now) {
		return ErrLost
	}
	for _, key := range req.Keys {
		h := s.held[key]
		h.expires = now.Add(req.TTL)
		s.held[key] = h
	}
	return nil
}

// Release implements [Store].
func (s *MemoryStore) Release(ctx context.Context, req Request) error {
	if err := check(ctx, req); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	var err error
	for _, key := range req.Keys {
		switch h, ok := s.live(key, now); {
		case ok && h.owner == req.Owner:
			delete(s.held, key)
		case ok:
			err = ErrLost
		}
		s.hub.Wake(key)
	}
	return err
}

// Watch implements [Watcher].
func (s *MemoryStore) Watch(_ context.Context, keys []string, wake func()) (stop func()) {
	stop = s.hub.Add(keys, wake)
	wake()
	return stop
}

func check(ctx context.Context, req Request) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return req.Validate()
}
