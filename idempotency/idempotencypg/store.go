// Package idempotencypg keeps idempotency records in Postgres.
//
// [DoTx] is the strongest form: the claim, the work and its result are one
// transaction, so an effect on the same database happens exactly once whatever
// is killed. [Store] is for work that cannot be one transaction, and for
// idempotency.Middleware; with [CompleteTx] the work's last transaction also
// completes the key.
//
// [Migrate] makes the table idempotency_key, whose name is resolved by
// search_path. Expired records are invisible but stay until [Store.Purge].
// Postgres 15 or newer; PgBouncer in transaction mode will do.
package idempotencypg

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/internal/execution"
)

// A Store is an [idempotency.Store] in Postgres. A first execution costs two
// round trips and two commits, a replay one round trip that writes nothing. The
// clock that decides is the database's. It is safe for concurrent use.
type Store struct {
	pool *pgxpool.Pool
}

var _ idempotency.Store = (*Store)(nil)

// New returns a store on pool, which stays the caller's.
func New(pool *pgxpool.Pool) *Store {
	if pool == nil {
		panic("idempotencypg: New needs a pool")
	}
	return &Store{pool: pool}
}

const (
	insertClaim = `
INSERT INTO idempotency_key (scope, id, fingerprint, token, lease_until, expires_at)
VALUES ($1, $2, $3, $4, clock_timestamp() + $5::interval, clock_timestamp() + $6::interval)
ON CONFLICT DO NOTHING`

	selectRecord = `
SELECT token, fingerprint, result, lease_until IS NULL,
	coalesce(extract(epoch FROM lease_until - now), 0)::float8, extract(epoch FROM expires_at - now)::float8
FROM idempotency_key, clock_timestamp() AS now
WHERE scope = $1 AND id = $2`

	free = `(lease_until <= clock_timestamp() OR lease_until IS NULL AND expires_at <= clock_timestamp())`

	takeOver = `
UPDATE idempotency_key SET fingerprint = $3, token = $4, result = NULL,
	lease_until = clock_timestamp() + $5::interval, expires_at = clock_timestamp() + $6::interval
WHERE scope = $1 AND id = $2 AND token = $7 AND ` + free

	extend = `
UPDATE idempotency_key SET lease_until = clock_timestamp() + $4::interval
WHERE scope = $1 AND id = $2 AND token = $3 AND lease_until IS NOT NULL`

	complete = `
UPDATE idempotency_key SET result = $4, lease_until = NULL
WHERE scope = $1 AND id = $2 AND token = $3 AND lease_until IS NOT NULL`

	release = `
DELETE FROM idempotency_key
WHERE scope = $1 AND id = $2 AND token = $3 AND lease_until IS NOT NULL`
)

// A record is a row.
type record struct {
	token       string
	fingerprint []byte
	result      []byte
	done        bool
	lease, ttl  time.Duration // what is left
}

func scan(row pgx.Row) (*record, error) {
	var r record
	var lease, ttl float64
	err := row.Scan(&r.token, &r.fingerprint, &r.result, &r.done, &lease, &ttl)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil
	}
	r.lease, r.ttl = seconds(lease), seconds(ttl)
	return &r, err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// answer tells what the record means for one who wants the key: its claim may be
// free to take over, or nil where only an execution in progress is in the way.
func (r *record) answer(key idempotency.Key) (c idempotency.Claim, isFree bool, err error) {
	switch {
	case r.ttl <= 0 && r.lease <= 0:
		return c, true, nil
	case !bytes.Equal(r.fingerprint, key.Fingerprint):
		return c, false, idempotency.ErrMismatch
	case r.done:
		return idempotency.Claim{Done: true, Result: r.result, TTL: r.ttl}, false, nil
	case r.lease > 0:
		return idempotency.Claim{Lease: r.lease}, false, idempotency.ErrInProgress
	}
	return c, true, nil
}

// Claim implements [idempotency.Store].
func (s *Store) Claim(ctx context.Context, key idempotency.Key, req idempotency.ClaimRequest) (idempotency.Claim, error) {
	args := []any{key.Scope, key.ID, notNil(key.Fingerprint), req.Token, req.Lease, req.TTL}
	for {
		var batch pgx.Batch
		batch.Queue(insertClaim, args...)
		batch.Queue(selectRecord, key.Scope, key.ID)
		results := s.pool.SendBatch(ctx, &batch)
		tag, err := results.Exec()
		var r *record
		if err == nil && tag.RowsAffected() == 0 {
			r, err = scan(results.QueryRow())
		}
		if closed := results.Close(); err == nil {
			err = closed
		}
		if err != nil {
			return idempotency.Claim{}, wrap("claim", err)
		}
		if tag.RowsAffected() == 1 {
			return idempotency.Claim{}, nil
		}
		if r == nil {
			continue // released between the two statements
		}
		if r.token == req.Token && !r.done {
			return idempotency.Claim{}, nil // a repetition
		}
		claim, isFree, err := r.answer(key)
		if !isFree {
			return claim, err
		}
		if req.AtMostOnce && r.ttl > 0 {
			return idempotency.Claim{}, idempotency.ErrUnknown
		}
		tag, err = s.pool.Exec(ctx, takeOver, append(args, r.token)...)
		if err != nil {
			return idempotency.Claim{}, wrap("claim", err)
		}
		if tag.RowsAffected() == 1 {
			return idempotency.Claim{}, nil
		} // otherwise somebody else was faster
	}
}

// Extend implements [idempotency.Store].
func (s *Store) Extend(ctx context.Context, key idempotency.Key, token string, lease time.Duration) error {
	tag, err := s.pool.Exec(ctx, extend, key.Scope, key.ID, token, lease)
	if err == nil && tag.RowsAffected() == 0 {
		err = idempotency.ErrLeaseLost
	}
	return wrap("extend", err)
}

// Complete implements [idempotency.Store].
func (s *Store) Complete(ctx context.Context, key idempotency.Key, token string, result []byte) error {
	return wrap("complete", completeRow(ctx, s.pool, key.Scope, key.ID, token, result))
}

// CompleteTx records the result of the execution that ctx belongs to in the
// caller's transaction: ctx is what idempotency.Do gave to the work, on a
// [Store] of the same database. Do then records nothing itself, and must return
// the same value.
//
// The work and its result become visible together, if tx commits. If the claim
// was lost, CompleteTx wraps idempotency.ErrLeaseLost and tx must be rolled back;
// that is what keeps two executions from both taking effect.
func CompleteTx[T any](ctx context.Context, tx pgx.Tx, result T) error {
	e := execution.From(ctx)
	if e == nil || e.Opaque {
		return errors.New("idempotencypg: CompleteTx: the context is not one that idempotency.Do gave to its work")
	}
	b, err := execution.Encode(result)
	if err != nil {
		return fmt.Errorf("idempotencypg: %w", err)
	}
	e.SetCompleted() // first: an extension that waits for tx's row lock would find the claim gone
	return wrap("complete", completeRow(ctx, tx, e.Scope, e.ID, e.Token, b))
}

type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func completeRow(ctx context.Context, db querier, scope, id, token string, result []byte) error {
	tag, err := db.Exec(ctx, complete, scope, id, token, result)
	if err != nil || tag.RowsAffected() == 1 {
		return err
	}
	r, err := scan(db.QueryRow(ctx, selectRecord, scope, id))
	if err == nil && (r == nil || r.token != token) {
		err = idempotency.ErrLeaseLost
	}
	return err
}

// Release implements [idempotency.Store].
func (s *Store) Release(ctx context.Context, key idempotency.Key, token string) error {
	tag, err := s.pool.Exec(ctx, release, key.Scope, key.ID, token)
	if err == nil && tag.RowsAffected() == 0 {
		var r *record
		if r, err = scan(s.pool.QueryRow(ctx, selectRecord, key.Scope, key.ID)); r != nil && err == nil {
			err = idempotency.ErrLeaseLost
		}
	}
	return wrap("release", err)
}

// Purge removes at most limit expired records, in a transaction of its own, and
// returns how many it removed. Call it from a job until it returns less than
// limit; calls at the same time share the work.
func (s *Store) Purge(ctx context.Context, limit int) (int, error) {
	tag, err := s.pool.Exec(ctx, `
DELETE FROM idempotency_key WHERE ctid = ANY (ARRAY(
	SELECT ctid FROM idempotency_key
	WHERE expires_at <= now() AND (lease_until IS NULL OR lease_until <= now())
	ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED))`, limit)
	return int(tag.RowsAffected()), wrap("purge", err)
}

func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// wrap names the operation, and a missing table with its remedy.
func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "42P01" { // undefined_table
		return fmt.Errorf("idempotencypg: %s: call idempotencypg.Migrate, or check search_path: %w", op, err)
	}
	return fmt.Errorf("idempotencypg: %s: %w", op, err)
}
