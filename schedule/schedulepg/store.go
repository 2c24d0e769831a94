// Package schedulepg keeps schedules in Postgres.
//
// [Store] is what a schedule.Runner works on, and has the methods of those who
// define schedules, trigger and pause them and read their history, from any
// process. [HandleTx] makes a handler whose work and outcome are one
// transaction. [Listen] wakes runners when a definition or trigger is new.
//
// [Migrate] makes the tables, whose names are resolved by search_path. Postgres
// 15 or newer; PgBouncer in transaction mode will do, except for Listen.
package schedulepg

import (
	"context"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/schedule"
)

// A Store is a [schedule.Store] in Postgres. The clock that decides is the
// database's. A look that finds nothing to do is one round trip and writes
// nothing; so is a tick, with one commit. It is safe for concurrent use.
type Store struct {
	pool *pgxpool.Pool
}

var _ schedule.Store = (*Store)(nil)

// New returns a store on pool, whose tables [Migrate] has made. The pool stays
// the caller's.
func New(pool *pgxpool.Pool) *Store {
	if pool == nil {
		panic("schedulepg: New needs a pool")
	}
	return &Store{pool: pool}
}

const definitionColumns = `d.name, d.handler, d.spec, d.zone, d.payload, d.misfire, d.backfill, d.grace, d.overlap, d.jitter,
	d.timeout, d.attempts, d.retry_base, d.retry_max, d.at_most_once, d.revision`

func definitionFields(d *schedule.Definition) []any {
	return []any{
		&d.Name, &d.Handler, &d.Spec, &d.Zone, &d.Payload, &d.Misfire, &d.Backfill, &d.Grace, &d.Overlap, &d.Jitter,
		&d.Timeout, &d.Attempts, &d.RetryBase, &d.RetryMax, &d.AtMostOnce, &d.Revision,
	}
}

const (
	// What may be claimed beside new ticks. An exclusive schedule that has a run
	// going is left out, or each look would find its waiting runs.
	claimableSQL = `
SELECT DISTINCT d.name FROM schedule_run r JOIN schedule_definition d ON d.name = r.schedule
WHERE r.state IN ('waiting', 'running') AND d.handler = ANY($1::text[]) AND d.name <> ALL($2::text[])
	AND CASE r.state WHEN 'running' THEN r.lease_until <= now()
		ELSE r.due_at <= now() AND (d.overlap = 'allow' OR NOT EXISTS (
			SELECT FROM schedule_run o WHERE o.schedule = r.schedule AND o.state = 'running')) END
LIMIT 1000`

	// The row locks are no more than a queue for the milliseconds of a claim:
	// those who look at the overlap of a schedule do so one after the other. Who
	// runs a tick is decided by its row. The statements behind this one must see
	// what was committed before the locks were taken, so they are others; which
	// rows are locked goes to them by a setting that ends with the transaction.
	//
	// A tick must not wait for plans that are made anew for each value: the first
	// five executions on a connection would.
	lockSQL = `
SELECT set_config('plan_cache_mode', 'force_generic_plan', true), set_config('ashlar.schedules', (
	SELECT coalesce(jsonb_agg(name), '[]')::text FROM (
		SELECT name FROM schedule_definition WHERE name = ANY($1::text[]) AND handler = ANY($2::text[])` + oneAtATime + `) AS free), true)`
	oneAtATime = ` FOR NO KEY UPDATE SKIP LOCKED`

	locked = `(SELECT jsonb_array_elements_text(current_setting('ashlar.schedules')::jsonb))`

	plansSQL = `
SELECT ` + definitionColumns + `, d.version, d.next_tick, d.since FROM schedule_definition d
WHERE NOT d.paused AND d.next_due <= now() + $1::interval AND d.handler = ANY($2::text[]) AND d.name <> ALL($3::text[])
ORDER BY d.next_due LIMIT 1000`

	nextSQL = `
SELECT now(), (SELECT min(e.at) FROM (
	SELECT CASE r.state WHEN 'waiting' THEN r.due_at ELSE r.lease_until END AS at
	FROM schedule_run r JOIN schedule_definition d ON d.name = r.schedule
	WHERE r.state IN ('waiting', 'running') AND d.handler = ANY($1::text[]) AND (r.state = 'waiting' OR r.instance <> $2)) e
	WHERE e.at > now())`
)

// Claim implements [schedule.Store].
func (s *Store) Claim(ctx context.Context, req schedule.ClaimRequest) (schedule.Claim, error) {
	claim, err := s.claim(ctx, &req, lockSQL)
	return claim, wrap("claim", err)
}

func (s *Store) claim(ctx context.Context, req *schedule.ClaimRequest, lock string) (claim schedule.Claim, err error) {
	batch := &pgx.Batch{}
	if len(req.Decisions) > 0 {
		claim.Again = true // the ticks do not wait for what the look reads
		names := make([]string, len(req.Decisions))
		for i, d := range req.Decisions {
			names[i] = d.Name
		}
		asked, err := json.Marshal(decisions(req.Decisions))
		if err != nil {
			return claim, err
		}
		begin(batch, lock, names, req.Handlers)
		queueRuns(batch, &claim, ticksSQL, string(asked), req.Instance, req.Slots, req.PerSchedule, req.Lease)
		batch.Queue(`COMMIT`)
		return claim, s.pool.SendBatch(ctx, batch).Close()
	}
	var claimable []string
	batch.Queue(claimableSQL, req.Handlers, notNil(req.Busy)).Query(func(rows pgx.Rows) (err error) {
		claimable, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	queueLook(batch, &claim, req)
	if err := s.pool.SendBatch(ctx, batch).Close(); err != nil || len(claimable) == 0 || req.Slots == 0 {
		return claim, err
	}
	claim, batch = schedule.Claim{}, &pgx.Batch{}
	begin(batch, lock, claimable, req.Handlers)
	batch.Queue(lostSQL)
	queueRuns(batch, &claim, grantSQL, req.Instance, req.Slots, req.PerSchedule, req.Lease)
	batch.Queue(`COMMIT`)
	queueLook(batch, &claim, req)
	return claim, s.pool.SendBatch(ctx, batch).Close()
}

// begin starts a transaction that locks the definitions of those names that
// are free. The batch must end it; a connection on which that fails is closed.
func begin(batch *pgx.Batch, lock string, names, handlers []string) {
	batch.Queue(`BEGIN ISOLATION LEVEL READ COMMITTED`)
	batch.Queue(lock, names, handlers)
}

// queueLook reads what is to come.
func queueLook(batch *pgx.Batch, claim *schedule.Claim, req *schedule.ClaimRequest) {
	batch.Queue(plansSQL, req.Ahead, req.Handlers, notNil(req.Unknown)).Query(func(rows pgx.Rows) (err error) {
		claim.Plans, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (schedule.Plan, error) {
			var p schedule.Plan
			var next pgtype.Timestamptz
			err := row.Scan(append(definitionFields(&p.Definition), &p.Version, &next, &p.Since)...)
			p.Next, p.Since = next.Time.UTC(), p.Since.UTC()
			if !next.Valid {
				p.Next = time.Time{}
			}
			return p, err
		})
		return err
	})
	batch.Queue(nextSQL, req.Handlers, req.Instance).QueryRow(func(row pgx.Row) error {
		var next *time.Time
		err := row.Scan(&claim.Now, &next)
		if next != nil {
			claim.Next = *next
		}
		return err
	})
}

const (
	runColumns = `r.id, r.tick, r.due_at, r.started_at, r.manual, coalesce(r.payload, d.payload), r.attempt, r.failures, r.missed, ` + definitionColumns

	ticksSQL = `
WITH asked AS (
	SELECT * FROM jsonb_to_recordset($1::jsonb) AS q("Name" text, "Version" bigint, "From" timestamptz, "Next" timestamptz,
		"NextDue" timestamptz, "Missed" int, "Ticks" jsonb)
), d AS (
	SELECT s.*, q.*,
		EXISTS (SELECT FROM schedule_run r WHERE r.schedule = s.name AND r.state IN ('waiting', 'running') AND r.state = 'running') AS runs,
		EXISTS (SELECT FROM schedule_run r WHERE r.schedule = s.name AND r.state IN ('waiting', 'running') AND r.state = 'waiting') AS waits
	FROM asked q JOIN schedule_definition s ON s.name = q."Name"
	WHERE s.name IN ` + locked + ` AND s.version = q."Version" AND NOT s.paused AND s.next_due < 'infinity'
		AND s.next_tick IS NOT DISTINCT FROM q."From"
		AND coalesce((SELECT max(t."Due") FROM jsonb_to_recordset(q."Ticks") AS t("Due" timestamptz)) <= now(), true)
), advanced AS (
	UPDATE schedule_definition s SET next_tick = d."Next", next_due = coalesce(d."NextDue", 'infinity'), missed = s.missed + d."Missed"
	FROM d WHERE s.name = d.name
), tick AS (
	SELECT d.name, t.*, d.overlap, d.waits, d.runs, row_number() OVER (PARTITION BY d.name ORDER BY t."At") AS n
	FROM d, jsonb_to_recordset(d."Ticks") AS t("ID" uuid, "At" timestamptz, "Due" timestamptz, "Missed" int, "Late" bool)
), placed AS (
	SELECT t.*,
		NOT t."Late" AND (t.overlap = 'skip' AND (t.waits OR t.runs) OR t.overlap = 'queue' AND (t.waits OR t.runs AND t.n > 1)) AS skipped,
		t.overlap = 'allow' AND t.n <= $4 OR t.n = 1 AND NOT t.waits AND NOT t.runs AS free
	FROM tick t
), made AS (
	INSERT INTO schedule_run (id, schedule, tick, due_at, missed, state, attempt, instance, lease_until, started_at, finished_at)
	SELECT p."ID", p.name, p."At", p."Due", p."Missed", CASE WHEN p.skipped THEN 'skipped' WHEN p.now THEN 'running' ELSE 'waiting' END,
		p.now::int, CASE WHEN p.now THEN $2 ELSE '' END, CASE WHEN p.now THEN now() + $5::interval END, CASE WHEN p.now THEN now() END,
		CASE WHEN p.skipped THEN now() END
	FROM (SELECT *, NOT skipped AND free AND sum((NOT skipped AND free)::int) OVER (ORDER BY "Due", "ID") <= $3 AS now FROM placed) p
	ON CONFLICT (schedule, tick) WHERE NOT manual DO NOTHING
	RETURNING *
)
SELECT ` + runColumns + ` FROM made r JOIN schedule_definition d ON d.name = r.schedule WHERE r.state = 'running' ORDER BY r.due_at, r.id`
)

// A decision is a schedule.Decision as ticksSQL reads it.
type decision struct {
	Name                string
	Version             int64
	From, Next, NextDue *string
	Ticks               []tick
	Missed              int
}

type tick struct {
	ID      string
	At, Due *string
	Missed  int
	Late    bool
}

func decisions(all []schedule.Decision) []decision {
	out := make([]decision, len(all))
	for i, d := range all {
		out[i] = decision{
			Name: d.Name, Version: d.Version, From: stamp(d.From), Next: stamp(d.Next), NextDue: stamp(d.NextDue),
			Missed: d.Missed, Ticks: make([]tick, len(d.Ticks)),
		}
		for j, t := range d.Ticks {
			out[i].Ticks[j] = tick{ID: t.ID, At: stamp(t.At), Due: stamp(t.Due), Missed: t.Missed, Late: t.Late}
		}
	}
	return out
}

// stamp is a time as Postgres reads it; nil where there is none.
func stamp(t time.Time) *string {
	if t.IsZero() {
		return nil
	}
	s := t.UTC().Format("2006-01-02T15:04:05.999999Z")
	return &s
}

const (
	lostSQL = `
UPDATE schedule_run SET state = 'lost', finished_at = now(), lease_until = NULL, error = 'its instance died'
WHERE id IN (SELECT r.id FROM schedule_run r JOIN schedule_definition d ON d.name = r.schedule
	WHERE r.schedule IN ` + locked + ` AND r.state IN ('waiting', 'running') AND r.state = 'running' AND r.lease_until <= now()
		AND (d.at_most_once OR r.deaths >= 5)
	FOR UPDATE OF r SKIP LOCKED)`

	// Of an exclusive schedule the run whose lease has ended comes first, else
	// the one that waits longest. What is being finished at this moment is locked.
	grantSQL = `
WITH ranked AS (
	SELECT r.id, d.overlap = 'allow' AS allow,
		row_number() OVER (PARTITION BY r.schedule ORDER BY r.state, r.due_at, r.id) AS n
	FROM schedule_run r JOIN schedule_definition d ON d.name = r.schedule
	WHERE r.schedule IN ` + locked + ` AND r.state IN ('waiting', 'running')
		AND CASE r.state WHEN 'running' THEN r.lease_until <= now()
			ELSE r.due_at <= now() AND (d.overlap = 'allow' OR NOT EXISTS (
				SELECT FROM schedule_run o WHERE o.schedule = r.schedule AND o.state = 'running')) END
), picked AS (
	SELECT r.id FROM schedule_run r JOIN ranked USING (id)
	WHERE ranked.n <= CASE WHEN ranked.allow THEN $3 ELSE 1 END
		AND (r.state = 'waiting' OR r.state = 'running' AND r.lease_until <= now())
	ORDER BY r.due_at
	LIMIT $2
	FOR UPDATE OF r SKIP LOCKED
), taken AS (
	UPDATE schedule_run r SET state = 'running', attempt = r.attempt + 1, deaths = r.deaths + (r.state = 'running')::int,
		instance = $1, lease_until = now() + $4::interval, started_at = now()
	FROM picked WHERE r.id = picked.id
	RETURNING r.*
)
SELECT ` + runColumns + ` FROM taken r JOIN schedule_definition d ON d.name = r.schedule ORDER BY r.due_at, r.id`
)

// queueRuns adds the runs that a statement returns to the claim.
func queueRuns(batch *pgx.Batch, claim *schedule.Claim, sql string, args ...any) {
	batch.Queue(sql, args...).Query(func(rows pgx.Rows) error {
		runs, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (schedule.Run, error) {
			var r schedule.Run
			fields := []any{&r.ID, &r.Tick, &r.Due, &r.Claimed, &r.Manual, &r.Payload, &r.Attempt, &r.Failures, &r.Missed}
			err := row.Scan(append(fields, definitionFields(&r.Schedule)...)...)
			r.Tick, r.Due, r.Claimed = r.Tick.UTC(), r.Due.UTC(), r.Claimed.UTC()
			return r, err
		})
		claim.Runs = append(claim.Runs, runs...)
		return err
	})
}

func notNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}
