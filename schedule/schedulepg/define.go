package schedulepg

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/internal/ids"
	"github.com/ashlar-go/ashlar/schedule"
)

const (
	defineSQL = `
INSERT INTO schedule_definition AS d (name, handler, spec, zone, payload, misfire, backfill, grace, overlap, jitter,
	timeout, attempts, retry_base, retry_max, at_most_once, revision, since)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8::interval, $9, $10::interval,
	$11::interval, $12, $13::interval, $14::interval, $15, $16, now())
ON CONFLICT (name) DO UPDATE SET handler = excluded.handler, spec = excluded.spec, zone = excluded.zone, payload = excluded.payload,
	misfire = excluded.misfire, backfill = excluded.backfill, grace = excluded.grace, overlap = excluded.overlap,
	jitter = excluded.jitter, timeout = excluded.timeout, attempts = excluded.attempts, retry_base = excluded.retry_base,
	retry_max = excluded.retry_max, at_most_once = excluded.at_most_once, revision = excluded.revision, version = d.version + 1,
	since = CASE WHEN ` + sameTicks + ` THEN d.since ELSE excluded.since END,
	next_tick = CASE WHEN ` + sameTicks + ` THEN d.next_tick END,
	next_due = CASE WHEN ` + sameTicks + ` THEN d.next_due ELSE '-infinity' END
WHERE excluded.revision >= d.revision AND
	(excluded.handler, excluded.spec, excluded.zone, excluded.payload, excluded.misfire, excluded.backfill, excluded.grace,
		excluded.overlap, excluded.jitter, excluded.timeout, excluded.attempts, excluded.retry_base, excluded.retry_max,
		excluded.at_most_once, excluded.revision)
	IS DISTINCT FROM (d.handler, d.spec, d.zone, d.payload, d.misfire, d.backfill, d.grace,
		d.overlap, d.jitter, d.timeout, d.attempts, d.retry_base, d.retry_max, d.at_most_once, d.revision)`

	sameTicks = `(excluded.spec, excluded.zone, excluded.jitter) = (d.spec, d.zone, d.jitter)`

	pauseSQL  = `UPDATE schedule_definition SET paused = true, version = version + (NOT paused)::int WHERE name = $1`
	resumeSQL = `
UPDATE schedule_definition SET paused = false, version = version + paused::int,
	since = CASE WHEN paused THEN now() ELSE since END,
	next_tick = CASE WHEN NOT paused THEN next_tick END,
	next_due = CASE WHEN paused THEN '-infinity' ELSE next_due END
WHERE name = $1`

	triggerSQL = `
INSERT INTO schedule_run (id, schedule, tick, due_at, manual, key, payload, state)
SELECT $2::uuid, d.name, now(), now(), true, nullif($3::text, ''), $4::bytea, 'waiting'
FROM schedule_definition d WHERE d.name = $1
ON CONFLICT (schedule, key) WHERE key IS NOT NULL DO NOTHING`
)

// Define adds the schedule, or changes it if it is not the same, and reports
// whether it did either. To define the same again changes nothing, so that every
// instance may do so whenever it starts. A changed spec, zone or jitter takes
// effect from then on; any other change keeps the next tick. A paused schedule
// stays paused. It wraps schedule.ErrInvalid if d breaks a rule.
func (s *Store) Define(ctx context.Context, d schedule.Definition) (changed bool, err error) {
	if d, err = schedule.Prepare(d); err != nil {
		return false, err
	}
	payload := d.Payload
	if payload == nil {
		payload = []byte{}
	}
	n, err := s.announce(ctx, defineSQL, d.Name, d.Handler, d.Spec, d.Zone, payload, string(d.Misfire), d.Backfill, d.Grace, string(d.Overlap),
		d.Jitter, d.Timeout, d.Attempts, d.RetryBase, d.RetryMax, d.AtMostOnce, d.Revision)
	return n > 0, wrap("define", err)
}

// announce runs a statement, and tells runners if it has changed a row. Such
// statements are rare, so that a notification in each does no harm.
func (s *Store) announce(ctx context.Context, sql string, args ...any) (n int64, err error) {
	tag, err := s.pool.Exec(ctx, sql, args...)
	if n = tag.RowsAffected(); err == nil && n > 0 {
		_, _ = s.pool.Exec(ctx, `NOTIFY `+channel) // if it is lost, runners poll
	}
	return n, err
}

// change is for statements that change the definition of that name.
func (s *Store) change(ctx context.Context, op, sql, name string) error {
	n, err := s.announce(ctx, sql, name)
	if err == nil && n == 0 {
		err = fmt.Errorf("%w: %q", schedule.ErrNotFound, name)
	}
	return wrap(op, err)
}

// Remove ends the schedule. Its runs that wait are dropped; one that is executed
// goes on, and its history stays until it is pruned.
func (s *Store) Remove(ctx context.Context, name string) error {
	return s.change(ctx, "remove", `
WITH gone AS (DELETE FROM schedule_definition WHERE name = $1 RETURNING name),
	dropped AS (DELETE FROM schedule_run r USING gone WHERE r.schedule = gone.name AND r.state IN ('waiting', 'running') AND r.state = 'waiting')
SELECT FROM gone`, name)
}

// Pause holds the schedule back: it has no ticks until it is resumed. Manual
// runs and retries go on.
func (s *Store) Pause(ctx context.Context, name string) error {
	return s.change(ctx, "pause", pauseSQL, name)
}

// Resume ends a pause. The ticks of the pause are not missed: the next is the
// first from now on.
func (s *Store) Resume(ctx context.Context, name string) error {
	return s.change(ctx, "resume", resumeSQL, name)
}

// Trigger asks for a run now and returns its ID. It waits for the end of other
// runs unless the overlap policy allows them, and is never skipped.
func (s *Store) Trigger(ctx context.Context, t schedule.Trigger) (id string, err error) {
	if err := t.Validate(); err != nil {
		return "", err
	}
	id = ids.New()
	n, err := s.announce(ctx, triggerSQL, t.Name, id, t.Key, t.Payload)
	if err != nil || n > 0 {
		return id, wrap("trigger", err)
	}
	err = s.pool.QueryRow(ctx, `SELECT id FROM schedule_run WHERE schedule = $1 AND key = $2`, t.Name, t.Key).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		err = fmt.Errorf("%w: %q", schedule.ErrNotFound, t.Name)
	}
	return id, wrap("trigger", err)
}

const listSQL = `
SELECT ` + definitionColumns + `, d.paused, nullif(d.next_tick, 'infinity'), d.missed, a.running, a.waiting, coalesce(l.state, ''), l.tick, f.failing,
	coalesce(extract(epoch FROM now() - least(CASE WHEN NOT d.paused AND isfinite(d.next_due) THEN d.next_due END, a.due)), 0)::float8
FROM schedule_definition d
CROSS JOIN LATERAL (SELECT count(*) FILTER (WHERE state = 'running') AS running, count(*) FILTER (WHERE state = 'waiting') AS waiting,
	min(due_at) FILTER (WHERE state = 'waiting') AS due
	FROM schedule_run WHERE schedule = d.name AND state IN ('waiting', 'running')) a
LEFT JOIN LATERAL (SELECT state, tick FROM schedule_run WHERE schedule = d.name AND state IN ('done', 'failed', 'lost')
	ORDER BY tick DESC, id DESC LIMIT 1) l ON true
CROSS JOIN LATERAL (SELECT count(*) AS failing FROM schedule_run r WHERE r.schedule = d.name AND r.state IN ('failed', 'lost')
	AND r.tick > coalesce((SELECT max(o.tick) FROM schedule_run o WHERE o.schedule = d.name AND o.state = 'done'), '-infinity')) f
ORDER BY d.name`

// List returns how the schedules are doing, by name.
func (s *Store) List(ctx context.Context) ([]schedule.Status, error) {
	rows, err := s.pool.Query(ctx, listSQL)
	if err != nil {
		return nil, wrap("list", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (schedule.Status, error) {
		var st schedule.Status
		var next, last *time.Time
		var lag float64
		err := row.Scan(append(definitionFields(&st.Definition), &st.Paused, &next, &st.Missed, &st.Running, &st.Waiting, &st.Last, &last, &st.Failing, &lag)...)
		st.Next, st.LastRun = timeOf(next), timeOf(last)
		st.Lag = time.Duration(max(lag, 0) * float64(time.Second))
		return st, err
	})
	return out, wrap("list", err)
}

// Runs returns at most limit runs of the schedule, the latest tick first.
func (s *Store) Runs(ctx context.Context, name string, limit int) ([]schedule.Record, error) {
	rows, err := s.pool.Query(ctx, `
SELECT id, schedule, tick, due_at, manual, state, attempt, missed, instance, started_at, finished_at, error
FROM schedule_run WHERE schedule = $1 ORDER BY tick DESC, id DESC LIMIT $2`, name, limit)
	if err != nil {
		return nil, wrap("runs", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (schedule.Record, error) {
		var r schedule.Record
		var started, finished *time.Time
		err := row.Scan(&r.ID, &r.Name, &r.Tick, &r.Due, &r.Manual, &r.State, &r.Attempt, &r.Missed, &r.Instance, &started, &finished, &r.Err)
		r.Tick, r.Due, r.Started, r.Finished = r.Tick.UTC(), r.Due.UTC(), timeOf(started), timeOf(finished)
		return r, err
	})
	return out, wrap("runs", err)
}

func timeOf(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.UTC()
}
