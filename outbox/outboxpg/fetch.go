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

type position struct {
	lane int
	seq  int64
}

// A page is what one statement read: records in the order of from, and the sizes
// of the payloads that were left out.
type page struct {
	recs  []outbox.Record
	large map[position]int
}

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

	pg, err := s.read(ctx, from, part, limit)
	if err != nil {
		return nil, wrap("fetch", err)
	}
	s.hot = 0
	for lane := range runs(pg.recs) {
		if len(lane) >= part {
			s.hot++
		}
	}
	if open := s.cut(from, &pg); len(open) > 0 {
		if pg, err = s.closeGaps(ctx, open, pg, part, limit); err != nil {
			return nil, wrap("fetch", err)
		}
	}
	if err := s.fill(ctx, &pg); err != nil {
		return nil, wrap("fetch", err)
	}
	if len(parked) > 0 {
		return append(parked, pg.recs...), nil
	}
	return pg.recs, nil
}

func (s *Store) read(ctx context.Context, from []outbox.Position, part, limit int) (page, error) {
	lanes, after := make([]int16, len(from)), make([]int64, len(from))
	for i, p := range from {
		lanes[i], after[i] = int16(p.Lane), p.After
	}
	rows, err := s.pool.Query(ctx, fetchSQL, lanes, after, part, limit, s.opts.InlineBytes)
	if err != nil {
		return page{}, err
	}
	var pg page
	var r outbox.Record
	var headers []byte
	var size int
	_, err = pgx.ForEachRow(rows, []any{&r.Lane, &r.Seq, &r.ID, &r.Topic, &r.Key, &r.Payload, &headers, &r.CreatedAt, &size}, func() error {
		if pg.recs == nil {
			pg.recs = make([]outbox.Record, 0, min(limit, 4*s.last))
		}
		if size >= s.opts.InlineBytes {
			if pg.large == nil {
				pg.large = make(map[position]int)
			}
			pg.large[position{r.Lane, r.Seq}] = size
		}
		r.Headers = nil
		if headers != nil {
			if err := json.Unmarshal(headers, &r.Headers); err != nil {
				return err
			}
		}
		pg.recs = append(pg.recs, r)
		r.Payload, headers = nil, nil
		return nil
	})
	s.last = max(16, len(pg.recs))
	return pg, err
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
// those lanes again, for what has become safe. pg holds what is safe already.
func (s *Store) closeGaps(ctx context.Context, open []outbox.Position, pg page, part, limit int) (page, error) {
	holders, err := s.writers(ctx, open)
	if err != nil {
		return page{}, err
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
		return page{}, err
	}
	s.cut(open, &again)
	for _, r := range pg.recs {
		if !slices.ContainsFunc(open, func(p outbox.Position) bool { return p.Lane == r.Lane }) {
			again.recs = append(again.recs, r)
		}
	}
	if again.large == nil {
		again.large = pg.large
	} else {
		maps.Copy(again.large, pg.large)
	}
	return again, nil
}

// cut removes the records after the first gap of each lane that may still be
// filled, and returns the positions of the lanes that have one.
func (s *Store) cut(from []outbox.Position, pg *page) (open []outbox.Position) {
	after := make(map[int]outbox.Position, len(from))
	for _, p := range from {
		after[p.Lane] = p
	}
	safe := pg.recs[:0]
	for lane := range runs(pg.recs) {
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
	pg.recs = safe
	return open
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
// cuts the page where they add up to BatchBytes.
func (s *Store) fill(ctx context.Context, pg *page) error {
	if len(pg.large) == 0 {
		return nil
	}
	total := 0
	for i := range pg.recs {
		r := &pg.recs[i]
		size := pg.large[position{r.Lane, r.Seq}]
		if size == 0 {
			continue
		}
		if total += size; total > s.opts.BatchBytes && i > 0 {
			pg.recs = pg.recs[:i]
			return nil
		}
		if err := s.pool.QueryRow(ctx, payloadSQL, r.Lane, r.Seq).Scan(&r.Payload); err != nil {
			return err
		}
	}
	return nil
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
