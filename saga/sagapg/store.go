// Package sagapg keeps sagas in Postgres.
//
// [Store] is a saga.Store: a saga is one row, a step is one UPDATE of it that
// touches no index, and those of many sagas are one commit. [Tx] makes a step one
// transaction with its checkpoint, [Start] starts a saga in the caller's
// transaction, [Barrier] protects those who take part.
//
// [Migrate] makes the tables, whose names are resolved by search_path. Postgres
// 15 or newer; PgBouncer in transaction mode will do.
package sagapg

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/saga"
)

// A Store is a [saga.Store] in Postgres. The clock that decides is the
// database's. It is safe for concurrent use and uses a few connections at a time.
type Store struct {
	pool *pgxpool.Pool
	opts Options
}

var _ saga.Store = (*Store)(nil)

// Options tunes a [Store]. The zero value of each field means its default.
type Options struct {
	// Keep is how long a saga that has ended stays with those that have not,
	// before it is moved to the archive. Default 1 min.
	Keep time.Duration
	// Archive is how long an ended saga, with its history, can be looked up and
	// its ID is not given to another. It is removed after that, and at the latest
	// a third later. Default 30 days.
	Archive time.Duration
}

// New returns a store on pool, whose tables [Migrate] has made. The pool stays
// the caller's. opts may be nil.
func New(pool *pgxpool.Pool, opts *Options) *Store {
	if pool == nil {
		panic("sagapg: New needs a pool")
	}
	s := &Store{pool: pool}
	if opts != nil {
		s.opts = *opts
	}
	if s.opts.Keep <= 0 {
		s.opts.Keep = time.Minute
	}
	if s.opts.Archive <= 0 {
		s.opts.Archive = 30 * 24 * time.Hour
	}
	return s
}

const (
	// Whatever the statistics say, a plan made while the table was small must not
	// read all of it later: plans are kept as long as connections are.
	useIndexes = `SELECT set_config('enable_seqscan', 'off', true)`

	insertInstances = `
INSERT INTO saga_instance (id, name, version, status, state, steps, owner, wake_at)
SELECT u.id, u.name, u.version, 'running', u.state, u.steps, u.owner, now()
FROM unnest($1::text[], $2::text[], $3::int[], $4::bytea[], $5::json[], $6::uuid[]) AS u (id, name, version, state, steps, owner)
ON CONFLICT (id) DO NOTHING
RETURNING id`

	// An ended saga may have been moved since the INSERT looked. The same
	// transaction takes a second start of it back.
	deleteArchived = `
DELETE FROM saga_instance s USING saga_archive a
WHERE s.id = ANY ($1) AND a.id = s.id
RETURNING s.id`

	// For a single one there is a shorter way.
	insertInstance = `
INSERT INTO saga_instance (id, name, version, status, state, steps, owner, wake_at)
VALUES ($1, $2, $3, 'running', $4, $5, $6, now())
ON CONFLICT (id) DO NOTHING
RETURNING id`

	deleteIfArchived = `
DELETE FROM saga_instance WHERE id = $1 AND EXISTS (SELECT FROM saga_archive WHERE id = $1)
RETURNING id`

	selectNames = `
SELECT id, name FROM saga_instance WHERE id = ANY ($1)
UNION ALL SELECT id, name FROM saga_archive WHERE id = ANY ($1)`
)

// Create implements [saga.Store].
func (s *Store) Create(ctx context.Context, sagas []saga.Instance) ([]string, error) {
	existing, err := create(ctx, s.pool, sagas)
	if code(err) == foreignKeyViolation { // a runner's name is used up: whoever finds them may have them
		sagas = append([]saga.Instance(nil), sagas...)
		for i := range sagas {
			sagas[i].Owner = ""
		}
		existing, err = create(ctx, s.pool, sagas)
	}
	return existing, wrap("create", err)
}

// A batcher is a pool, a connection or a transaction.
type batcher interface {
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
}

func create(ctx context.Context, db batcher, sagas []saga.Instance) ([]string, error) {
	n := len(sagas)
	ids, names, versions := make([]string, n), make([]string, n), make([]int, n)
	states, steps, owners := make([][]byte, n), make([]string, n), make([]*string, n)
	for i, in := range sagas {
		ids[i], names[i], versions[i], states[i], steps[i] = in.ID, in.Saga, in.Version, in.State, string(encodeSteps(in.Steps))
		if in.Owner != "" {
			owners[i] = &sagas[i].Owner
		}
		if states[i] == nil {
			states[i] = []byte{}
		}
	}
	created := make(map[string]bool, n)
	collect := func(is bool) func(pgx.Rows) error {
		return func(rows pgx.Rows) error {
			var id string
			_, err := pgx.ForEachRow(rows, []any{&id}, func() error { created[id] = is; return nil })
			return err
		}
	}
	var b pgx.Batch
	if n == 1 {
		b.Queue(insertInstance, ids[0], names[0], versions[0], states[0], steps[0], owners[0]).Query(collect(true))
		b.Queue(deleteIfArchived, ids[0]).Query(collect(false))
	} else {
		b.Queue(insertInstances, ids, names, versions, states, steps, owners).Query(collect(true))
		b.Queue(deleteArchived, ids).Query(collect(false))
	}
	if err := db.SendBatch(ctx, &b).Close(); err != nil {
		return nil, err
	}
	existing := make([]string, n)
	var others []string
	for i, id := range ids {
		if created[id] {
			created[id] = false // a second one of this ID in the same call is not new
			continue
		}
		others = append(others, id)
		existing[i] = "?"
	}
	if len(others) == 0 {
		return existing, nil
	}
	found := make(map[string]string)
	var id, name string
	var look pgx.Batch
	look.Queue(selectNames, others).Query(func(rows pgx.Rows) error {
		_, err := pgx.ForEachRow(rows, []any{&id, &name}, func() error { found[id] = name; return nil })
		return err
	})
	if err := db.SendBatch(ctx, &look).Close(); err != nil {
		return nil, err
	}
	for i := range existing {
		if existing[i] != "" {
			if existing[i] = found[ids[i]]; existing[i] == "" {
				return nil, fmt.Errorf("%s has ended and is being moved", ids[i])
			}
		}
	}
	return existing, nil
}

const saveCheckpoints = `
UPDATE saga_instance s SET version = u.version, status = u.status, state = u.state, steps = u.steps,
	cause = u.cause, reason = u.reason, deaths = 0,
	owner = CASE WHEN u.release THEN NULL ELSE s.owner END,
	wake_at = CASE
		WHEN NOT u.release THEN s.wake_at
		WHEN u.status IN ('running', 'compensating') AND s.signals ?| string_to_array(u.await, E'\n')
			OR u.status = 'running' AND s.cancel IS DISTINCT FROM u.cancel THEN now()
		ELSE u.wake_at END,
	ended_at = CASE WHEN u.status IN ('done', 'compensated') THEN clock_timestamp() END
FROM unnest($2::text[], $3::int[], $4::text[], $5::bytea[], $6::json[], $7::text[], $8::text[], $9::bool[], $10::timestamptz[], $11::text[], $12::text[])
	AS u (id, version, status, state, steps, cause, reason, release, wake_at, await, cancel)
WHERE s.id = u.id AND s.owner = $1
RETURNING s.id, s.cancel, s.signals`

// saveArgs returns the arguments of saveCheckpoints.
func saveArgs(runner string, cs []saga.Checkpoint) []any {
	n := len(cs)
	ids, versions, statuses := make([]string, n), make([]int, n), make([]string, n)
	states, steps, causes := make([][]byte, n), make([]string, n), make([]string, n)
	reasons, releases, wakes := make([]string, n), make([]bool, n), make([]*time.Time, n)
	awaits, cancels := make([]string, n), make([]*string, n)
	for i := range cs {
		c := &cs[i]
		ids[i], versions[i], statuses[i], states[i], steps[i] = c.ID, c.Version, string(c.Status), c.State, string(encodeSteps(c.Steps))
		causes[i], reasons[i], releases[i], awaits[i] = c.Cause, c.Reason, c.Release, strings.Join(c.Await, "\n")
		if states[i] == nil {
			states[i] = []byte{}
		}
		if !c.WakeAt.IsZero() {
			wakes[i] = &c.WakeAt
		}
		if c.Cancel != "" {
			cancels[i] = &c.Cancel
		}
	}
	return []any{runner, ids, versions, statuses, states, steps, causes, reasons, releases, wakes, awaits, cancels}
}

// For a single one, and above all for one that the runner keeps in hand, there is
// a shorter way.
const (
	saveOne = `
UPDATE saga_instance SET version = $3, status = $4, state = $5, steps = $6, cause = $7, reason = $8, deaths = 0,
	owner = NULL,
	wake_at = CASE
		WHEN $4 IN ('running', 'compensating') AND signals ?| string_to_array($10, E'\n')
			OR $4 = 'running' AND cancel IS DISTINCT FROM $11 THEN now()
		ELSE $9 END,
	ended_at = CASE WHEN $4 IN ('done', 'compensated') THEN clock_timestamp() END
WHERE id = $2 AND owner = $1
RETURNING id, cancel, signals`

	keepOne = `
UPDATE saga_instance SET version = $3, status = $4, state = $5, steps = $6, cause = $7, reason = $8, deaths = 0
WHERE id = $2 AND owner = $1
RETURNING id, cancel, signals`
)

func single(runner string, c *saga.Checkpoint) (sql string, args []any) {
	state := c.State
	if state == nil {
		state = []byte{}
	}
	args = []any{runner, c.ID, c.Version, string(c.Status), state, string(encodeSteps(c.Steps)), c.Cause, c.Reason}
	if !c.Release {
		return keepOne, args
	}
	var wake *time.Time
	if !c.WakeAt.IsZero() {
		wake = &c.WakeAt
	}
	var cancel *string
	if c.Cancel != "" {
		cancel = &c.Cancel
	}
	return saveOne, append(args, wake, strings.Join(c.Await, "\n"), cancel)
}

// Save implements [saga.Store].
func (s *Store) Save(ctx context.Context, runner string, cs []saga.Checkpoint) ([]saga.Ack, error) {
	acks, err := s.save(ctx, runner, cs)
	if class := code(err); strings.HasPrefix(class, "22") || strings.HasPrefix(class, "23") || class == "54000" {
		err = fmt.Errorf("%w: %w", saga.ErrInvalid, err) // data that no repetition will make good
	}
	return acks, wrap("save", err)
}

func (s *Store) save(ctx context.Context, runner string, cs []saga.Checkpoint) ([]saga.Ack, error) {
	acks := make([]saga.Ack, len(cs))
	if len(cs) == 1 {
		sql, args := single(runner, &cs[0])
		rows, err := s.pool.Query(ctx, sql, args...)
		if err != nil {
			return nil, err
		}
		return acks, collectAcks(rows, func(string) *saga.Ack { return &acks[0] })
	}
	at := make(map[string]*saga.Ack, len(cs))
	for i := range cs {
		at[cs[i].ID] = &acks[i]
	}
	var b pgx.Batch
	b.Queue(useIndexes)
	b.Queue(saveCheckpoints, saveArgs(runner, cs)...).Query(func(rows pgx.Rows) error {
		return collectAcks(rows, func(id string) *saga.Ack { return at[id] })
	})
	return acks, s.pool.SendBatch(ctx, &b).Close()
}

func collectAcks(rows pgx.Rows, ack func(id string) *saga.Ack) error {
	var id string
	var cancel *string
	var signals []byte
	_, err := pgx.ForEachRow(rows, []any{&id, &cancel, &signals}, func() error {
		a := ack(id)
		if a.Held = true; cancel != nil {
			a.Cancel = *cancel
		}
		return decodeSignals(signals, &a.Signals)
	})
	return err
}

func decodeSignals(b []byte, into *map[string][]byte) error {
	if b == nil {
		return nil
	}
	return json.Unmarshal(b, into)
}

const columns = `id, name, version, status, coalesce(owner::text, ''), wake_at, deaths, coalesce(cancel, ''), signals,
	started_at, ended_at, cause, reason, state, steps`

func scanInstance(row pgx.Row) (saga.Instance, error) {
	var in saga.Instance
	var wake, ended *time.Time
	var signals, steps []byte
	err := row.Scan(&in.ID, &in.Saga, &in.Version, &in.Status, &in.Owner, &wake, &in.Deaths, &in.Cancel, &signals,
		&in.StartedAt, &ended, &in.Cause, &in.Reason, &in.State, &steps)
	if err != nil {
		return in, err
	}
	if wake != nil {
		in.WakeAt = *wake
	}
	if ended != nil {
		in.EndedAt = *ended
	}
	in.Steps, err = decodeSteps(steps)
	return in, errors.Join(err, decodeSignals(signals, &in.Signals))
}
