package outboxpg

import (
	"context"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/outbox"
)

// A gap is a run of positions of a lane that were handed out and are not
// visible: their transactions are open, or were rolled back. Which of the two
// is told by the locks that place takes: a transaction holds one from before it
// takes a position until after it has become visible or been rolled back.
//
// So the transactions that hold the lane's lock at a moment when position upTo
// has been handed out are all that may still fill a gap before it. Once none of
// them holds it any more, what a new snapshot shows up to upTo is all there will
// ever be. Transactions that never appended hold no such lock and do not matter.
type gap struct {
	upTo    int64
	writers map[string]bool // virtual transaction ids; nil until they were looked up
}

const (
	fetchSQL = `SELECT m.* FROM unnest($1::smallint[], $2::bigint[]) AS p(lane, after)
		CROSS JOIN LATERAL (
			SELECT lane, seq, id, topic, key,
				CASE WHEN octet_length(payload) < $5::int THEN payload END, headers, created_at,
				octet_length(payload) AS size
			FROM outbox_message WHERE lane = p.lane AND seq > p.after ORDER BY seq LIMIT $3) m
		LIMIT $4`

	writersSQL = `SELECT objid::int4, virtualtransaction FROM pg_locks
		WHERE locktype = 'advisory' AND objsubid = 2 AND classid = 'outbox_control'::regclass AND objid = ANY($1::oid[])
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`

	payloadSQL = `SELECT payload FROM outbox_message WHERE lane = $1 AND seq = $2`

	parkedSQL = `WITH head AS (
			SELECT DISTINCT ON (lane, key, CASE WHEN key = '' THEN seq END) lane, key, seq, attempts, next_at
			FROM outbox_parked WHERE lane = ANY($1::smallint[])
			ORDER BY lane, key, CASE WHEN key = '' THEN seq END, seq)
		SELECT p.lane, p.seq, p.id, p.topic, p.key, p.payload, p.headers, p.created_at, p.attempts
		FROM head h JOIN outbox_parked p ON p.lane = h.lane AND p.key = h.key
			AND (p.seq = h.seq OR h.attempts = 0 AND h.key <> '' AND p.seq > h.seq)
		WHERE h.next_at <= now() ORDER BY p.lane, p.seq LIMIT $2`

	maxParked = 64
)

type sized struct {
	outbox.Record
	size int
}

// Fetch implements [outbox.Store].
func (s *Store) Fetch(ctx context.Context, from []outbox.Position, limit int) ([]outbox.Record, error) {
	var recs []outbox.Record
	if slices.ContainsFunc(from, func(p outbox.Position) bool { return p.Retry }) {
		parked, err := s.parked(ctx, from, min(limit, maxParked))
		if err != nil {
			return nil, wrap("fetch", err)
		}
		recs, limit = parked, limit-len(parked)
	}
	if limit <= 0 {
		return recs, nil
	}
	// A different lane comes first each time, and the limit is divided among
	// the lanes that had more to give than their part last time.
	s.turn++
	start := s.turn % len(from)
	from = slices.Concat(from[start:], from[:start])
	part := max(1, limit/max(1, s.hot))

	fresh, err := s.read(ctx, from, part, limit)
	if err != nil {
		return nil, wrap("fetch", err)
	}
	count := make(map[int]int)
	for _, r := range fresh {
		count[r.Lane]++
	}
	s.hot = 0
	for _, n := range count {
		if n >= part {
			s.hot++
		}
	}
	fresh, err = s.closeGaps(ctx, from, fresh, part, limit)
	if err == nil {
		fresh, err = s.fill(ctx, fresh)
	}
	if err != nil {
		return nil, wrap("fetch", err)
	}
	recs = slices.Grow(recs, len(fresh))
	for _, r := range fresh {
		recs = append(recs, r.Record)
	}
	return recs, nil
}

func (s *Store) read(ctx context.Context, from []outbox.Position, part, limit int) ([]sized, error) {
	lanes, after := split(from)
	rows, err := s.pool.Query(ctx, fetchSQL, lanes, after, part, limit, s.opts.InlineBytes)
	if err != nil {
		return nil, err
	}
	return collect(rows)
}

func collect(rows pgx.Rows) ([]sized, error) {
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (sized, error) {
		var size int
		r, err := scanRecord(row, &size)
		return sized{r, size}, err
	})
}

func split(from []outbox.Position) (lanes []int16, after []int64) {
	for _, p := range from {
		lanes, after = append(lanes, int16(p.Lane)), append(after, p.After)
	}
	return lanes, after
}

// closeGaps returns the records that may be delivered: all before the first gap
// of their lane that may still be filled.
func (s *Store) closeGaps(ctx context.Context, from []outbox.Position, recs []sized, part, limit int) ([]sized, error) {
	safe, open := s.cut(from, recs)
	if len(open) == 0 {
		return safe, nil
	}
	holders, err := s.writers(ctx, open)
	if err != nil {
		return nil, err
	}
	for _, p := range open {
		g := s.gaps[p.Lane]
		if g.writers == nil {
			g.writers = holders[p.Lane]
		} else {
			maps.DeleteFunc(g.writers, func(w string, _ bool) bool { return !holders[p.Lane][w] })
		}
	}
	// A statement of its own, and so a snapshot taken after the look-up.
	again, err := s.read(ctx, open, part, limit)
	if err != nil {
		return nil, err
	}
	more, _ := s.cut(open, again)
	kept := safe[:0]
	for _, r := range safe {
		if !slices.ContainsFunc(open, func(p outbox.Position) bool { return p.Lane == r.Lane }) {
			kept = append(kept, r)
		}
	}
	return append(kept, more...), nil
}

// cut returns the records before the first gap of each lane that may still be
// filled, and the positions of the lanes that have one.
func (s *Store) cut(from []outbox.Position, recs []sized) (safe []sized, open []outbox.Position) {
	byLane := make(map[int][]sized)
	for _, r := range recs {
		byLane[r.Lane] = append(byLane[r.Lane], r)
	}
	for _, p := range from {
		lane := byLane[p.Lane]
		if len(lane) == 0 {
			continue
		}
		g, next := s.gaps[p.Lane], p.After+1
		closed := int64(0) // gaps up to here will not be filled
		if g != nil && g.writers != nil && len(g.writers) == 0 {
			closed = g.upTo
		}
		n := 0
		for ; n < len(lane); n++ {
			if lane[n].Seq != next && lane[n].Seq > closed+1 {
				break
			}
			next = lane[n].Seq + 1
		}
		safe = append(safe, lane[:n]...)
		switch {
		case n == len(lane):
			if g != nil && next > g.upTo {
				delete(s.gaps, p.Lane)
			}
		default:
			if g == nil || next > g.upTo || closed > 0 {
				s.gaps[p.Lane] = &gap{upTo: lane[len(lane)-1].Seq}
			}
			open = append(open, p)
		}
	}
	return safe, open
}

// writers returns the transactions that have appended to each lane and have not
// ended.
func (s *Store) writers(ctx context.Context, lanes []outbox.Position) (map[int]map[string]bool, error) {
	holders := make(map[int]map[string]bool, len(lanes))
	numbers := make([]uint32, len(lanes))
	for i, p := range lanes {
		holders[p.Lane] = make(map[string]bool)
		numbers[i] = uint32(p.Lane)
	}
	rows, err := s.pool.Query(ctx, writersSQL, numbers)
	if err != nil {
		return nil, err
	}
	var lane int
	var vxid string
	_, err = pgx.ForEachRow(rows, []any{&lane, &vxid}, func() error {
		holders[lane][vxid] = true
		return nil
	})
	return holders, err
}

// fill reads the payloads that were too large to be read with the rest, and
// cuts the batch where they add up to BatchBytes.
func (s *Store) fill(ctx context.Context, recs []sized) ([]sized, error) {
	total := 0
	for i := range recs {
		r := &recs[i]
		if r.size < s.opts.InlineBytes {
			continue
		}
		if total += r.size; total > s.opts.BatchBytes && i > 0 {
			return recs[:i], nil
		}
		if err := s.pool.QueryRow(ctx, payloadSQL, r.Lane, r.Seq).Scan(&r.Payload); err != nil {
			return nil, err
		}
	}
	return recs, nil
}

// parked returns the first parked record of each key that is due, and those
// behind it if it has not failed itself.
func (s *Store) parked(ctx context.Context, from []outbox.Position, limit int) ([]outbox.Record, error) {
	var lanes []int16
	for _, p := range from {
		if p.Retry {
			lanes = append(lanes, int16(p.Lane))
		}
	}
	rows, err := s.pool.Query(ctx, parkedSQL, lanes, limit)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (outbox.Record, error) {
		attempts := 0
		r, err := scanRecord(row, &attempts)
		r.Attempts, r.Parked = attempts, true
		return r, err
	})
}
