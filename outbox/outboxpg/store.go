package outboxpg

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/outbox"
)

// A Store is an [outbox.Store] on Postgres 15 or newer, for one relay. It uses
// at most four connections of the pool at a time.
type Store struct {
	pool *pgxpool.Pool
	gaps map[int]*gap // by lane; used by Fetch only
	turn int          // the lane that Fetch serves first
	hot  int          // lanes that had more than their part in the last Fetch
	last int          // records of the last Fetch
	opts Options
}

var _ outbox.Store = (*Store)(nil)

// Options tunes a [Store]. The zero value of each field means its default.
type Options struct {
	// RotateBytes is the size of a slot of the message table from which on
	// writers are sent to the next one. Default 64 MiB.
	RotateBytes int64
	// InlineBytes is the size from which on a payload is read by itself, so that
	// a batch of large ones does not have to fit in memory. Default 16 KiB.
	InlineBytes int
	// BatchBytes is the number of payload bytes from which on a batch is cut,
	// counting those of InlineBytes and more. Default 16 MiB.
	BatchBytes int
}

// New returns a store on pool, whose tables [Migrate] has made. Each relay needs
// a store of its own. The pool stays the caller's.
func New(pool *pgxpool.Pool, opts *Options) *Store {
	if pool == nil {
		panic("outboxpg: New needs a pool")
	}
	s := &Store{pool: pool, gaps: make(map[int]*gap), hot: outbox.Lanes}
	if opts != nil {
		s.opts = *opts
	}
	if s.opts.RotateBytes <= 0 {
		s.opts.RotateBytes = 64 << 20
	}
	if s.opts.InlineBytes <= 0 {
		s.opts.InlineBytes = 16 << 10
	}
	if s.opts.BatchBytes <= 0 {
		s.opts.BatchBytes = 16 << 20
	}
	return s
}

const (
	leaseHello = `INSERT INTO outbox_relay (relay, expires_at) VALUES ($1, now() + make_interval(secs => $2))
		ON CONFLICT (relay) DO UPDATE SET expires_at = excluded.expires_at`
	leaseBury    = `DELETE FROM outbox_relay WHERE expires_at < now()`
	leaseRelease = `UPDATE outbox_lane SET owner = NULL, expires_at = '-infinity' WHERE owner = $1 AND lane = ANY($2::smallint[])`
	leaseRenew   = `UPDATE outbox_lane SET expires_at = now() + make_interval(secs => $2) WHERE owner = $1`
	leaseTake    = `UPDATE outbox_lane SET owner = $1, epoch = epoch + 1, expires_at = now() + make_interval(secs => $2)
		WHERE lane IN (SELECT lane FROM outbox_lane
			WHERE (owner IS NULL OR expires_at < now()) AND lane <> ALL($4::smallint[])
			ORDER BY lane LIMIT greatest(0, $3::int - (SELECT count(*) FROM outbox_lane WHERE owner = $1))
			FOR UPDATE SKIP LOCKED)`
	leaseLeave = `UPDATE outbox_lane SET owner = NULL, expires_at = '-infinity' WHERE owner = $1`
)

var leaseRead = `SELECT l.lane, l.epoch, coalesce(pg_sequence_last_value(` + cursorArray + `[l.lane + 1]), 0),
		(SELECT jsonb_object_agg(key, seq) FROM (SELECT key, max(seq) AS seq FROM outbox_parked p WHERE p.lane = l.lane GROUP BY key) k)
	FROM outbox_lane l WHERE l.owner = $1 ORDER BY l.lane`

// Lease implements [outbox.Store]. Expiry is decided by the database's clock.
func (s *Store) Lease(ctx context.Context, req outbox.LeaseRequest) (outbox.Grant, error) {
	var grant outbox.Grant
	ttl := req.TTL.Seconds()
	release := make([]int16, len(req.Release))
	for i, n := range req.Release {
		release[i] = int16(n)
	}
	err := pgx.BeginTxFunc(ctx, s.pool, readCommitted, func(tx pgx.Tx) error {
		if req.TTL <= 0 {
			batch := &pgx.Batch{}
			batch.Queue(leaseLeave, req.Relay)
			batch.Queue(`DELETE FROM outbox_relay WHERE relay = $1`, req.Relay)
			return tx.SendBatch(ctx, batch).Close()
		}
		var live int
		batch := &pgx.Batch{}
		batch.Queue(leaseHello, req.Relay, ttl)
		batch.Queue(leaseBury)
		batch.Queue(leaseRelease, req.Relay, release)
		batch.Queue(leaseRenew, req.Relay, ttl)
		batch.Queue(`SELECT count(*) FROM outbox_relay`).QueryRow(func(row pgx.Row) error { return row.Scan(&live) })
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			return err
		}
		grant.Share = (outbox.Lanes + live - 1) / live
		if _, err := tx.Exec(ctx, leaseTake, req.Relay, ttl, grant.Share, release); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, leaseRead, req.Relay)
		if err != nil {
			return err
		}
		grant.Lanes, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (outbox.Lane, error) {
			var l outbox.Lane
			err := row.Scan(&l.Number, &l.Epoch, &l.Cursor, &l.Parked)
			return l, err
		})
		return err
	})
	if err != nil {
		return outbox.Grant{}, wrap("lease", err)
	}
	return grant, nil
}

// The statements of a transaction must see what ended before each of them,
// whatever the database's default is.
var readCommitted = pgx.TxOptions{IsoLevel: pgx.ReadCommitted}

func scanRecord(row pgx.CollectableRow, extra ...any) (outbox.Record, error) {
	var r outbox.Record
	var headers []byte
	err := row.Scan(append([]any{&r.Lane, &r.Seq, &r.ID, &r.Topic, &r.Key, &r.Payload, &headers, &r.CreatedAt}, extra...)...)
	if err == nil && headers != nil {
		err = json.Unmarshal(headers, &r.Headers)
	}
	return r, err
}

// Sample returns the outbox's state. It is cheap whatever the backlog, but for
// Delayed, Parked and Dead, which are counted.
func (s *Store) Sample(ctx context.Context) (outbox.Sample, error) {
	var sample outbox.Sample
	var age float64
	err := s.pool.QueryRow(ctx, sampleSQL).Scan(&sample.Pending, &age, &sample.Delayed, &sample.Parked, &sample.Dead)
	sample.OldestAge = time.Duration(age * float64(time.Second))
	return sample, wrap("sample", err)
}

var sampleSQL = fmt.Sprintf(`WITH lanes AS (
		SELECT n AS lane, coalesce(pg_sequence_last_value(%s[n + 1]), 0) AS cursor,
			coalesce(pg_sequence_last_value(%s[n + 1]), 0) AS last
		FROM generate_series(0, %d) n)
	SELECT sum(greatest(0, last - cursor))::bigint,
		coalesce(extract(epoch FROM clock_timestamp() - min((SELECT created_at FROM outbox_message m
			WHERE m.lane = lanes.lane AND m.seq > lanes.cursor ORDER BY m.seq LIMIT 1))), 0)::float8,
		(SELECT count(*) FROM outbox_delayed), (SELECT count(*) FROM outbox_parked), (SELECT count(*) FROM outbox_dead)
	FROM lanes`, cursorArray, seqArray, outbox.Lanes-1)
