package lockpg_test

import (
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
	"github.com/ashlar-go/ashlar/lock/locktest"
)

// Every way in which pgx may send statements works, so also those that a
// connection pooler asks for.
func TestExecModes(t *testing.T) {
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			pool := items(t)
			if err := lockpg.Migrate(t.Context(), pool); err != nil {
				t.Fatal(err)
			}
			cfg := pool.Config()
			cfg.ConnConfig.DefaultQueryExecMode = mode
			pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Close()
			useAll(t, pool)
		})
	}
}

// useAll uses every statement of the package.
func useAll(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	store := lockpg.New(pool, nil)
	lease := take(t, store, long, `te'n\ant`, "b")
	request := lock.Request{Keys: lease.Keys(), Owner: lease.Owner(), TTL: long}
	if err := store.Extend(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	waiting := request
	waiting.Owner, waiting.Waiting = "waiting", true
	if _, err := store.Acquire(t.Context(), waiting); err == nil {
		t.Fatal("granted twice")
	}
	tx := begin(t, pool)
	if err := lockpg.Guard(t.Context(), tx, lease); err != nil {
		t.Fatal(err)
	}
	if err := lockpg.Fence(t.Context(), tx, "thing", lease.Token()); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	u := lock.NewUpdater(prices(pool), nil)
	if value, _, err := u.Update(t.Context(), "k", func(n int64) (int64, error) { return n + 1, nil }); err != nil || value != 1 {
		t.Fatalf("Update = %d, %v", value, err)
	}
	if _, err := prices(pool).Store(t.Context(), "k", 7, 1); err == nil {
		t.Fatal("an old version was replaced")
	}
	if _, err := store.Purge(t.Context(), 0, 10); err != nil {
		t.Fatal(err)
	}
}

// Behind PgBouncer in transaction mode nobody is told of keys that become free;
// those who wait poll.
func TestPgBouncer(t *testing.T) {
	direct := pgtest.Open(t, pgtest.Database(t))
	if err := lockpg.Migrate(t.Context(), direct); err != nil {
		t.Fatal(err)
	}
	run(t, direct, `CREATE TABLE item (id text PRIMARY KEY, version bigint NOT NULL DEFAULT 1, name text NOT NULL DEFAULT '', price bigint NOT NULL DEFAULT 0);
		INSERT INTO item (id) VALUES ('k')`)
	via := pgtest.Bounce(t, direct)
	useAll(t, via)
	locktest.TestStore(t, func(t *testing.T) lock.Store {
		run(t, direct, `TRUNCATE lock_lease`)
		return struct{ lock.Store }{lockpg.New(via, nil)} // no Watcher
	})
}
