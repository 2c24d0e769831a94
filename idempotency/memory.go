package idempotency

import (
	"bytes"
	"context"
	"sync"
	"time"
)

// A MemoryStore is a [Store] in memory, for tests, examples and processes that
// need no durability. It keeps every rule of the durable ones except that its
// content ends with the process. Expired records are removed as others are
// claimed. The zero value is empty and ready to use; it is safe for concurrent
// use.
type MemoryStore struct {
	mu      sync.Mutex
	records map[memoryKey]*memoryRecord
	sweep   int // number of records at which to look for expired ones
}

type memoryKey struct{ scope, id string }

type memoryRecord struct {
	fingerprint []byte
	token       string
	done        bool
	result      []byte
	lease       time.Time // when the claim ends, where it is not done
	expires     time.Time
}

func (r *memoryRecord) expired(now time.Time) bool {
	return !now.Before(r.expires) && (r.done || !now.Before(r.lease))
}

// Claim implements [Store].
func (s *MemoryStore) Claim(ctx context.Context, key Key, req ClaimRequest) (Claim, error) {
	if err := ctx.Err(); err != nil {
		return Claim{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.removeExpired(now)
	at := memoryKey{key.Scope, key.ID}
	if r := s.records[at]; r != nil && !r.expired(now) {
		switch {
		case !bytes.Equal(r.fingerprint, key.Fingerprint):
			return Claim{}, ErrMismatch
		case r.done:
			return Claim{Done: true, Result: r.result, TTL: r.expires.Sub(now)}, nil
		case r.token == req.Token: // a repetition
		case now.Before(r.lease):
			return Claim{Lease: r.lease.Sub(now)}, ErrInProgress
		case req.AtMostOnce:
			return Claim{}, ErrUnknown
		}
	}
	if s.records == nil {
		s.records = make(map[memoryKey]*memoryRecord)
	}
	s.records[at] = &memoryRecord{
		fingerprint: bytes.Clone(key.Fingerprint), token: req.Token,
		lease: now.Add(req.Lease), expires: now.Add(req.TTL),
	}
	return Claim{}, nil
}

// removeExpired looks at all records each time their number has doubled.
func (s *MemoryStore) removeExpired(now time.Time) {
	if len(s.records) < max(s.sweep, 1024) {
		return
	}
	for k, r := range s.records {
		if r.expired(now) {
			delete(s.records, k)
		}
	}
	s.sweep = 2 * len(s.records)
}

// Extend implements [Store].
func (s *MemoryStore) Extend(ctx context.Context, key Key, token string, lease time.Duration) error {
	return s.update(ctx, key, token, func(r *memoryRecord) error {
		if r.done {
			return ErrLeaseLost
		}
		r.lease = time.Now().Add(lease)
		return nil
	})
}

// Complete implements [Store].
func (s *MemoryStore) Complete(ctx context.Context, key Key, token string, result []byte) error {
	return s.update(ctx, key, token, func(r *memoryRecord) error {
		if !r.done {
			r.done, r.result = true, bytes.Clone(result)
		}
		return nil
	})
}

// Release implements [Store].
func (s *MemoryStore) Release(ctx context.Context, key Key, token string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at := memoryKey{key.Scope, key.ID}
	r := s.records[at]
	if r == nil || r.expired(time.Now()) {
		return nil
	}
	if r.done || r.token != token {
		return ErrLeaseLost
	}
	delete(s.records, at)
	return nil
}

func (s *MemoryStore) update(ctx context.Context, key Key, token string, f func(*memoryRecord) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[memoryKey{key.Scope, key.ID}]
	if r == nil || r.token != token || r.expired(time.Now()) {
		return ErrLeaseLost
	}
	return f(r)
}
