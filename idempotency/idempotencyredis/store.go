// Package idempotencyredis keeps idempotency records in Redis: one hash per key,
// changed by scripts that run atomically on the server and by its clock.
//
// # What Redis may lose
//
// Redis acknowledges a write before it is on a disk or on a replica. When a
// primary fails, the records of its last moments may be gone, and their
// operations run again when they are retried. The same happens where
// maxmemory-policy is one that evicts: use noeviction, or volatile-ttl with
// memory to spare. Where an operation must never run twice, keep its record in
// the transaction of its effect (package idempotencypg).
package idempotencyredis

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/idempotency"
)

// Options tunes a [Store]. The zero value of each field means its default.
type Options struct {
	// Prefix begins the name of every record. Default "idempotency:".
	Prefix string
}

// A Store is an [idempotency.Store] in Redis 5 or newer, also in a Redis
// Cluster, for each script has one key. A first execution costs two round trips,
// a replay one; a server that does not know the scripts yet, as after a restart,
// is sent them once more. It is safe for concurrent use.
type Store struct {
	client redis.Scripter
	prefix string
}

var _ idempotency.Store = (*Store)(nil)

var (
	//go:embed claim.lua
	claimSource string
	//go:embed update.lua
	updateSource string

	claimScript  = redis.NewScript(claimSource)
	updateScript = redis.NewScript(updateSource)
)

// New returns a store on client, such as a *redis.Client or a
// *redis.ClusterClient, which stays the caller's. opts may be nil.
func New(client redis.Scripter, opts *Options) *Store {
	if client == nil {
		panic("idempotencyredis: New needs a client")
	}
	s := &Store{client: client, prefix: "idempotency:"}
	if opts != nil && opts.Prefix != "" {
		s.prefix = opts.Prefix
	}
	return s
}

// name is injective: the scope's length tells where the ID begins.
func (s *Store) name(key idempotency.Key) []string {
	return []string{s.prefix + strconv.Itoa(len(key.Scope)) + ":" + key.Scope + ":" + key.ID}
}

// Claim implements [idempotency.Store].
func (s *Store) Claim(ctx context.Context, key idempotency.Key, req idempotency.ClaimRequest) (c idempotency.Claim, err error) {
	if err := ctx.Err(); err != nil {
		return c, wrap("claim", err)
	}
	once := ""
	if req.AtMostOnce {
		once = "1"
	}
	// The record is kept 2 ms longer than asked, so that no rounding ends it early.
	reply, err := claimScript.Run(ctx, s.client, s.name(key),
		req.Token, key.Fingerprint, req.Lease.Microseconds(), max(req.TTL, req.Lease).Milliseconds()+2, once).Slice()
	if err != nil {
		return c, wrap("claim", err)
	}
	verdict, _ := reply[0].(string)
	switch {
	case verdict == "claimed":
		return c, nil
	case verdict == "mismatch":
		return c, idempotency.ErrMismatch
	case verdict == "unknown":
		return c, idempotency.ErrUnknown
	case verdict == "busy" && len(reply) == 2:
		us, _ := reply[1].(int64)
		return idempotency.Claim{Lease: time.Duration(us) * time.Microsecond}, idempotency.ErrInProgress
	case verdict == "done" && len(reply) == 3:
		ms, _ := reply[1].(int64)
		result, _ := reply[2].(string)
		return idempotency.Claim{Done: true, Result: []byte(result), TTL: max(time.Duration(ms-2)*time.Millisecond, 1)}, nil
	}
	return c, wrap("claim", fmt.Errorf("unexpected reply %q", reply))
}

// Extend implements [idempotency.Store].
func (s *Store) Extend(ctx context.Context, key idempotency.Key, token string, lease time.Duration) error {
	return s.update(ctx, "extend", key, token, lease.Microseconds())
}

// Complete implements [idempotency.Store].
func (s *Store) Complete(ctx context.Context, key idempotency.Key, token string, result []byte) error {
	return s.update(ctx, "complete", key, token, result)
}

// Release implements [idempotency.Store].
func (s *Store) Release(ctx context.Context, key idempotency.Key, token string) error {
	return s.update(ctx, "release", key, token, "")
}

func (s *Store) update(ctx context.Context, verb string, key idempotency.Key, token string, arg any) error {
	if err := ctx.Err(); err != nil {
		return wrap(verb, err)
	}
	n, err := updateScript.Run(ctx, s.client, s.name(key), token, verb, arg).Int()
	if err == nil && n == 0 {
		err = idempotency.ErrLeaseLost
	}
	return wrap(verb, err)
}

func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, redis.Nil) {
		err = errors.New("empty reply")
	}
	return fmt.Errorf("idempotencyredis: %s: %w", op, err)
}
