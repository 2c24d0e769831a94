package sagapg

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/saga"
)

const (
	// A runner whose lease is over is marked as dead by whoever notices first;
	// that is final, and its row stays until nothing refers to it any more.
	beat = `
INSERT INTO saga_runner AS r (id, expires_at) VALUES ($1, clock_timestamp() + make_interval(secs => $2))
ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at WHERE NOT r.dead
RETURNING true`

	alive = `SELECT true FROM saga_runner WHERE id = $1 AND NOT dead`

	markDead = `UPDATE saga_runner SET dead = true WHERE NOT dead AND expires_at < clock_timestamp() AND id <> $1`

	// now() and not clock_timestamp(), which no index can serve.
	take = `
WITH d AS (
	SELECT * FROM unnest($2::text[], $3::int[]) AS d (name, version)
), orphan AS (
	SELECT s.id FROM saga_runner r JOIN saga_instance s ON s.owner = r.id JOIN d ON d.name = s.name AND s.version <= d.version
	WHERE r.dead
	LIMIT $4
	FOR UPDATE OF s SKIP LOCKED
), due AS (
	SELECT s.id FROM d CROSS JOIN LATERAL (
		SELECT id FROM saga_instance
		WHERE name = d.name AND version <= d.version AND owner IS NULL AND wake_at <= now()
		ORDER BY wake_at
		LIMIT $4
		FOR UPDATE SKIP LOCKED) s
	LIMIT $4
), taken AS (
	SELECT id, 1 AS death FROM orphan UNION ALL SELECT id, 0 FROM due LIMIT $4
)
UPDATE saga_instance s SET owner = $1, deaths = s.deaths + t.death
FROM taken t
WHERE s.id = t.id AND EXISTS (SELECT FROM saga_runner WHERE id = $1 AND NOT dead)
RETURNING s.id, s.name, s.version, s.status, s.owner::text, s.wake_at, s.deaths, coalesce(s.cancel, ''), s.signals,
	s.started_at, s.ended_at, s.cause, s.reason, s.state, s.steps`

	cancelled = `SELECT id FROM saga_instance WHERE owner = $1 AND cancel IS NOT NULL`

	nextDue = `
SELECT clock_timestamp(), extract(epoch FROM min(s.wake_at) - clock_timestamp())::float8
FROM unnest($1::text[], $2::int[]) AS d (name, version) CROSS JOIN LATERAL (
	SELECT wake_at FROM saga_instance
	WHERE name = d.name AND version <= d.version AND owner IS NULL AND wake_at IS NOT NULL
	ORDER BY wake_at
	LIMIT 1) s`

	leave = `UPDATE saga_instance SET owner = NULL, wake_at = clock_timestamp() WHERE owner = $1`

	forget = `DELETE FROM saga_runner WHERE id = $1`
)

// Lease implements [saga.Store].
func (s *Store) Lease(ctx context.Context, req saga.LeaseRequest) (saga.Grant, error) {
	if req.TTL <= 0 {
		return saga.Grant{}, s.leave(ctx, req.Runner)
	}
	names, versions := make([]string, 0, len(req.Sagas)), make([]int, 0, len(req.Sagas))
	for name, version := range req.Sagas {
		names, versions = append(names, name), append(versions, version)
	}
	g := saga.Grant{Next: -1}
	var held bool
	var b pgx.Batch
	b.Queue(useIndexes)
	isHeld := func(row pgx.Row) error {
		err := row.Scan(&held)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		return err
	}
	if req.Beat {
		b.Queue(beat, req.Runner, req.TTL.Seconds()).QueryRow(isHeld)
	} else {
		b.Queue(alive, req.Runner).QueryRow(isHeld)
	}
	b.Queue(markDead, req.Runner)
	if req.Limit > 0 {
		b.Queue(take, req.Runner, names, versions, req.Limit).Query(func(rows pgx.Rows) (err error) {
			g.Taken, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (saga.Instance, error) { return scanInstance(row) })
			return err
		})
	}
	b.Queue(cancelled, req.Runner).Query(func(rows pgx.Rows) (err error) {
		g.Cancel, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	b.Queue(nextDue, names, versions).QueryRow(func(row pgx.Row) error {
		var next *float64
		err := row.Scan(&g.Now, &next)
		if next != nil {
			g.Next = max(0, time.Duration(*next*float64(time.Second)))
		}
		return err
	})
	if err := s.pool.SendBatch(ctx, &b).Close(); err != nil {
		return saga.Grant{}, wrap("lease", err)
	}
	if !held {
		return saga.Grant{}, wrap("lease", saga.ErrLeaseLost)
	}
	return g, nil
}

func (s *Store) leave(ctx context.Context, runner string) error {
	if _, err := s.pool.Exec(ctx, leave, runner); err != nil {
		return wrap("leave", err)
	}
	// A saga may have been started in the runner's name meanwhile: then the name
	// stays, and is dead when its lease ends.
	if _, err := s.pool.Exec(ctx, forget, runner); err != nil && code(err) != foreignKeyViolation {
		return wrap("leave", err)
	}
	return nil
}
