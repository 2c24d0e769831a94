package outboxpg

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/outbox"
)

// The fence: a lane's row is locked against a change of owner and its epoch
// compared, in the statement or transaction that stores the outcome.
const (
	fenceFrom = `FROM unnest($1::smallint[], $2::bigint[], $3::bigint[]) AS a(lane, epoch, cursor)
		JOIN outbox_lane l ON l.lane = a.lane AND l.epoch = a.epoch
		ORDER BY l.lane FOR SHARE OF l`

	fenceSQL = `SELECT l.lane ` + fenceFrom

	parkSQL = `INSERT INTO outbox_parked (lane, seq, attempts, next_at, error, id, topic, key, payload, headers, created_at)
		VALUES ($1, $2, $3, now() + make_interval(secs => $4), $5, $6, $7, $8, $9, $10, $11)
		ON CONFLICT (lane, seq) DO UPDATE SET attempts = excluded.attempts, next_at = excluded.next_at, error = excluded.error
			WHERE excluded.attempts > outbox_parked.attempts`

	buriedSQL = `INSERT INTO outbox_dead (lane, seq, attempts, error, id, topic, key, payload, headers, created_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (lane, seq) DO NOTHING`

	unparkSQL = `DELETE FROM outbox_parked WHERE lane = $1 AND seq = ANY($2::bigint[])`
)

var advanceSQL = `WITH held AS MATERIALIZED (SELECT l.lane, a.cursor ` + fenceFrom + `)
	SELECT lane, setval(` + cursorArray + `[lane + 1], cursor) FROM held`

// Settle implements [outbox.Store].
func (s *Store) Settle(ctx context.Context, st outbox.Settlement) (lost []int, err error) {
	lanes, epochs, cursors := make([]int16, len(st.Advance)), make([]int64, len(st.Advance)), make([]int64, len(st.Advance))
	for i, a := range st.Advance {
		lanes[i], epochs[i], cursors[i] = int16(a.Number), a.Epoch, a.Cursor
	}
	// A cursor is not undone by a rollback, so it may only move after what was
	// set aside is committed. A crash in between repeats records, at worst.
	if len(st.Park)+len(st.Dead)+len(st.Delivered) > 0 {
		err := pgx.BeginTxFunc(ctx, s.pool, readCommitted, func(tx pgx.Tx) error {
			return setAside(ctx, tx, st, lanes, epochs, cursors)
		})
		if err != nil {
			return nil, wrap("settle", err)
		}
	}
	held := make([]int16, 0, len(lanes))
	rows, err := s.pool.Query(ctx, advanceSQL, lanes, epochs, cursors)
	if err == nil {
		held, err = pgx.AppendRows(held, rows, func(row pgx.CollectableRow) (lane int16, err error) {
			return lane, row.Scan(&lane, nil)
		})
	}
	if err != nil {
		return nil, wrap("settle", err)
	}
	for _, n := range lanes {
		if !slices.Contains(held, n) {
			lost = append(lost, int(n))
		}
	}
	return lost, nil
}

// setAside stores the outcomes other than plain delivery, for the lanes whose
// fence holds.
func setAside(ctx context.Context, tx pgx.Tx, st outbox.Settlement, lanes []int16, epochs, cursors []int64) error {
	rows, err := tx.Query(ctx, fenceSQL, lanes, epochs, cursors)
	if err != nil {
		return err
	}
	held, err := pgx.CollectRows(rows, pgx.RowTo[int])
	if err != nil {
		return err
	}
	done := make(map[int][]int64) // by lane: the positions that are no longer parked
	for _, r := range st.Delivered {
		done[r.Lane] = append(done[r.Lane], r.Seq)
	}
	batch := &pgx.Batch{}
	for _, f := range st.Park {
		if slices.Contains(held, f.Lane) {
			batch.Queue(parkSQL, f.Lane, f.Seq, f.Attempts, f.RetryIn.Seconds(), f.Err,
				f.ID, f.Topic, f.Key, nonNil(f.Payload), headers(f.Headers), f.CreatedAt)
		}
	}
	for _, f := range st.Dead {
		done[f.Lane] = append(done[f.Lane], f.Seq)
		if slices.Contains(held, f.Lane) {
			batch.Queue(buriedSQL, f.Lane, f.Seq, f.Attempts, f.Err,
				f.ID, f.Topic, f.Key, nonNil(f.Payload), headers(f.Headers), f.CreatedAt)
		}
	}
	for lane, seqs := range done {
		if slices.Contains(held, lane) {
			batch.Queue(unparkSQL, lane, seqs)
		}
	}
	return tx.SendBatch(ctx, batch).Close()
}

func headers(h map[string]string) *string {
	if len(h) == 0 {
		return nil
	}
	b, _ := json.Marshal(h) // strings always marshal
	s := string(b)
	return &s
}
