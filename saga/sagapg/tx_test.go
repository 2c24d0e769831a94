package sagapg_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

type order struct{ Nonce int }

var errBroken = errors.New("broken")

// run runs a runner until the test ends.
func run(t *testing.T, store saga.Store, sagas ...saga.Definition) *saga.Runner {
	t.Helper()
	r := saga.NewRunner(store, sagas, &saga.Options{Lease: 2 * time.Second, Poll: 20 * time.Millisecond})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sql(t *testing.T, pool *pgxpool.Pool, statement string, args ...any) {
	t.Helper()
	_, err := pool.Exec(t.Context(), statement, args...)
	must(t, err)
}

func count(t *testing.T, pool *pgxpool.Pool, sql string, args ...any) (n int) {
	t.Helper()
	must(t, pool.QueryRow(t.Context(), sql, args...).Scan(&n))
	return n
}

// settled waits for a saga to end or be stuck.
func settled(t *testing.T, r *saga.Runner, id string, want saga.Status) saga.Instance {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	in, err := r.Wait(ctx, id)
	must(t, err)
	if in.Status != want {
		t.Fatalf("%s is %s, want %s; cause %q, reason %q, steps %+v", id, in.Status, want, in.Cause, in.Reason, in.Steps)
	}
	return in
}

// insert is a transaction's step that leaves a row.
func insert(kind string) func(context.Context, pgx.Tx, *order) error {
	return func(ctx context.Context, tx pgx.Tx, o *order) error {
		o.Nonce++
		_, err := tx.Exec(ctx, `INSERT INTO effect (saga, kind, nonce) VALUES ($1, $2, $3)`, saga.CurrentCall(ctx).Saga, kind, o.Nonce)
		return err
	}
}

func effects(t *testing.T) *pgxpool.Pool {
	pool := migrated(t)
	sql(t, pool, `CREATE TABLE effect (saga text, kind text, nonce int)`)
	return pool
}

func TestTx(t *testing.T) {
	pool := effects(t)
	attempts := 0
	s := saga.New[order]("order", 1).
		Step("create", sagapg.Tx(pool, insert("create")), sagapg.Tx(pool, insert("undo create")), nil).
		Step("pay", sagapg.Tx(pool, func(ctx context.Context, tx pgx.Tx, o *order) error {
			if err := insert("pay")(ctx, tx, o); err != nil {
				return err
			}
			if attempts++; attempts < 3 {
				return errBroken // rolled back, with what it has done
			}
			return tx.Commit(ctx) // is not its own to do
		}), sagapg.Tx(pool, insert("undo pay")), &saga.StepOptions{MaxAttempts: 3, RetryBase: time.Millisecond}).
		Build()
	r := run(t, sagapg.New(pool, nil), s)
	_, err := s.Start(t.Context(), r, "1", order{})
	must(t, err)
	in := settled(t, r, "1", saga.Compensated)
	state, err := s.State(in)
	must(t, err)
	if state.Nonce != 3 { // create, undo pay, undo create
		t.Errorf("nonce %d, want 3", state.Nonce)
	}
	for kind, want := range map[string]int{"create": 1, "pay": 0, "undo pay": 1, "undo create": 1} {
		if n := count(t, pool, `SELECT count(*) FROM effect WHERE kind = $1`, kind); n != want {
			t.Errorf("%d of %q, want %d", n, kind, want)
		}
	}
	if err := sagapg.Tx(pool, insert("x"))(t.Context(), &order{}); err == nil {
		t.Error("Tx outside of a saga: no error")
	}
}

// A runner that loses the saga while the transaction is open takes nothing over:
// its effect is rolled back, and that of the other is the only one.
func TestTxIsFenced(t *testing.T) {
	pool := effects(t)
	store := sagapg.New(pool, nil)
	var stolen atomic.Bool
	s := saga.New[order]("order", 1).
		Step("create", sagapg.Tx(pool, func(ctx context.Context, tx pgx.Tx, o *order) error {
			if stolen.CompareAndSwap(false, true) { // by hand, as another runner would
				if _, err := pool.Exec(ctx, `UPDATE saga_instance SET owner = NULL, wake_at = now()`); err != nil {
					return err
				}
			}
			return insert("create")(ctx, tx, o)
		}), nil, nil).
		Build()
	r := run(t, store, s)
	_, err := s.Start(t.Context(), r, "1", order{})
	must(t, err)
	settled(t, r, "1", saga.Done)
	if n := count(t, pool, `SELECT count(*) FROM effect`); n != 1 || !stolen.Load() {
		t.Errorf("%d effects, want 1", n)
	}
}

// The answer of COMMIT is lost: the runner finds out what became of it.
func TestTxLostCommit(t *testing.T) {
	dsn := pgtest.URL(t)
	direct := pgtest.Open(t, dsn)
	must(t, sagapg.Migrate(t.Context(), direct))
	sql(t, direct, `CREATE TABLE effect (saga text, kind text, nonce int)`)
	pool, proxy := pgtest.Through(t, dsn)
	s := saga.New[order]("order", 1).
		Step("create", sagapg.Tx(pool, func(ctx context.Context, tx pgx.Tx, o *order) error {
			err := insert("create")(ctx, tx, o)
			proxy.Arm("COMMIT\x00")
			return err
		}), nil, nil).
		Step("pay", sagapg.Tx(pool, insert("pay")), nil, nil).
		Build()
	r := run(t, sagapg.New(direct, nil), s)
	for i := range 10 {
		id := fmt.Sprint(i)
		_, err := s.Start(t.Context(), r, id, order{})
		must(t, err)
		settled(t, r, id, saga.Done)
		if n := count(t, direct, `SELECT count(*) FROM effect WHERE saga = $1`, id); n != 2 {
			t.Errorf("%d effects of saga %s, want one of each of two steps", n, id)
		}
	}
	if proxy.Cuts() != 10 {
		t.Errorf("%d answers were lost, want 10", proxy.Cuts())
	}
}

// Answers of the store itself are lost: of a start, of checkpoints, of the last
// one, and of leases.
func TestLostReplies(t *testing.T) {
	dsn := pgtest.URL(t)
	direct := pgtest.Open(t, dsn)
	must(t, sagapg.Migrate(t.Context(), direct))
	pool, proxy := pgtest.Through(t, dsn)
	var runs atomic.Int64
	step := func(context.Context, *order) error {
		runs.Add(1)
		proxy.Arm("UPDATE 1\x00")
		return nil
	}
	s := saga.New[order]("order", 1).Step("one", step, nil, nil).Step("two", step, nil, nil).Build()
	r := run(t, sagapg.New(pool, nil), s)
	ctx := t.Context()
	for i := range 10 {
		id := fmt.Sprint(i)
		proxy.Arm("INSERT 0 1\x00")
		started, err := s.Start(ctx, r, id, order{})
		for err != nil { // as a caller does that saw no answer
			started, err = s.Start(ctx, r, id, order{})
		}
		if started {
			t.Errorf("saga %s: its first start was lost, yet a second one started it", id)
		}
		settled(t, r, id, saga.Done)
	}
	if n := runs.Load(); n != 20 {
		t.Errorf("%d steps were run, want 20: a lost answer must not repeat a step", n)
	}
	if proxy.Cuts() < 20 {
		t.Errorf("%d answers were lost, want one of each start and some of the checkpoints", proxy.Cuts())
	}
}

func TestStartInTransaction(t *testing.T) {
	pool := effects(t)
	s := saga.New[order]("order", 1).Step("one", func(context.Context, *order) error { return nil }, nil, nil).Build()
	other := saga.New[order]("other", 1).Step("one", func(context.Context, *order) error { return nil }, nil, nil).Build()
	r := run(t, sagapg.New(pool, nil), s)
	ctx := t.Context()
	start := func(id string, fail error) (started bool, err error) {
		err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `INSERT INTO effect (saga) VALUES ($1)`, id); err != nil {
				return err
			}
			if started, err = sagapg.Start(ctx, tx, s, id, order{}); err != nil {
				return err
			}
			return fail
		})
		return started, err
	}
	if _, err := start("1", errBroken); !errors.Is(err, errBroken) {
		t.Fatal(err)
	}
	if _, err := r.Get(ctx, "1"); !errors.Is(err, saga.ErrNotFound) {
		t.Errorf("a saga of a transaction that was rolled back: %v", err)
	}
	if started, err := start("1", nil); err != nil || !started {
		t.Fatal(started, err)
	}
	settled(t, r, "1", saga.Done)
	if started, err := start("1", nil); err != nil || started {
		t.Error(started, err)
	}
	err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		_, err := sagapg.Start(ctx, tx, other, "1", order{})
		return err
	})
	if !errors.Is(err, saga.ErrExists) {
		t.Error(err)
	}
}
