package idempotencypg_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/internal/pgtest"
)

func TestCompleteTx(t *testing.T) {
	pool := ledger(t)
	store := idempotencypg.New(pool)
	do := func(id string, opts *idempotency.Options, fn func(context.Context, pgx.Tx) error) (string, bool, error) {
		return idempotency.Do(t.Context(), store, key(id), opts, func(ctx context.Context) (string, error) {
			return "result of " + id, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				if _, err := effect(id)(ctx, tx); err != nil {
					return err
				}
				if err := idempotencypg.CompleteTx(ctx, tx, "result of "+id); err != nil {
					return err
				}
				return fn(ctx, tx)
			})
		})
	}
	nothing := func(context.Context, pgx.Tx) error { return nil }
	for i := range 2 {
		got, replayed, err := do("k", nil, nothing)
		if err != nil || got != "result of k" || replayed != (i == 1) {
			t.Fatalf("call %d: %q, %v, %v", i, got, replayed, err)
		}
	}
	if n := effects(t, pool, "k"); n != 1 {
		t.Fatalf("%d effects, want 1", n)
	}

	// Rolled back: the completion goes with the effect, and the key is free.
	broken := errors.New("broken")
	if _, _, err := do("back", nil, func(context.Context, pgx.Tx) error { return broken }); !errors.Is(err, broken) {
		t.Fatalf("Do = %v", err)
	}
	if _, replayed, err := do("back", nil, nothing); err != nil || replayed || effects(t, pool, "back") != 1 {
		t.Fatalf("after a rollback: replayed %v, %v, %d effects", replayed, err, effects(t, pool, "back"))
	}

	// The heartbeat meets the row lock of a transaction that stays open.
	_, _, err := do("slow", &idempotency.Options{Lease: time.Second}, func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Exec(context.WithoutCancel(ctx), `SELECT pg_sleep(1.5)`); err != nil {
			return err
		}
		return context.Cause(ctx)
	})
	if err != nil {
		t.Fatalf("a completed transaction that outlives the lease = %v", err)
	}

	// Taken over: the transaction must not commit.
	_, _, err = do("lost", nil, nothing)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = idempotency.Do(t.Context(), store, key("stolen"), nil, func(ctx context.Context) (string, error) {
		run(t, pool, `UPDATE idempotency_key SET token = 'thief' WHERE id = 'stolen'`)
		return "", pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			if _, err := effect("stolen")(ctx, tx); err != nil {
				return err
			}
			return idempotencypg.CompleteTx(ctx, tx, "mine")
		})
	})
	if !errors.Is(err, idempotency.ErrLeaseLost) || effects(t, pool, "stolen") != 0 {
		t.Fatalf("CompleteTx of a lost claim = %v with %d effects", err, effects(t, pool, "stolen"))
	}

	err = pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error { return idempotencypg.CompleteTx(t.Context(), tx, "") })
	if err == nil || !strings.Contains(err.Error(), "idempotency.Do") {
		t.Fatalf("CompleteTx outside of Do = %v", err)
	}
}

func TestPurge(t *testing.T) {
	pool := ledger(t)
	store := idempotencypg.New(pool)
	for i := range 25 {
		if _, _, err := idempotencypg.DoTx(t.Context(), pool, key(fmt.Sprint(i)), nil, effect("e")); err != nil {
			t.Fatal(err)
		}
	}
	run(t, pool, `UPDATE idempotency_key SET expires_at = now() WHERE id::int < 20`)
	run(t, pool, `UPDATE idempotency_key SET lease_until = now() + interval '1 min' WHERE id = '0'`) // still running
	var mu sync.Mutex
	var wg sync.WaitGroup
	total := 0
	for range 4 {
		wg.Go(func() {
			for {
				n, err := store.Purge(t.Context(), 3)
				if err != nil || n > 3 {
					t.Errorf("Purge = %d, %v", n, err)
				}
				mu.Lock()
				total += n
				mu.Unlock()
				if n == 0 {
					return
				}
			}
		})
	}
	wg.Wait()
	if left := count(t, pool, `SELECT count(*) FROM idempotency_key`); total != 19 || left != 6 {
		t.Fatalf("purged %d, left %d; want 19 and 6", total, left)
	}
}

// An execution of DoTx writes one row version and leaves none dead; one of the
// store leaves one, and its completion touches no index.
func TestWriteCost(t *testing.T) {
	pool := ledger(t)
	store := idempotencypg.New(pool)
	for i := range 50 {
		if _, _, err := idempotencypg.DoTx(t.Context(), pool, key(fmt.Sprint("tx", i)), nil, effect("e")); err != nil {
			t.Fatal(err)
		}
		_, _, err := idempotency.Do(t.Context(), store, key(fmt.Sprint("two", i)), nil, func(context.Context) (int, error) { return i, nil })
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := idempotencypg.DoTx(t.Context(), pool, key(fmt.Sprint("tx", i)), nil, effect("e")); err != nil {
			t.Fatal(err)
		}
	}
	var inserted, updated, hot, deleted int
	for range 200 { // statistics arrive late
		err := pool.QueryRow(t.Context(), `SELECT n_tup_ins, n_tup_upd, n_tup_hot_upd, n_tup_del FROM pg_stat_user_tables
			WHERE relid = 'idempotency_key'::regclass`).Scan(&inserted, &updated, &hot, &deleted)
		if err != nil {
			t.Fatal(err)
		}
		if inserted == 100 && updated == 50 {
			break
		}
		pool.Reset() // a session reports when it ends
		time.Sleep(20 * time.Millisecond)
	}
	if inserted != 100 || updated != 50 || deleted != 0 {
		t.Fatalf("%d inserted, %d updated, %d deleted; want 100, 50, 0", inserted, updated, deleted)
	}
	if hot < 45 {
		t.Errorf("%d of 50 completions left the indexes alone", hot)
	}
}

func TestMigrate(t *testing.T) {
	pool := pgtest.Pool(t)
	_, _, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, effect("k"))
	if err == nil || !strings.Contains(err.Error(), "idempotencypg.Migrate") {
		t.Fatalf("DoTx without the table = %v, want the remedy", err)
	}
	if _, err := idempotencypg.New(pool).Purge(t.Context(), 1); err == nil || !strings.Contains(err.Error(), "idempotencypg.Migrate") {
		t.Fatalf("Purge without the table = %v, want the remedy", err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := idempotencypg.Migrate(t.Context(), pool); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()

	// By hand.
	byHand := pgtest.Pool(t)
	names, err := fs.Glob(idempotencypg.Migrations(), "*.sql")
	if err != nil || len(names) == 0 {
		t.Fatalf("Migrations: %v, %v", names, err)
	}
	for _, name := range names {
		sql, err := fs.ReadFile(idempotencypg.Migrations(), name)
		if err != nil {
			t.Fatal(err)
		}
		run(t, byHand, string(sql))
	}
	if _, _, err := idempotencypg.DoTx(t.Context(), byHand, key("k"), nil, func(context.Context, pgx.Tx) (int, error) { return 1, nil }); err != nil {
		t.Fatal(err)
	}
}
