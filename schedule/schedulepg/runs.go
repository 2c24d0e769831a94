package schedulepg

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/ashlar-go/ashlar/schedule"
)

const (
	// A run whose row is locked is being finished; to wait for that would hold up
	// the leases of all others.
	extendSQL = `
WITH asked AS (
	SELECT * FROM unnest($1::uuid[], $2::int[]) AS q(id, attempt)
), mine AS (
	SELECT r.id FROM schedule_run r JOIN asked q ON r.id = q.id AND r.attempt = q.attempt
	WHERE r.state = 'running' FOR UPDATE OF r SKIP LOCKED
), extended AS (
	UPDATE schedule_run r SET lease_until = now() + $3::interval FROM mine WHERE r.id = mine.id
)
SELECT q.id, q.attempt, EXISTS (SELECT FROM mine WHERE mine.id = q.id),
	EXISTS (SELECT FROM schedule_run r WHERE r.id = q.id AND r.attempt = q.attempt AND r.state = 'running')
FROM asked q`

	finishSQL = `
UPDATE schedule_run SET state = $3, error = CASE WHEN $4 = '' THEN error ELSE $4 END, lease_until = NULL,
	due_at = CASE WHEN $3 = 'waiting' THEN now() + $5::interval ELSE due_at END,
	failures = failures + ($3 = 'waiting' AND $4 <> '')::int,
	finished_at = CASE WHEN $3 <> 'waiting' THEN now() END
WHERE id = $1::uuid AND attempt = $2 AND state = 'running'
RETURNING EXISTS (SELECT FROM schedule_run w WHERE w.schedule = schedule_run.schedule AND w.state IN ('waiting', 'running')
	AND w.state = 'waiting' AND w.due_at <= now())`

	// The last run of a schedule stays, so that it is known how it did. A run
	// that waits or is executed without a definition has nobody to end it.
	pruneSQL = `
DELETE FROM schedule_run WHERE id = ANY (ARRAY(
	SELECT r.id FROM schedule_run r
	WHERE r.finished_at <= now() - $1::interval
		AND (EXISTS (SELECT FROM schedule_run o WHERE o.schedule = r.schedule AND (o.tick, o.id) > (r.tick, r.id))
			OR NOT EXISTS (SELECT FROM schedule_definition d WHERE d.name = r.schedule))
	ORDER BY r.finished_at LIMIT $2 FOR UPDATE SKIP LOCKED)
	|| ARRAY(
	SELECT r.id FROM schedule_run r
	WHERE r.state IN ('waiting', 'running') AND coalesce(r.lease_until, r.due_at) <= now() - $1::interval
		AND NOT EXISTS (SELECT FROM schedule_definition d WHERE d.name = r.schedule)
	LIMIT $2 FOR UPDATE SKIP LOCKED))`
)

// Extend implements [schedule.Store].
func (s *Store) Extend(ctx context.Context, runs []schedule.Ref, lease time.Duration) (kept, lost []schedule.Ref, err error) {
	ids, attempts := make([]string, len(runs)), make([]int32, len(runs))
	for i, r := range runs {
		ids[i], attempts[i] = r.ID, int32(r.Attempt)
	}
	rows, err := s.pool.Query(ctx, extendSQL, ids, attempts, lease)
	if err != nil {
		return nil, nil, wrap("extend", err)
	}
	var ref schedule.Ref
	var extended, held bool
	_, err = pgx.ForEachRow(rows, []any{&ref.ID, &ref.Attempt, &extended, &held}, func() error {
		switch {
		case extended:
			kept = append(kept, ref)
		case !held:
			lost = append(lost, ref)
		}
		return nil
	})
	return kept, lost, wrap("extend", err)
}

// Finish implements [schedule.Store].
func (s *Store) Finish(ctx context.Context, run schedule.Ref, o schedule.Outcome) (more bool, err error) {
	more, err = finish(ctx, s.pool, run, o)
	return more, wrap("finish", err)
}

type querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func finish(ctx context.Context, db querier, run schedule.Ref, o schedule.Outcome) (more bool, err error) {
	err = db.QueryRow(ctx, finishSQL, run.ID, run.Attempt, string(o.State), o.Err, o.RetryIn).Scan(&more)
	if !errors.Is(err, pgx.ErrNoRows) {
		return more, err
	}
	var recorded bool // by the same call, whose reply was lost
	err = db.QueryRow(ctx, `SELECT EXISTS (SELECT FROM schedule_run WHERE id = $1::uuid AND attempt = $2 AND state = $3)`,
		run.ID, run.Attempt, string(o.State)).Scan(&recorded)
	if err == nil && !recorded {
		err = schedule.ErrLeaseLost
	}
	return true, err
}

// Prune implements [schedule.Store]. Calls at the same time share the work.
func (s *Store) Prune(ctx context.Context, keep time.Duration, limit int) (int, error) {
	tag, err := s.pool.Exec(ctx, pruneSQL, keep, limit)
	return int(tag.RowsAffected()), wrap("prune", err)
}
