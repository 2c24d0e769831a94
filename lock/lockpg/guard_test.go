package lockpg_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
)

type ctx = context.Context

func sqlState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// waitBlocked waits until a statement of another session waits for a lock.
func waitBlocked(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	eventually(t, "a session that waits", func() bool {
		var n int
		err := pool.QueryRow(t.Context(), `SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
			WHERE NOT l.granted AND a.datname = current_database() AND a.query NOT LIKE '%pg_stat_activity%'`).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n > 0
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("still waiting for %s after 30 s", what)
}

const long = time.Minute

func take(t *testing.T, store lock.Store, ttl time.Duration, keys ...string) *lock.Lease {
	t.Helper()
	lease, err := lock.New(store, &lock.Options{TTL: ttl}).Lock(t.Context(), keys...)
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

func begin(t *testing.T, pool *pgxpool.Pool) pgx.Tx {
	t.Helper()
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback(context.Background()) })
	return tx
}

// While a guarded transaction is open, the lease can be extended and released,
// but not pass on.
func TestGuardKeepsTheKey(t *testing.T) {
	pool := migrated(t)
	store := lockpg.New(pool, nil)
	lease := take(t, store, long, "a", "b")
	tx := begin(t, pool)
	if err := lockpg.Guard(t.Context(), tx, lease); err != nil {
		t.Fatal(err)
	}
	again := begin(t, pool)
	if err := lockpg.Guard(t.Context(), again, lease); err != nil {
		t.Fatalf("a second guarded transaction of the lease: %v", err)
	}
	if err := again.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	own := lock.Request{Keys: lease.Keys(), Owner: lease.Owner(), TTL: long}
	if err := store.Extend(t.Context(), own); err != nil {
		t.Fatalf("Extend during a guarded transaction = %v", err)
	}
	own.TTL = time.Millisecond
	if err := store.Extend(t.Context(), own); err != nil {
		t.Fatal(err)
	}
	other := lock.Request{Keys: []string{"b"}, Owner: "other", TTL: long}
	refused := func(when string) {
		t.Helper()
		for range 5 {
			time.Sleep(2 * time.Millisecond) // the lease ends
			var held *lock.HeldError
			if _, err := store.Acquire(t.Context(), other); !errors.As(err, &held) || held.Key != "b" || held.RetryAfter <= 0 {
				t.Fatalf("Acquire %s = %v", when, err)
			}
		}
	}
	refused("of a lease that has ended, but is guarded")
	if err := store.Release(t.Context(), own); err != nil {
		t.Fatalf("Release during a guarded transaction = %v", err)
	}
	refused("of a lease that was released, but is guarded")
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if token, err := store.Acquire(t.Context(), other); err != nil || token <= lease.Token() {
		t.Fatalf("Acquire after the guarded transaction = %d, %v", token, err)
	}
	if err := lockpg.Guard(t.Context(), begin(t, pool), lease); !errors.Is(err, lock.ErrLost) {
		t.Fatalf("Guard of a lease that has passed on = %v, want ErrLost", err)
	}
}

func TestGuardRefuses(t *testing.T) {
	pool := migrated(t)
	store := lockpg.New(pool, nil)
	t.Run("released", func(t *testing.T) {
		lease := take(t, store, long, "released")
		if err := lease.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := lockpg.Guard(t.Context(), begin(t, pool), lease); !errors.Is(err, lock.ErrLost) {
			t.Fatal(err)
		}
	})
	t.Run("ended by the database's clock", func(t *testing.T) {
		lease := take(t, store, long, "ended")
		run(t, pool, `UPDATE lock_lease SET expires_at = clock_timestamp() WHERE key = 'ended'`)
		if err := lockpg.Guard(t.Context(), begin(t, pool), lease); !errors.Is(err, lock.ErrLost) {
			t.Fatal(err)
		}
	})
	t.Run("taken over", func(t *testing.T) {
		lease := take(t, store, long, "over", "still")
		run(t, pool, `UPDATE lock_lease SET expires_at = clock_timestamp() WHERE key = 'over'`)
		take(t, store, long, "over")
		if err := lockpg.Guard(t.Context(), begin(t, pool), lease); !errors.Is(err, lock.ErrLost) {
			t.Fatal(err)
		}
	})
	t.Run("of another store", func(t *testing.T) {
		lease := take(t, new(lock.MemoryStore), long, "elsewhere")
		if err := lockpg.Guard(t.Context(), begin(t, pool), lease); !errors.Is(err, lock.ErrLost) {
			t.Fatal(err)
		}
	})
	t.Run("while another takes over", func(t *testing.T) {
		lease := take(t, store, long, "race")
		run(t, pool, `UPDATE lock_lease SET expires_at = clock_timestamp() + interval '1 h' WHERE key = 'race'`)
		taker := begin(t, pool)
		const takeOver = `UPDATE lock_lease SET owner = 'other' WHERE key = (SELECT key FROM lock_lease WHERE key = 'race' FOR UPDATE)`
		if _, err := taker.Exec(t.Context(), takeOver); err != nil {
			t.Fatal(err)
		}
		guarded := make(chan error)
		tx := begin(t, pool)
		go func() { guarded <- lockpg.Guard(t.Context(), tx, lease) }()
		waitBlocked(t, pool)
		if err := taker.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-guarded; !errors.Is(err, lock.ErrLost) {
			t.Fatalf("Guard = %v, want ErrLost", err)
		}
	})
	t.Run("after an extension in another snapshot", func(t *testing.T) {
		lease := take(t, store, long, "snapshot")
		tx, err := pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(t.Context())
		if _, err := tx.Exec(t.Context(), `SELECT FROM lock_lease`); err != nil {
			t.Fatal(err)
		}
		run(t, pool, `UPDATE lock_lease SET expires_at = clock_timestamp() WHERE key = 'snapshot'`)
		take(t, store, long, "snapshot")
		if err := lockpg.Guard(t.Context(), tx, lease); err == nil {
			t.Fatal("a snapshot from before the takeover was taken for the present")
		}
	})
}

func TestFence(t *testing.T) {
	pool := migrated(t)
	fence := func(token int64) error {
		return pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error { return lockpg.Fence(t.Context(), tx, "stock", token) })
	}
	for _, step := range []struct {
		token   int64
		refused bool
	}{{5, false}, {5, false}, {7, false}, {5, true}, {6, true}, {7, false}, {8, false}} {
		if err := fence(step.token); errors.Is(err, lock.ErrLost) != step.refused || err != nil && !step.refused {
			t.Fatalf("Fence(%d) = %v, want it refused: %v", step.token, err, step.refused)
		}
	}
	// A later token that is not committed yet is waited for, and counts if it is.
	for _, commits := range []bool{true, false} {
		last := int64(10)
		if !commits {
			last = 20
		}
		tx := begin(t, pool)
		if err := lockpg.Fence(t.Context(), tx, "stock", last); err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- fence(last - 1) }()
		waitBlocked(t, pool)
		end := tx.Rollback
		if commits {
			end = tx.Commit
		}
		if err := end(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-done; errors.Is(err, lock.ErrLost) != commits {
			t.Fatalf("Fence = %v after a later token, committed: %v", err, commits)
		}
	}
}

func TestNotMigrated(t *testing.T) {
	pool := items(t)
	store := lockpg.New(pool, nil)
	_, err := lock.New(store, nil).Lock(t.Context(), "k")
	if sqlState(err) != "42P01" {
		t.Fatalf("Lock without tables = %v, want the driver's error to be reachable", err)
	}
}

// Tokens rise whatever is purged, and in whatever order rows come and go.
func TestPurge(t *testing.T) {
	pool := migrated(t)
	store := lockpg.New(pool, nil)
	held := take(t, store, long, "held")
	var last atomic.Int64
	for i := range 5 {
		lease := take(t, store, long, "k")
		if lease.Token() <= last.Swap(lease.Token()) {
			t.Fatalf("token %d after a purge", lease.Token())
		}
		if err := lease.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n, err := store.Purge(t.Context(), 0, 10); err != nil || n != 0 {
			t.Fatalf("Purge of what was just used = %d, %v", n, err)
		}
		run(t, pool, `UPDATE lock_lease SET used_at = now() - interval '1 h'`)
		if n, err := store.Purge(t.Context(), 0, 10); err != nil || n != 1 {
			t.Fatalf("round %d: Purge = %d, %v; want 1", i, n, err)
		}
	}
	if err := lockpg.Guard(t.Context(), begin(t, pool), held); err != nil {
		t.Fatalf("a held key was purged: %v", err)
	}
}
