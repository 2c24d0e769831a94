package idempotencypg_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
)

func key(id string) idempotency.Key {
	return idempotency.Key{Scope: "tenant", ID: id, Fingerprint: []byte("print")}
}

// ledger returns a pool with a table of effects.
func ledger(tb testing.TB) *pgxpool.Pool {
	tb.Helper()
	pool := migrated(tb)
	run(tb, pool, `CREATE TABLE effect (id text NOT NULL)`)
	return pool
}

func run(tb testing.TB, pool *pgxpool.Pool, sql string, args ...any) {
	tb.Helper()
	if _, err := pool.Exec(context.Background(), sql, args...); err != nil {
		tb.Fatalf("%s: %v", sql, err)
	}
}

func count(tb testing.TB, pool *pgxpool.Pool, sql string, args ...any) (n int) {
	tb.Helper()
	if err := pool.QueryRow(context.Background(), sql, args...).Scan(&n); err != nil {
		tb.Fatalf("%s: %v", sql, err)
	}
	return n
}

func effects(tb testing.TB, pool *pgxpool.Pool, id string) int {
	tb.Helper()
	return count(tb, pool, `SELECT count(*) FROM effect WHERE id = $1`, id)
}

// effect is work that adds one row.
func effect(id string) func(context.Context, pgx.Tx) (string, error) {
	return func(ctx context.Context, tx pgx.Tx) (string, error) {
		_, err := tx.Exec(ctx, `INSERT INTO effect (id) VALUES ($1)`, id)
		return "did " + id, err
	}
}

func TestDoTxOnceThenReplays(t *testing.T) {
	pool := ledger(t)
	for i := range 3 {
		got, replayed, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, effect("k"))
		if err != nil || got != "did k" || replayed != (i > 0) {
			t.Fatalf("call %d: %q, %v, %v", i, got, replayed, err)
		}
	}
	if n := effects(t, pool, "k"); n != 1 {
		t.Fatalf("%d effects, want 1", n)
	}
	other := key("k")
	other.Fingerprint = []byte("other")
	if _, _, err := idempotencypg.DoTx(t.Context(), pool, other, nil, effect("k")); !errors.Is(err, idempotency.ErrMismatch) {
		t.Fatalf("another fingerprint = %v, want ErrMismatch", err)
	}
	if _, _, err := idempotencypg.DoTx(t.Context(), pool, idempotency.Key{ID: "k"}, nil, effect("k")); !errors.Is(err, idempotency.ErrInvalid) {
		t.Fatalf("no scope = %v, want ErrInvalid", err)
	}
	// The record is one like any other.
	c, err := idempotencypg.New(pool).Claim(t.Context(), key("k"), idempotency.ClaimRequest{Token: "t", Lease: time.Second, TTL: time.Second})
	if err != nil || !c.Done || string(c.Result) != `"did k"` {
		t.Fatalf("the store's Claim = %+v, %v", c, err)
	}
}

func TestDoTxFailuresLeaveNothing(t *testing.T) {
	pool := ledger(t)
	broken := errors.New("broken")
	fails := map[string]func(ctx context.Context, tx pgx.Tx) (string, error){
		"error": func(context.Context, pgx.Tx) (string, error) { return "", broken },
		"panic": func(context.Context, pgx.Tx) (string, error) { panic(broken) },
		"sql": func(ctx context.Context, tx pgx.Tx) (string, error) {
			_, err := tx.Exec(ctx, `SELECT 1/0`)
			return "", err
		},
		"ignored": func(ctx context.Context, tx pgx.Tx) (string, error) {
			_, _ = tx.Exec(ctx, `SELECT 1/0`)
			return "", nil
		},
		"broken": func(ctx context.Context, tx pgx.Tx) (string, error) { return "", tx.Conn().Close(ctx) },
		"deferred": func(ctx context.Context, tx pgx.Tx) (string, error) {
			_, err := tx.Exec(ctx, `INSERT INTO child (parent) VALUES (1)`) // refused by the COMMIT
			return "", err
		},
		"cancelled": func(ctx context.Context, tx pgx.Tx) (string, error) {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
			defer cancel()
			_, err := tx.Exec(ctx, `SELECT pg_sleep(10)`)
			return "", err
		},
	}
	run(t, pool, `CREATE TABLE parent (id int PRIMARY KEY)`)
	run(t, pool, `CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)`)
	for name, fail := range fails {
		t.Run(name, func(t *testing.T) {
			var got error
			var told bool
			opts := &idempotencypg.TxOptions{Observer: idempotency.Observer{
				Failed: func(_ context.Context, _ idempotency.Key, _ error, released bool) { told = released },
			}}
			func() {
				defer func() {
					if v := recover(); v != nil {
						got = v.(error)
					}
				}()
				_, _, got = idempotencypg.DoTx(t.Context(), pool, key(name), opts, func(ctx context.Context, tx pgx.Tx) (string, error) {
					if _, err := effect(name)(ctx, tx); err != nil {
						return "", err
					}
					return fail(ctx, tx)
				})
			}()
			if got == nil || !told {
				t.Fatalf("DoTx = %v, observer told of the failure: %v", got, told)
			}
			if n := effects(t, pool, name); n != 0 {
				t.Fatalf("%d effects after a failure", n)
			}
			if _, replayed, err := idempotencypg.DoTx(t.Context(), pool, key(name), nil, effect(name)); err != nil || replayed {
				t.Fatalf("DoTx after a failure = replayed %v, %v; want it to run at once", replayed, err)
			}
			if n := effects(t, pool, name); n != 1 {
				t.Fatalf("%d effects, want 1", n)
			}
		})
	}
	if n := count(t, pool, `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()`); n != 0 {
		t.Fatalf("%d advisory locks are left", n)
	}
}

func TestDoTxDuplicates(t *testing.T) {
	pool := ledger(t)
	entered, leave := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	go func() {
		_, _, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, func(ctx context.Context, tx pgx.Tx) (string, error) {
			close(entered)
			<-leave
			return effect("k")(ctx, tx)
		})
		first <- err
	}()
	<-entered
	var refused int
	opts := &idempotencypg.TxOptions{Observer: idempotency.Observer{
		Refused: func(context.Context, idempotency.Key, error) { refused++ },
	}}
	if _, _, err := idempotencypg.DoTx(t.Context(), pool, key("k"), opts, effect("k")); !errors.Is(err, idempotency.ErrInProgress) || refused != 1 {
		t.Fatalf("a duplicate = %v, refused %d; want ErrInProgress", err, refused)
	}
	opts.Wait = time.Millisecond
	if _, _, err := idempotencypg.DoTx(t.Context(), pool, key("k"), opts, effect("k")); !errors.Is(err, idempotency.ErrInProgress) {
		t.Fatalf("a duplicate that waited = %v, want ErrInProgress", err)
	}
	opts.Wait = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := idempotencypg.DoTx(ctx, pool, key("k"), opts, effect("k")); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a duplicate whose context ended = %v", err)
	}
	var wg sync.WaitGroup
	for range 60 { // more than the pool has connections
		wg.Go(func() {
			got, replayed, err := idempotencypg.DoTx(t.Context(), pool, key("k"), opts, effect("k"))
			if err != nil || !replayed || got != "did k" {
				t.Errorf("a duplicate that waited = %q, %v, %v", got, replayed, err)
			}
		})
	}
	if err := pool.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	close(leave)
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if n := effects(t, pool, "k"); n != 1 {
		t.Fatalf("%d effects, want 1", n)
	}
}

// Replays at once never refuse each other.
func TestDoTxConcurrentReplays(t *testing.T) {
	pool := ledger(t)
	if _, _, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, effect("k")); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if _, replayed, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, effect("k")); err != nil || !replayed {
					t.Errorf("DoTx = %v, %v", replayed, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// A key claimed through the store is in progress for DoTx, and taken over when
// the lease is over. If the store claims it while DoTx runs, DoTx gives way.
func TestDoTxBesideStore(t *testing.T) {
	pool := ledger(t)
	store := idempotencypg.New(pool)
	req := idempotency.ClaimRequest{Token: "two-phase", Lease: time.Minute, TTL: time.Hour}
	if _, err := store.Claim(t.Context(), key("k"), req); err != nil {
		t.Fatal(err)
	}
	if _, _, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, effect("k")); !errors.Is(err, idempotency.ErrInProgress) {
		t.Fatalf("DoTx of a key that the store holds = %v", err)
	}
	run(t, pool, `UPDATE idempotency_key SET lease_until = now()`)
	got, replayed, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, effect("k"))
	if err != nil || replayed || got != "did k" {
		t.Fatalf("DoTx after the lease = %q, %v, %v", got, replayed, err)
	}
	if err := store.Complete(t.Context(), key("k"), "two-phase", nil); !errors.Is(err, idempotency.ErrLeaseLost) {
		t.Fatalf("Complete by the claim that was taken over = %v", err)
	}

	_, _, err = idempotencypg.DoTx(t.Context(), pool, key("late"), nil, func(ctx context.Context, tx pgx.Tx) (string, error) {
		if _, err := store.Claim(ctx, key("late"), req); err != nil {
			t.Fatal(err)
		}
		return effect("late")(ctx, tx)
	})
	if !errors.Is(err, idempotency.ErrInProgress) || effects(t, pool, "late") != 0 {
		t.Fatalf("DoTx of a key claimed meanwhile = %v with %d effects", err, effects(t, pool, "late"))
	}

	// The late owner completes while DoTx takes its key over.
	if _, err := store.Claim(t.Context(), key("race"), req); err != nil {
		t.Fatal(err)
	}
	run(t, pool, `UPDATE idempotency_key SET lease_until = now() WHERE id = 'race'`)
	_, _, err = idempotencypg.DoTx(t.Context(), pool, key("race"), nil, func(ctx context.Context, tx pgx.Tx) (string, error) {
		if err := store.Complete(ctx, key("race"), "two-phase", []byte(`"late"`)); err != nil {
			t.Fatal(err)
		}
		return effect("race")(ctx, tx)
	})
	if !errors.Is(err, idempotency.ErrInProgress) || effects(t, pool, "race") != 0 {
		t.Fatalf("DoTx of a key completed meanwhile = %v with %d effects", err, effects(t, pool, "race"))
	}
	if got, replayed, err := idempotencypg.DoTx(t.Context(), pool, key("race"), nil, effect("race")); got != "late" || !replayed || err != nil {
		t.Fatalf("DoTx = %q, %v, %v; want the late owner's result", got, replayed, err)
	}
}

func TestDoTxExpiry(t *testing.T) {
	pool := ledger(t)
	for want := range 2 {
		if _, replayed, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, effect("k")); err != nil || replayed {
			t.Fatalf("DoTx of an expired key = %v, %v", replayed, err)
		}
		if n := effects(t, pool, "k"); n != want+1 {
			t.Fatalf("%d effects, want %d", n, want+1)
		}
		run(t, pool, `UPDATE idempotency_key SET expires_at = now()`)
	}
}

// The work has a whole transaction, savepoints and large objects included, but
// not its end.
func TestDoTxTransaction(t *testing.T) {
	pool := ledger(t)
	var kept pgx.Tx
	_, _, err := idempotencypg.DoTx(t.Context(), pool, key("k"), nil, func(ctx context.Context, tx pgx.Tx) (string, error) {
		kept = tx
		if tx.Commit(ctx) == nil || tx.Rollback(ctx) == nil {
			return "", errors.New("the work could end the transaction")
		}
		for _, fail := range []bool{true, false, true} {
			err := pgx.BeginFunc(ctx, tx, func(sub pgx.Tx) error {
				if _, err := effect("k")(ctx, sub); err != nil {
					return err
				}
				if fail {
					_, err := sub.Exec(ctx, `SELECT 1/0`)
					return err
				}
				return nil
			})
			if (err != nil) != fail {
				return "", fmt.Errorf("savepoint: %w", err)
			}
		}
		if _, err := tx.CopyFrom(ctx, pgx.Identifier{"effect"}, []string{"id"}, pgx.CopyFromRows([][]any{{"copied"}})); err != nil {
			return "", err
		}
		var batch pgx.Batch
		batch.Queue(`INSERT INTO effect (id) VALUES ('batched')`)
		if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
			return "", err
		}
		if _, err := tx.Prepare(ctx, "one", `SELECT 1`); err != nil {
			return "", err
		}
		rows, err := tx.Query(ctx, "one")
		if err != nil {
			return "", err
		}
		if _, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[int]); err != nil {
			return "", err
		}
		objects := tx.LargeObjects()
		oid, err := objects.Create(ctx, 0)
		if err != nil {
			return "", err
		}
		var id string
		if err := tx.QueryRow(ctx, `SELECT id FROM effect WHERE id = 'copied'`).Scan(&id); err != nil {
			return "", err
		}
		return id, objects.Unlink(ctx, oid)
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := effects(t, pool, "k"); n != 1 {
		t.Fatalf("%d effects of the three savepoints, want 1", n)
	}
	if n := count(t, pool, `SELECT count(*) FROM effect`); n != 3 {
		t.Fatalf("%d effects, want 3", n)
	}

	_, errExec := kept.Exec(t.Context(), `SELECT 1`)
	_, errQuery := kept.Query(t.Context(), `SELECT 1`)
	_, errBegin := kept.Begin(t.Context())
	_, errPrepare := kept.Prepare(t.Context(), "two", `SELECT 1`)
	_, errCopy := kept.CopyFrom(t.Context(), pgx.Identifier{"effect"}, nil, nil)
	_, errBatch := kept.SendBatch(t.Context(), new(pgx.Batch)).Exec()
	for i, err := range []error{errExec, errQuery, errBegin, errPrepare, errCopy, errBatch, kept.QueryRow(t.Context(), `SELECT 1`).Scan()} {
		if !errors.Is(err, pgx.ErrTxClosed) {
			t.Errorf("use %d of the transaction after its end = %v, want ErrTxClosed", i, err)
		}
	}
}

// The work is told apart from the claim: its own ErrInProgress, of another key,
// is not waited for.
func TestDoTxPassesErrorsOn(t *testing.T) {
	pool := ledger(t)
	ran := 0
	_, _, err := idempotencypg.DoTx(t.Context(), pool, key("k"), &idempotencypg.TxOptions{Wait: time.Minute}, func(context.Context, pgx.Tx) (string, error) {
		ran++
		return "", fmt.Errorf("a call downstream: %w", idempotency.ErrInProgress)
	})
	if !errors.Is(err, idempotency.ErrInProgress) || ran != 1 {
		t.Fatalf("DoTx = %v after %d runs", err, ran)
	}
	var pgErr *pgconn.PgError
	_, _, err = idempotencypg.DoTx(t.Context(), pool, key("k"), nil, func(ctx context.Context, tx pgx.Tx) (string, error) {
		_, err := tx.Exec(ctx, `SELECT 1/0`)
		return "", err
	})
	if !errors.As(err, &pgErr) || pgErr.Code != "22012" {
		t.Fatalf("DoTx = %v, want division_by_zero", err)
	}
}
