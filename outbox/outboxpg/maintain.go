package outboxpg

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	slots = 3

	// One relay at a time: two would change the order of messages of one key.
	promoteLock = `SELECT pg_try_advisory_xact_lock('outbox_delayed'::regclass::oid::int8)`

	controlSQL = `SELECT slot,
			(SELECT coalesce(sum(pg_table_size(i.inhrelid)), 0) FROM pg_inherits i
				WHERE i.inhrelid = ('outbox_message_' || slot)::regclass)::bigint,
			ARRAY(SELECT s FROM generate_series(0, 2) s
				WHERE s <> slot AND pg_relation_size(('outbox_message_' || s)::regclass) > 0)
		FROM outbox_control`
)

var (
	promoteSQL = `WITH due AS (
			DELETE FROM outbox_delayed WHERE n IN (
				SELECT n FROM outbox_delayed WHERE due_at <= now() ORDER BY due_at, n LIMIT 1000)
			RETURNING *)
		INSERT INTO outbox_message (slot, lane, seq, id, topic, key, payload, headers)
		SELECT (SELECT slot FROM outbox_control), d.lane, ` + place("d.lane") + `, d.id, d.topic, d.key, d.payload, d.headers
		FROM (SELECT * FROM due ORDER BY due_at, n OFFSET 0) d`

	drainedSQL = `SELECT NOT EXISTS (SELECT FROM generate_series(0, 15) n
		WHERE EXISTS (SELECT FROM outbox_message_%d m WHERE m.lane = n
			AND m.seq > coalesce(pg_sequence_last_value(` + cursorArray + `[n + 1]), 0)))`
)

// Maintain implements [outbox.Store]: it moves delayed messages that are due
// into the log, sends writers to the next slot when theirs has grown large, and
// truncates slots of which every message is settled.
func (s *Store) Maintain(ctx context.Context) error {
	for {
		n, err := s.promote(ctx)
		if err != nil {
			return wrap("delayed messages", err)
		}
		if n < 1000 {
			break
		}
	}
	return wrap("rotate", s.rotate(ctx))
}

func (s *Store) promote(ctx context.Context) (n int64, err error) {
	var due bool
	err = s.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM outbox_delayed WHERE due_at <= now())`).Scan(&due)
	if err != nil || !due {
		return 0, err
	}
	err = pgx.BeginTxFunc(ctx, s.pool, readCommitted, func(tx pgx.Tx) error {
		var locked bool
		if err := tx.QueryRow(ctx, promoteLock).Scan(&locked); err != nil || !locked {
			return err
		}
		tag, err := tx.Exec(ctx, promoteSQL)
		n = tag.RowsAffected()
		return err
	})
	return n, err
}

// rotate is safe whatever slot a slow writer still uses: a slot is truncated
// only while nobody can write to it, and only if nothing in it is undelivered.
func (s *Store) rotate(ctx context.Context) error {
	var slot, size int64
	var used []int64
	if err := s.pool.QueryRow(ctx, controlSQL).Scan(&slot, &size, &used); err != nil {
		return err
	}
	for _, u := range used {
		if err := s.truncate(ctx, u); err != nil {
			return err
		}
	}
	next := (slot + 1) % slots
	if size < s.opts.RotateBytes {
		return nil
	}
	for _, u := range used {
		if u == next {
			return nil // not truncated when last looked at
		}
	}
	_, err := s.pool.Exec(ctx, `UPDATE outbox_control SET slot = $1 WHERE slot = $2`, next, slot)
	return err
}

// truncate empties a slot if every message in it is settled.
func (s *Store) truncate(ctx context.Context, slot int64) error {
	drained := fmt.Sprintf(drainedSQL, slot)
	// Without a lock first: most of the time the answer is no.
	var ok bool
	if err := s.pool.QueryRow(ctx, drained).Scan(&ok); err != nil || !ok {
		return err
	}
	err := pgx.BeginTxFunc(ctx, s.pool, readCommitted, func(tx pgx.Tx) error {
		// Give way to a backup or a report that reads the slot.
		if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '50ms'`); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, fmt.Sprintf(`LOCK TABLE outbox_message_%d IN ACCESS EXCLUSIVE MODE`, slot)); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, drained).Scan(&ok); err != nil || !ok {
			return err
		}
		_, err := tx.Exec(ctx, fmt.Sprintf(`TRUNCATE outbox_message_%d`, slot))
		return err
	})
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && (pgErr.Code == "55P03" || pgErr.Code == "40P01") { // lock_not_available, deadlock_detected
		return nil // next time
	}
	return err
}
