package sagapg

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	archiveSlots = 4
	archiveBatch = 1000

	archive = `
WITH moved AS (
	DELETE FROM saga_instance WHERE id IN (
		SELECT id FROM saga_instance WHERE ended_at < now() - make_interval(secs => $1)
		ORDER BY ended_at LIMIT $2 FOR UPDATE SKIP LOCKED)
	RETURNING *
)
INSERT INTO saga_archive (slot, id, name, version, status, cancel, signals, started_at, ended_at, cause, state, steps)
SELECT c.slot, m.id, m.name, m.version, m.status, m.cancel, m.signals, m.started_at, m.ended_at, m.cause, m.state, m.steps
FROM moved m, saga_control c`

	buryRunners = `
DELETE FROM saga_runner r WHERE dead AND expires_at < now() - interval '1 hour'
	AND NOT EXISTS (SELECT FROM saga_instance s WHERE s.owner = r.id)`
)

// Maintain implements [saga.Store]: it moves sagas that have ended to the
// archive, and removes what is too old from there by truncation, so that the
// archive never has dead tuples.
func (s *Store) Maintain(ctx context.Context) error {
	for {
		tag, err := s.pool.Exec(ctx, archive, s.opts.Keep.Seconds(), archiveBatch)
		if err != nil {
			return wrap("archive", err)
		}
		if tag.RowsAffected() < archiveBatch {
			break
		}
	}
	if _, err := s.pool.Exec(ctx, buryRunners); err != nil && code(err) != foreignKeyViolation {
		return wrap("maintain", err)
	}
	// A slot holds what ended within a third of Archive, and is emptied when three
	// others have been filled after it.
	third := (s.opts.Archive / (archiveSlots - 1)).Seconds()
	var due bool
	err := s.pool.QueryRow(ctx, `SELECT rotated_at < now() - make_interval(secs => $1) FROM saga_control`, third).Scan(&due)
	if err != nil || !due {
		return wrap("maintain", err)
	}
	return wrap("rotate", pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return rotate(ctx, tx, third) }))
}

func rotate(ctx context.Context, tx pgx.Tx, third float64) error {
	if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '200ms'`); err != nil {
		return err
	}
	var next int
	err := tx.QueryRow(ctx, `UPDATE saga_control SET slot = (slot + 1) % $2, rotated_at = now()
		WHERE rotated_at < now() - make_interval(secs => $1) RETURNING slot`, third, archiveSlots).Scan(&next)
	if err == pgx.ErrNoRows { //nolint:errorlint // another runner was first
		return nil
	}
	if err == nil {
		_, err = tx.Exec(ctx, fmt.Sprintf(`TRUNCATE saga_archive_%d`, next))
	}
	if code(err) == "55P03" { // lock_not_available: somebody reads it; the next call tries again
		return err
	}
	return err
}

// PurgeBarriers removes what [Barrier] has noted before the given age, at most
// limit rows, and returns how many it has removed. Keep them for longer than any
// call of a saga may be on its way.
func (s *Store) PurgeBarriers(ctx context.Context, age time.Duration, limit int) (int, error) {
	tag, err := s.pool.Exec(ctx, `DELETE FROM saga_barrier WHERE ctid = ANY (ARRAY(
		SELECT ctid FROM saga_barrier WHERE at < now() - make_interval(secs => $1) LIMIT $2))`, age.Seconds(), limit)
	return int(tag.RowsAffected()), wrap("purge", err)
}
