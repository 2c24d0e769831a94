package outboxpg

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/outbox"
)

var replaySQL = `WITH back AS (DELETE FROM outbox_dead WHERE id = ANY($1::text[]) RETURNING *)
	INSERT INTO outbox_message (slot, lane, seq, id, topic, key, payload, headers)
	SELECT (SELECT slot FROM outbox_control), d.lane, ` + place("d.lane") + `, d.id, d.topic, d.key, d.payload, d.headers
	FROM (SELECT * FROM back ORDER BY lane, seq OFFSET 0) d`

// DeadLetters returns at most limit dead letters, the oldest first.
func (s *Store) DeadLetters(ctx context.Context, limit int) ([]outbox.DeadLetter, error) {
	rows, err := s.pool.Query(ctx, `SELECT lane, seq, id, topic, key, payload, headers, created_at, attempts, error, failed_at
		FROM outbox_dead ORDER BY failed_at, lane, seq LIMIT $1`, limit)
	if err != nil {
		return nil, wrap("dead letters", err)
	}
	dead, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (outbox.DeadLetter, error) {
		var d outbox.DeadLetter
		r, err := scanRecord(row, &d.Attempts, &d.Err, &d.FailedAt)
		r.Attempts = d.Attempts
		d.Record = r
		return d, err
	})
	return dead, wrap("dead letters", err)
}

// Replay appends the dead letters with the given message IDs anew, with no
// attempts charged and behind what their keys have pending, and returns how many
// there were. A crash does it all or not at all.
func (s *Store) Replay(ctx context.Context, ids ...string) (int, error) {
	tag, err := s.pool.Exec(ctx, replaySQL, ids)
	return int(tag.RowsAffected()), wrap("replay", err)
}

// Discard deletes the dead letters with the given message IDs and returns how
// many there were.
func (s *Store) Discard(ctx context.Context, ids ...string) (int, error) {
	tag, err := s.pool.Exec(ctx, `DELETE FROM outbox_dead WHERE id = ANY($1::text[])`, ids)
	if err != nil {
		return 0, fmt.Errorf("outboxpg: discard: %w", err)
	}
	return int(tag.RowsAffected()), nil
}
