package schedulepg_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/schedulepg"
	"github.com/ashlar-go/ashlar/schedule/scheduletest"
)

func run(t *testing.T, pool *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

func count(t *testing.T, pool *pgxpool.Pool, sql string, args ...any) (n int) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), sql, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// Every way in which pgx may send statements works, so also those that a
// connection pooler asks for.
func TestExecModes(t *testing.T) {
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		t.Run(mode.String(), func(t *testing.T) {
			t.Parallel()
			scheduletest.TestStore(t, func(t *testing.T) scheduletest.Store {
				cfg := migrated(t).Config()
				cfg.ConnConfig.DefaultQueryExecMode = mode
				pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(pool.Close)
				return schedulepg.New(pool)
			})
		})
	}
}

// PgBouncer in transaction mode will do.
func TestPgBouncer(t *testing.T) {
	direct := pgtest.Open(t, pgtest.Database(t))
	if err := schedulepg.Migrate(t.Context(), direct); err != nil {
		t.Fatal(err)
	}
	via := pgtest.Bounce(t, direct)
	scheduletest.TestStore(t, func(t *testing.T) scheduletest.Store {
		run(t, direct, `TRUNCATE schedule_run, schedule_definition`)
		return schedulepg.New(via)
	})
}

// The clock that decides is the database's: all is as it should be when it is
// wrong, and so when those of the instances are. now() is one of this test's.
func TestWrongClock(t *testing.T) {
	for _, skew := range []string{"5 s", "-5 s"} {
		t.Run(skew, func(t *testing.T) {
			t.Parallel()
			scheduletest.TestStore(t, func(t *testing.T) scheduletest.Store {
				u, err := url.Parse(pgtest.URL(t))
				if err != nil {
					t.Fatal(err)
				}
				q := u.Query()
				q.Set("search_path", q.Get("search_path")+",pg_catalog") // what is named first is found first
				u.RawQuery = q.Encode()
				pool := pgtest.Open(t, u.String())
				run(t, pool, fmt.Sprintf(`CREATE FUNCTION now() RETURNS timestamptz LANGUAGE sql STABLE AS $$ SELECT pg_catalog.now() + interval '%s' $$`, skew))
				if err := schedulepg.Migrate(t.Context(), pool); err != nil {
					t.Fatal(err)
				}
				return schedulepg.New(pool)
			})
		})
	}
}

func TestNotMigrated(t *testing.T) {
	store := schedulepg.New(pgtest.Pool(t))
	r := schedule.New(store, nil)
	r.Handle("n", func(context.Context, schedule.Run) error { return nil })
	if err := r.Run(t.Context()); !errors.Is(err, schedule.ErrNotMigrated) {
		t.Errorf("Run without tables = %v", err)
	}
	if _, err := store.Define(t.Context(), schedule.Definition{Name: "n", Spec: "@daily"}); !errors.Is(err, schedule.ErrNotMigrated) {
		t.Errorf("Define without tables = %v", err)
	}
}

func TestMigrateTwice(t *testing.T) {
	pool := migrated(t)
	if err := schedulepg.Migrate(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	if n := count(t, pool, `SELECT count(*) FROM schedule_migration`); n != 1 {
		t.Errorf("%d migrations are listed", n)
	}
}

// A schedule goes on after dump and restore, with its next tick and its history.
func TestDumpAndRestore(t *testing.T) {
	dump, err := exec.LookPath("pg_dump")
	if err != nil {
		pgtest.Missing(t, "pg_dump is not installed")
	}
	dsn := pgtest.Database(t)
	from := pgtest.Open(t, dsn)
	if err := schedulepg.Migrate(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	store := schedulepg.New(from)
	for _, name := range []string{"ticks", "ended"} {
		if _, err := store.Define(t.Context(), schedule.Definition{Name: name, Spec: "every 1h", Jitter: time.Minute}); err != nil {
			t.Fatal(err)
		}
	}
	run(t, from, `UPDATE schedule_definition SET next_due = 'infinity' WHERE name = 'ended'`)
	if _, err := store.Trigger(t.Context(), schedule.Trigger{Name: "ticks", Key: "k", Payload: []byte("\x00")}); err != nil {
		t.Fatal(err)
	}
	file, to := filepath.Join(t.TempDir(), "dump"), pgtest.Database(t)
	for _, cmd := range [][]string{{dump, "--no-owner", "-f", file, dsn}, {"psql", "-q", "-v", "ON_ERROR_STOP=1", "-f", file, to}} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			pgtest.Missing(t, fmt.Sprintf("%s of this version: %v\n%s", cmd[0], err, out))
		}
	}
	restored := schedulepg.New(pgtest.Open(t, to))
	claim, err := restored.Claim(t.Context(), schedule.ClaimRequest{Instance: "a", Handlers: []string{"ticks", "ended"}, Slots: 5, PerSchedule: 5, Lease: time.Minute, Ahead: time.Hour})
	if err != nil || len(claim.Runs) != 1 || string(claim.Runs[0].Payload) != "\x00" || len(claim.Plans) != 1 || claim.Plans[0].Jitter != time.Minute {
		t.Errorf("the claim of what was restored is %+v, %v", claim, err)
	}
}

// Runs of twenty minutes of seconds, pruned as they come, leave the tables as small as
// they were.
func TestBloat(t *testing.T) {
	pool := migrated(t)
	store := schedulepg.New(pool)
	if _, err := store.Define(t.Context(), schedule.Definition{Name: "n", Spec: "every 1s"}); err != nil {
		t.Fatal(err)
	}
	req := schedule.ClaimRequest{Instance: "a", Handlers: []string{"n"}, Slots: 5, PerSchedule: 5, Lease: time.Minute, Ahead: 1e6 * time.Hour}
	claim, err := store.Claim(t.Context(), req)
	if err != nil || len(claim.Plans) != 1 {
		t.Fatalf("%+v, %v", claim, err)
	}
	tick := claim.Now.Add(-2 * time.Hour).Truncate(time.Second)
	ids := func(i int) string { return fmt.Sprintf("00000000-0000-7000-8000-%012d", i) }
	p := claim.Plans[0]
	for i := range 1200 {
		tick = tick.Add(time.Second)
		next := tick.Add(time.Second)
		req.Decisions = []schedule.Decision{{
			Name: "n", Version: p.Version, From: p.Next, Next: next, NextDue: next, Ticks: []schedule.Tick{{ID: ids(i), At: tick, Due: tick}},
		}}
		if claim, err = store.Claim(t.Context(), req); err != nil || len(claim.Runs) != 1 {
			t.Fatalf("tick %d: %+v, %v", i, claim, err)
		}
		p.Next = next
		ref := schedule.Ref{ID: claim.Runs[0].ID, Attempt: 1}
		for range 3 {
			if kept, _, err := store.Extend(t.Context(), []schedule.Ref{ref}, time.Minute); err != nil || len(kept) != 1 {
				t.Fatalf("Extend = %v, %v", kept, err)
			}
		}
		if _, err := store.Finish(t.Context(), ref, schedule.Outcome{State: schedule.Done}); err != nil {
			t.Fatal(err)
		}
		if i%100 == 99 {
			if _, err := store.Prune(t.Context(), 0, 1000); err != nil {
				t.Fatal(err)
			}
			run(t, pool, `VACUUM schedule_run, schedule_definition`)
		}
	}
	if n := count(t, pool, `SELECT count(*) FROM schedule_run`); n != 1 {
		t.Errorf("%d rows are left", n)
	}
	if size := count(t, pool, `SELECT pg_total_relation_size('schedule_run') + pg_total_relation_size('schedule_definition')`); size > 1<<20 {
		t.Errorf("the tables have %d bytes", size)
	}
}

func TestListen(t *testing.T) {
	pool := migrated(t)
	store := schedulepg.New(pool)
	woken := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	dial := func(ctx context.Context) (*pgx.Conn, error) { return pgx.Connect(ctx, pool.Config().ConnString()) }
	go func() { ended <- schedulepg.Listen(ctx, dial, func() { woken <- struct{}{} }, nil) }()
	<-woken
	d := schedule.Definition{Name: "n", Spec: "@daily"}
	for what, f := range map[string]func() error{
		"Trigger": func() error { _, err := store.Trigger(t.Context(), schedule.Trigger{Name: "n"}); return err },
		"Resume":  func() error { return store.Resume(t.Context(), "n") },
		"Define":  func() error { d.Payload = []byte("new"); _, err := store.Define(t.Context(), d); return err },
	} {
		if _, err := store.Define(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		<-woken
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Listen = %v", err)
	}
}
