package outboxpg

import (
	"context"
	"encoding/json"
	"iter"
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
				CASE WHEN octet_length(payload) < $5::int THEN payload END, headers, created_at
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

// Fetch implements [outbox.Store].
func (s *Store) Fetch(ctx context.Context, from []outbox.Position, limit int) ([]outbox.Record, error) {
	var parked []outbox.Record
	if slices.ContainsFunc(from, func(p outbox.Position) bool { return p.Retry }) {
		var err error
		if parked, err = s.parked(ctx, from, min(limit, maxParked)); err != nil {
			return nil, wrap("fetch", err)
		}
		limit -= len(parked)
	}
	if limit <= 0 {
		return parked, nil
	}
	// A different lane comes first each time, and the limit is divided among
	// the lanes that had more to give than their part last time.
	s.turn++
	start := s.turn % len(from)
	from = slices.Concat(from[start:], from[:start])
	part := max(1, limit/max(1, s.hot))

	recs, err := s.read(ctx, from, part, limit)
	if err != nil {
		return nil, wrap("fetch", err)
	}
	s.hot = 0
	for lane := range runs(recs) {
		if len(lane) >= part {
			s.hot++
		}
	}
	recs, open := s.cut(from, recs)
	if len(open) > 0 {
		if recs, err = s.closeGaps(ctx, open, recs, part, limit); err != nil {
			return nil, wrap("fetch", err)
		}
	}
	if recs, err = s.fill(ctx, recs); err != nil {
		return nil, wrap("fetch", err)
	}
	if len(parked) > 0 {
		return append(parked, recs...), nil
	}
	return recs, nil
}

// read returns records in the order of from, gaps or not, and without the
// payloads of InlineBytes and more.
func (s *Store) read(ctx context.Context, from []outbox.Position, part, limit int) ([]outbox.Record, error) {
	lanes, after := make([]int16, len(from)), make([]int64, len(from))
	for i, p := range from {
		lanes[i], after[i] = int16(p.Lane), p.After
	}
	rows, err := s.pool.Query(ctx, fetchSQL, lanes, after, part, limit, s.opts.InlineBytes)
	if err != nil {
		return nil, err
	}
	var recs []outbox.Record
	var r outbox.Record
	var headers []byte
	_, err = pgx.ForEachRow(rows, []any{&r.Lane, &r.Seq, &r.ID, &r.Topic, &r.Key, &r.Payload, &headers, &r.CreatedAt}, func() error {
		if recs == nil {
			recs = make([]outbox.Record, 0, min(limit, s.last+s.last/4))
		}
		r.Headers = nil
		if headers != nil {
			if err := json.Unmarshal(headers, &r.Headers); err != nil {
				return err
			}
		}
		recs = append(recs, r)
		r.Payload, headers = nil, nil
		return nil
	})
	s.last = max(16, len(recs))
	return recs, err
}

// runs yields the records of each lane in turn.
func runs(recs []outbox.Record) iter.Seq[[]outbox.Record] {
	return func(yield func([]outbox.Record) bool) {
		for len(recs) > 0 {
			n := 1
			for n < len(recs) && recs[n].Lane == recs[0].Lane {
				n++
			}
			if !yield(recs[:n]) {
				return
			}
			recs = recs[n:]
		}
	}
}

// closeGaps looks up who may still fill the gaps of the open lanes and reads
// those lanes again, for what has become safe beside what is so already.
func (s *Store) closeGaps(ctx context.Context, open []outbox.Position, safe []outbox.Record, part, limit int) ([]outbox.Record, error) {
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
	again, _ = s.cut(open, again)
	for _, r := range safe {
		if !slices.ContainsFunc(open, func(p outbox.Position) bool { return p.Lane == r.Lane }) {
			again = append(again, r)
		}
	}
	return again, nil
}

// cut returns the records before the first gap of each lane that may still be
// filled, and the positions of the lanes that have one. It reuses recs.
func (s *Store) cut(from []outbox.Position, recs []outbox.Record) (safe []outbox.Record, open []outbox.Position) {
	after := make(map[int]outbox.Position, len(from))
	for _, p := range from {
		after[p.Lane] = p
	}
	safe = recs[:0]
	for lane := range runs(recs) {
		p := after[lane[0].Lane]
		g, next := s.gaps[p.Lane], p.After+1
		closed := int64(0) // gaps up to here will not be filled
		if g != nil && g.writers != nil && len(g.writers) == 0 {
			closed = g.upTo
		}
		n := 0
		for ; n < len(lane) && (lane[n].Seq == next || lane[n].Seq <= closed+1); n++ {
			next = lane[n].Seq + 1
		}
		if n < len(lane) {
			if g == nil || next > g.upTo || closed > 0 {
				s.gaps[p.Lane] = &gap{upTo: lane[len(lane)-1].Seq}
			}
			open = append(open, p)
		} else if g != nil && next > g.upTo {
			delete(s.gaps, p.Lane)
		}
		safe = append(safe, lane[:n]...)
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
// cuts the batch where they have come to BatchBytes.
func (s *Store) fill(ctx context.Context, recs []outbox.Record) ([]outbox.Record, error) {
	total := 0
	for i := range recs {
		r := &recs[i]
		if r.Payload != nil {
			continue
		}
		if total >= s.opts.BatchBytes {
			return recs[:i], nil
		}
		if err := s.pool.QueryRow(ctx, payloadSQL, r.Lane, r.Seq).Scan(&r.Payload); err != nil {
			return nil, err
		}
		total += len(r.Payload)
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
