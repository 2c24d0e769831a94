package sagapg_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

// Every way in which pgx may send statements works, so also those that a
// connection pooler asks for.
func TestExecModes(t *testing.T) {
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec,
		pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			cfg := effects(t).Config()
			cfg.ConnConfig.DefaultQueryExecMode = mode
			pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
			must(t, err)
			t.Cleanup(pool.Close)
			tour(t, pool)
		})
	}
}

func TestPgBouncer(t *testing.T) {
	direct := pgtest.Open(t, pgtest.Database(t))
	must(t, sagapg.Migrate(t.Context(), direct))
	sql(t, direct, `CREATE TABLE effect (saga text, kind text, nonce int)`)
	via := pgtest.Bounce(t, direct)
	cfg := via.Config()
	cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec // PgBouncer before 1.21 keeps no prepared statements
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	must(t, err)
	t.Cleanup(pool.Close)
	tour(t, pool)
}

// tour makes use of everything once.
func tour(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	ctx := t.Context()
	store := sagapg.New(pool, &sagapg.Options{Keep: time.Millisecond})
	pivot := func(ctx context.Context, o *order) error {
		if saga.CurrentCall(ctx).Saga == "declined 'é" {
			return saga.Abort(errors.New("declined: \\ '"))
		}
		return nil
	}
	barrier := func(ctx context.Context, _ *order) error {
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return participate(ctx, tx, saga.CurrentCall(ctx)) })
	}
	s := saga.New[order]("tour", 1).
		Step("tx", sagapg.Tx(pool, insert("tx")), sagapg.Tx(pool, insert("undo tx")), nil).
		Step("unused tx", sagapg.Tx(pool, func(context.Context, pgx.Tx, *order) error { return nil }), nil, nil).
		Step("row tx", sagapg.Tx(pool, func(ctx context.Context, tx pgx.Tx, o *order) error {
			return tx.QueryRow(ctx, `SELECT $1::int`, 5).Scan(&o.Nonce)
		}), nil, nil).
		Step("barrier", barrier, barrier, nil).
		Await("answer", nil, &saga.AwaitOptions{Deadline: time.Hour}).
		Pivot("pivot", pivot, nil).
		Build()
	r := run(t, store, s)
	ids := []string{"declined 'é", "tx", "accepted"}
	for i := range 20 {
		ids = append(ids, fmt.Sprint("many ", i))
	}
	started := make(chan error)
	for _, id := range ids {
		go func() {
			var err error
			if id == "tx" {
				err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { _, err := sagapg.Start(ctx, tx, s, id, order{}); return err })
			} else {
				_, err = s.Start(ctx, r, id, order{})
			}
			started <- errors.Join(err, r.Signal(ctx, id, "answer", []byte{0, 255, '\''}))
		}()
	}
	for range ids {
		must(t, <-started)
	}
	for _, id := range ids {
		if id != ids[0] {
			settled(t, r, id, saga.Done)
		}
	}
	settled(t, r, ids[0], saga.Compensated)
	if n := count(t, pool, `SELECT coalesce(sum(nonce), 0) FROM effect WHERE saga = $1 AND kind = 'barrier'`, ids[0]); n != 0 {
		t.Errorf("the compensated saga left %d", n)
	}
	must(t, store.Maintain(ctx))
	if list, err := r.List(ctx, saga.Query{Saga: "tour"}); err != nil || len(list) != len(ids) {
		t.Errorf("%d sagas, want %d; %v", len(list), len(ids), err)
	}
	if _, err := r.Get(ctx, ids[0]); err != nil {
		t.Error(err)
	}
	if err := r.Cancel(ctx, ids[0], saga.By{Actor: "ops"}); !errors.Is(err, saga.ErrState) {
		t.Error(err)
	}
	_, err := store.Sample(ctx)
	must(t, err)
	_, err = store.PurgeBarriers(ctx, time.Hour, 10)
	must(t, err)
}
