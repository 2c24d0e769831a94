package sagapg

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/saga"
)

const (
	archiveColumns = `id, name, version, status, '', NULL::timestamptz, 0, coalesce(cancel, ''), signals,
	started_at, ended_at, cause, '', state, steps`

	selectInstance = `
SELECT ` + columns + ` FROM saga_instance WHERE id = $1
UNION ALL SELECT ` + archiveColumns + ` FROM saga_archive WHERE id = $1
LIMIT 1`

	selectAudit = `SELECT at, actor, action, detail, reason FROM saga_audit WHERE saga = $1 ORDER BY n`

	list = `
(SELECT ` + columns + ` FROM saga_instance
	WHERE id > $1 AND ($2 = '' OR name = $2) AND ($3 = '' OR status = $3) ORDER BY id LIMIT $4)
UNION ALL
(SELECT ` + archiveColumns + ` FROM saga_archive
	WHERE id > $1 AND ($2 = '' OR name = $2) AND ($3 = '' OR status = $3) ORDER BY id LIMIT $4)
ORDER BY 1 LIMIT $4`

	edit = `
UPDATE saga_instance SET cancel = $2, signals = $3,
	status = CASE WHEN owner IS NULL THEN $4 ELSE status END,
	steps = CASE WHEN owner IS NULL THEN $5 ELSE steps END,
	cause = CASE WHEN owner IS NULL THEN $6 ELSE cause END,
	reason = CASE WHEN owner IS NULL THEN $7 ELSE reason END,
	deaths = CASE WHEN owner IS NULL THEN $8 ELSE deaths END,
	wake_at = CASE WHEN owner IS NULL THEN $9 ELSE wake_at END,
	ended_at = CASE WHEN owner IS NULL AND $4 IN ('done', 'compensated') THEN clock_timestamp() ELSE ended_at END
WHERE id = $1`

	sample = `
SELECT count(*) FILTER (WHERE s.status = 'running'), count(*) FILTER (WHERE s.status = 'compensating'),
	count(*) FILTER (WHERE s.status = 'stuck'), count(*) FILTER (WHERE NOT r.dead),
	count(*) FILTER (WHERE r.dead IS NOT FALSE AND s.wake_at <= now()),
	coalesce(extract(epoch FROM now() - min(s.wake_at) FILTER (WHERE r.dead IS NOT FALSE AND s.wake_at <= now())), 0)::float8
FROM saga_instance s LEFT JOIN saga_runner r ON r.id = s.owner
WHERE s.ended_at IS NULL`
)

// Get implements [saga.Registry].
func (s *Store) Get(ctx context.Context, id string) (saga.Instance, error) {
	var in saga.Instance
	var b pgx.Batch
	b.Queue(selectInstance, id).QueryRow(func(row pgx.Row) (err error) {
		in, err = scanInstance(row)
		if errors.Is(err, pgx.ErrNoRows) {
			err = fmt.Errorf("%w: %s", saga.ErrNotFound, id)
		}
		return err
	})
	b.Queue(selectAudit, id).Query(func(rows pgx.Rows) (err error) {
		in.Audit, err = pgx.CollectRows(rows, pgx.RowToStructByPos[saga.Audit])
		return err
	})
	return in, wrap("get", s.pool.SendBatch(ctx, &b).Close())
}

// List implements [saga.Registry]. The archive is part of it.
func (s *Store) List(ctx context.Context, q saga.Query) ([]saga.Instance, error) {
	if q.Limit <= 0 {
		q.Limit = 100
	}
	rows, err := s.pool.Query(ctx, list, q.After, q.Saga, string(q.Status), q.Limit)
	if err != nil {
		return nil, wrap("list", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (saga.Instance, error) { return scanInstance(row) })
	return out, wrap("list", err)
}

// Edit implements [saga.Registry]. f runs while the row is locked, and again if
// the transaction has to be repeated.
func (s *Store) Edit(ctx context.Context, id string, f func(*saga.Instance) (*saga.Audit, error)) error {
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error { return editTx(ctx, tx, id, f) })
}

func editTx(ctx context.Context, tx pgx.Tx, id string, f func(*saga.Instance) (*saga.Audit, error)) error {
	in, err := scanInstance(tx.QueryRow(ctx, `SELECT `+columns+` FROM saga_instance WHERE id = $1 FOR UPDATE`, id))
	if errors.Is(err, pgx.ErrNoRows) {
		in, err = scanInstance(tx.QueryRow(ctx, selectInstance, id))
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return fmt.Errorf("%w: %s", saga.ErrNotFound, id)
		case err != nil:
			return wrap("edit", err)
		}
		if _, err := f(&in); err != nil {
			return err
		}
		return fmt.Errorf("%w: it is archived", saga.ErrState)
	}
	if err != nil {
		return wrap("edit", err)
	}
	audit, err := f(&in)
	if err != nil {
		return err
	}
	var cancel *string
	if in.Cancel != "" {
		cancel = &in.Cancel
	}
	var signals *string // as text: some ways to send statements take bytes for bytea
	if in.Signals != nil {
		b, err := json.Marshal(in.Signals)
		if err != nil {
			return wrap("edit", err)
		}
		text := string(b)
		signals = &text
	}
	var wake *time.Time
	if !in.WakeAt.IsZero() {
		wake = &in.WakeAt
	}
	var b pgx.Batch
	b.Queue(edit, id, cancel, signals, string(in.Status), string(encodeSteps(in.Steps)), in.Cause, in.Reason, in.Deaths, wake)
	if audit != nil {
		b.Queue(`INSERT INTO saga_audit (saga, actor, action, detail, reason) VALUES ($1, $2, $3, $4, $5)`,
			id, audit.Actor, audit.Action, audit.Detail, audit.Reason)
	}
	return wrap("edit", tx.SendBatch(ctx, &b).Close())
}

// Sample implements [saga.Registry]. It reads all sagas that have not ended.
func (s *Store) Sample(ctx context.Context) (saga.Sample, error) {
	var out saga.Sample
	var lag float64
	err := s.pool.QueryRow(ctx, sample).Scan(&out.Running, &out.Compensating, &out.Stuck, &out.InHand, &out.Due, &lag)
	out.Lag = time.Duration(lag * float64(time.Second))
	return out, wrap("sample", err)
}
