// Package lockpg keeps leases in Postgres, and guards what they protect there.
//
// [Guard] is what a lock is for: inside of a transaction it refuses one who no
// longer holds the lease, and keeps the lease from passing on until the
// transaction has ended, so that no former holder's write can commit. [Fence]
// does as much as can be done with leases that are held elsewhere. [UpdateVersion]
// and [Rows] are optimistic locking, in one round trip a write.
//
// [Migrate] makes the tables lock_lease and lock_fence, whose names are resolved
// by search_path. Postgres 15 or newer; PgBouncer in transaction mode will do.
package lockpg

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/lock"
)

// Options tunes a [Store]. The zero value of each field means its default.
type Options struct {
	// Dial connects to where keys that become free are told of, while somebody
	// waits for one: one connection of each store, beside its pool. Through
	// PgBouncer in transaction mode nothing would be heard; dial the server itself.
	// Default: as the pool connects.
	Dial func(ctx context.Context) (*pgx.Conn, error)
	// Logger reports failures of that connection. Default slog.Default().
	Logger *slog.Logger
}

// A Store is a [lock.Store] in Postgres. Acquire and Release cost one round trip
// and one commit each. The clock that decides is the database's, and tokens never
// come back: not after a crash, a purge, or dump and restore. After a failover
// they do only if the replica was asynchronous.
//
// It is safe for concurrent use.
type Store struct {
	pool     *pgxpool.Pool
	listener listener
}

var (
	_ lock.Store   = (*Store)(nil)
	_ lock.Watcher = (*Store)(nil)
)

// New returns a store on pool, which stays the caller's. opts may be nil.
func New(pool *pgxpool.Pool, opts *Options) *Store {
	if pool == nil {
		panic("lockpg: New needs a pool")
	}
	s := &Store{pool: pool}
	if opts != nil {
		s.listener.dial, s.listener.logger = opts.Dial, opts.Logger
	}
	if s.listener.dial == nil {
		s.listener.dial = dialLike(pool)
	}
	if s.listener.logger == nil {
		s.listener.logger = slog.Default()
	}
	return s
}

const (
	ensure = `INSERT INTO lock_lease (key) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING`

	// FOR UPDATE is what Guard's FOR KEY SHARE keeps out. The token is drawn when
	// all of the rows are locked, or else an earlier token could come later.
	acquire = `
WITH mine AS MATERIALIZED (
	SELECT key, token, owner = $2 AND expires_at > clock_timestamp() AS held FROM lock_lease
	WHERE key = ANY ($1::text[]) AND (expires_at <= clock_timestamp() OR owner = $2)
	ORDER BY key FOR UPDATE SKIP LOCKED
), granted AS MATERIALIZED (
	SELECT CASE WHEN bool_and(held) THEN max(token) ELSE nextval('lock_token') END AS token, bool_and(held) AS again
	FROM mine HAVING count(*) = cardinality($1::text[])
)
UPDATE lock_lease l SET owner = $2, token = g.token, waited = l.waited AND g.again, used_at = clock_timestamp(),
	expires_at = CASE WHEN g.again THEN l.expires_at ELSE clock_timestamp() + $3::interval END
FROM granted g WHERE l.key = ANY ($1::text[])
RETURNING l.token`

	// A row that is free all the same is locked by one who has just asked for it, or
	// guarded by a transaction of its former holder.
	holder = `
SELECT key, greatest(extract(epoch FROM expires_at - clock_timestamp()), 0.02)::float8 FROM lock_lease
WHERE key = ANY ($1::text[]) AND owner <> $2 ORDER BY expires_at <= clock_timestamp(), key LIMIT 1`

	// Whether the release will be told of. A row that is seen as marked is told of
	// even if that happens meanwhile; one that is not seen so may have been freed.
	mark = `
WITH marked AS (
	UPDATE lock_lease SET waited = true WHERE key = $1 AND NOT waited AND expires_at > clock_timestamp() RETURNING key
)
SELECT EXISTS (SELECT FROM marked)
	OR EXISTS (SELECT FROM lock_lease WHERE key = $1 AND waited AND expires_at > clock_timestamp())`

	extend = `
WITH mine AS MATERIALIZED (
	SELECT key FROM lock_lease WHERE key = ANY ($1::text[]) AND owner = $2 AND expires_at > clock_timestamp()
	ORDER BY key FOR NO KEY UPDATE
), held AS MATERIALIZED (SELECT FROM mine HAVING count(*) = cardinality($1::text[]))
UPDATE lock_lease l SET expires_at = clock_timestamp() + $3::interval
FROM held WHERE l.key = ANY ($1::text[])`

	// NOTIFY makes commits wait for one another, so only where somebody waits. What
	// has ended is not touched: for a moment it would seem to be held.
	release = `
WITH mine AS MATERIALIZED (
	SELECT key FROM lock_lease WHERE key = ANY ($1::text[]) AND owner = $2 AND expires_at > clock_timestamp()
	ORDER BY key FOR NO KEY UPDATE
), freed AS (
	UPDATE lock_lease l SET owner = '', expires_at = 'epoch', used_at = clock_timestamp()
	FROM mine WHERE l.key = mine.key RETURNING l.key, l.waited
), told AS MATERIALIZED (SELECT pg_notify('lock_free', key) FROM freed WHERE waited)
SELECT count(*) FILTER (WHERE l.owner <> $2 AND l.expires_at > clock_timestamp()), (SELECT count(*) FROM told)
FROM lock_lease l WHERE l.key = ANY ($1::text[])`
)

// Acquire implements [lock.Store].
func (s *Store) Acquire(ctx context.Context, req lock.Request) (int64, error) {
	if err := req.Validate(); err != nil {
		return 0, err
	}
	var token int64
	held := lock.HeldError{Key: req.Keys[0], RetryAfter: 20 * time.Millisecond}
	var batch pgx.Batch
	batch.Queue(ensure, req.Keys)
	batch.Queue(acquire, req.Keys, req.Owner, req.TTL)
	batch.Queue(holder, req.Keys, req.Owner)
	results := s.pool.SendBatch(ctx, &batch)
	_, err := results.Exec()
	if err == nil {
		err = optional(results.QueryRow().Scan(&token))
	}
	if err == nil && token == 0 {
		var left float64
		if err = results.QueryRow().Scan(&held.Key, &left); err == nil {
			held.RetryAfter = time.Duration(left * float64(time.Second))
		}
		err = optional(err)
	}
	if closed := results.Close(); err == nil {
		err = closed
	}
	switch {
	case err != nil:
		return 0, wrap("acquire", err)
	case token != 0:
		return token, nil
	case req.Waiting:
		var marked bool
		if err := s.pool.QueryRow(ctx, mark, held.Key).Scan(&marked); err != nil {
			return 0, wrap("acquire", err)
		}
		if !marked {
			held.RetryAfter = min(held.RetryAfter, 20*time.Millisecond)
		}
	}
	return 0, &held
}

// optional drops the error of a row that is not there.
func optional(err error) error {
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	return err
}

// Extend implements [lock.Store].
func (s *Store) Extend(ctx context.Context, req lock.Request) error {
	if err := req.Validate(); err != nil {
		return err
	}
	tag, err := s.pool.Exec(ctx, extend, req.Keys, req.Owner, req.TTL)
	if err == nil && tag.RowsAffected() == 0 {
		err = lock.ErrLost
	}
	return wrap("extend", err)
}

// Release implements [lock.Store].
func (s *Store) Release(ctx context.Context, req lock.Request) error {
	if err := req.Validate(); err != nil {
		return err
	}
	var others, told int
	err := s.pool.QueryRow(ctx, release, req.Keys, req.Owner).Scan(&others, &told)
	if err == nil && others > 0 {
		err = lock.ErrLost
	}
	return wrap("release", err)
}

// Purge removes at most limit keys that were neither held nor wanted for at least
// age, in a transaction of its own, and returns how many it removed. Call it from
// a job where keys are many and do not come back; calls at the same time share
// the work. age is at least a minute.
func (s *Store) Purge(ctx context.Context, age time.Duration, limit int) (int, error) {
	tag, err := s.pool.Exec(ctx, `
DELETE FROM lock_lease WHERE ctid = ANY (ARRAY(
	SELECT ctid FROM lock_lease
	WHERE used_at <= now() - $1::interval AND expires_at <= now() - $1::interval
	LIMIT $2 FOR UPDATE SKIP LOCKED))`, max(age, time.Minute), limit)
	return int(tag.RowsAffected()), wrap("purge", err)
}

// wrap names the operation, and missing tables with their remedy.
func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "42P01" { // undefined_table
		return fmt.Errorf("lockpg: %s: call lockpg.Migrate, or check search_path: %w", op, err)
	}
	return fmt.Errorf("lockpg: %s: %w", op, err)
}
