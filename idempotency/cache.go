package idempotency

import (
	"bytes"
	"container/list"
	"context"
	"sync"
	"time"
)

// CacheOptions tunes a [Cache]. The zero value of each field means its default.
type CacheOptions struct {
	// MaxRecords is how many records are held at most. Default 10,000.
	MaxRecords int
	// MaxBytes bounds their results, fingerprints and keys together. A larger
	// record is not held. Default 64 MiB.
	MaxBytes int
}

// A Cache is a [Store] that answers replays from this process's memory, and
// takes everything else to the store behind it. It holds only completed records,
// which never change, for no longer than the store itself does; so it never
// grants, and never hides, a claim. The least recently used go first. A record
// that somebody deletes from the store by hand stays here until its TTL ends.
//
// It is safe for concurrent use. Nothing of it outlives the process.
type Cache struct {
	store Store
	opts  CacheOptions

	mu    sync.Mutex
	byKey map[memoryKey]*list.Element
	order *list.List // of *cached, the most recently used first
	bytes int
}

type cached struct {
	key         memoryKey
	fingerprint []byte
	result      []byte
	expires     time.Time
}

func (c *cached) size() int {
	return len(c.key.scope) + len(c.key.id) + len(c.fingerprint) + len(c.result)
}

// NewCache returns a cache in front of store. opts may be nil.
func NewCache(store Store, opts *CacheOptions) *Cache {
	if store == nil {
		panic("idempotency: NewCache needs a store")
	}
	c := &Cache{store: store, byKey: make(map[memoryKey]*list.Element), order: list.New()}
	if opts != nil {
		c.opts = *opts
	}
	setDefault(&c.opts.MaxRecords, 10_000)
	setDefault(&c.opts.MaxBytes, 64<<20)
	return c
}

// Claim implements [Store].
func (c *Cache) Claim(ctx context.Context, key Key, req ClaimRequest) (Claim, error) {
	if err := ctx.Err(); err != nil {
		return Claim{}, err
	}
	asked := time.Now()
	if r := c.get(key, asked); r != nil {
		if !bytes.Equal(r.fingerprint, key.Fingerprint) {
			return Claim{}, ErrMismatch
		}
		return Claim{Done: true, Result: r.result, TTL: r.expires.Sub(asked)}, nil
	}
	claim, err := c.store.Claim(ctx, key, req)
	if err == nil && claim.Done {
		// The TTL counts from before the question, so it cannot end too late.
		c.put(&cached{memoryKey{key.Scope, key.ID}, bytes.Clone(key.Fingerprint), claim.Result, asked.Add(claim.TTL)})
	}
	return claim, err
}

// Extend implements [Store].
func (c *Cache) Extend(ctx context.Context, key Key, token string, lease time.Duration) error {
	return c.store.Extend(ctx, key, token, lease)
}

// Complete implements [Store].
func (c *Cache) Complete(ctx context.Context, key Key, token string, result []byte) error {
	return c.store.Complete(ctx, key, token, result)
}

// Release implements [Store].
func (c *Cache) Release(ctx context.Context, key Key, token string) error {
	return c.store.Release(ctx, key, token)
}

func (c *Cache) get(key Key, now time.Time) *cached {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.byKey[memoryKey{key.Scope, key.ID}]
	if e == nil {
		return nil
	}
	r := e.Value.(*cached)
	if !now.Before(r.expires) {
		c.remove(e)
		return nil
	}
	c.order.MoveToFront(e)
	return r
}

func (c *Cache) put(r *cached) {
	if r.size() > c.opts.MaxBytes {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.byKey[r.key]; e != nil {
		c.remove(e)
	}
	c.byKey[r.key] = c.order.PushFront(r)
	c.bytes += r.size()
	for len(c.byKey) > c.opts.MaxRecords || c.bytes > c.opts.MaxBytes {
		c.remove(c.order.Back())
	}
}

func (c *Cache) remove(e *list.Element) {
	r := c.order.Remove(e).(*cached)
	delete(c.byKey, r.key)
	c.bytes -= r.size()
}
