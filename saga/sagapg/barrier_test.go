package sagapg_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

func TestBarrier(t *testing.T) {
	pool := migrated(t)
	ctx := t.Context()
	do, undo := saga.Call{Saga: "1", Step: "pay"}, saga.Call{Saga: "1", Step: "pay", Compensating: true}
	call := func(c saga.Call, fail error) bool {
		t.Helper()
		var ok bool
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) (err error) {
			if ok, err = sagapg.Barrier(ctx, tx, c); err != nil {
				return err
			}
			return fail
		})
		if err != fail { //nolint:errorlint // it is returned as it is
			t.Fatal(err)
		}
		return ok
	}
	for _, c := range []struct {
		what string
		saga string
		call saga.Call
		fail error
		ok   bool
	}{
		{"a step", "in order", do, nil, true},
		{"the step again", "in order", do, nil, false},
		{"its compensation", "in order", undo, nil, true},
		{"its compensation again", "in order", undo, nil, false},
		{"the step after its compensation", "in order", do, nil, false},
		{"a compensation without a step", "empty", undo, nil, false},
		{"its late step", "empty", do, nil, false},
		{"a step that is rolled back", "failed", do, errBroken, true},
		{"it again", "failed", do, nil, true},
		{"a compensation that is rolled back", "failed", undo, errBroken, true},
		{"it again", "failed", undo, nil, true},
	} {
		c.call.Saga = c.saga
		if ok := call(c.call, c.fail); ok != c.ok {
			t.Errorf("%s: %s: ok %t, want %t", c.saga, c.what, ok, c.ok)
		}
	}
	if n, err := sagapg.New(pool, nil).PurgeBarriers(ctx, time.Hour, 10); n != 0 || err != nil {
		t.Error(n, err)
	}
	sql(t, pool, `UPDATE saga_barrier SET at = now() - interval '2 h'`)
	if n, err := sagapg.New(pool, nil).PurgeBarriers(ctx, time.Hour, 4); n != 4 || err != nil {
		t.Error(n, err)
	}
}

// A step and its compensation arrive at the same time: either both take effect,
// in this order, or neither does.
func TestBarrierRace(t *testing.T) {
	pool := effects(t)
	for i := range 100 {
		var wg sync.WaitGroup
		for _, undo := range []bool{false, true, false, true} {
			wg.Go(func() {
				err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
					return participate(t.Context(), tx, saga.Call{Saga: "s", Step: string(rune('a' + i)), Compensating: undo})
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	n := count(t, pool, `SELECT count(*) FROM (SELECT kind FROM effect GROUP BY kind HAVING sum(nonce) <> 0 OR count(*) > 2) AS odd`)
	if n != 0 {
		t.Errorf("%d steps took effect without their compensation, or the other way round, or twice", n)
	}
}

// participate does what a call asks for, behind the barrier: 1 for a step, -1 for
// its compensation.
func participate(ctx context.Context, tx pgx.Tx, call saga.Call) error {
	ok, err := sagapg.Barrier(ctx, tx, call)
	if err != nil || !ok {
		return err
	}
	effect := 1
	if call.Compensating {
		effect = -1
	}
	_, err = tx.Exec(ctx, `INSERT INTO effect (saga, kind, nonce) VALUES ($1, $2, $3)`, call.Saga, call.Step, effect)
	return err
}
