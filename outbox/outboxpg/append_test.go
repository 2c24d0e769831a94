package outboxpg_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
	"github.com/ashlar-go/ashlar/outbox/outboxtest"
)

// drain runs a relay until n messages are delivered.
func drain(t *testing.T, pool *pgxpool.Pool, n int) []outbox.Message {
	t.Helper()
	var r outboxtest.Recorder
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- outbox.NewRelay(outboxpg.New(pool, nil), &r, nil).Run(ctx) }()
	for range 3000 {
		if len(r.Messages()) >= n {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := len(r.Messages()); got != n {
		t.Fatalf("%d messages delivered, want %d", got, n)
	}
	return r.Messages()
}

func commit(t *testing.T, pool *pgxpool.Pool, msgs ...outbox.Message) {
	t.Helper()
	err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error { return outboxpg.Append(t.Context(), tx, msgs...) })
	if err != nil {
		t.Fatal(err)
	}
}

func TestStatementForDatabaseSQL(t *testing.T) {
	pool := migrated(t)
	db := stdlib.OpenDBFromPool(pool)
	defer db.Close()
	write := func(tx *sql.Tx, m outbox.Message) {
		t.Helper()
		query, args, err := outboxpg.Statement(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.ExecContext(t.Context(), query, args...); err != nil {
			t.Fatal(err)
		}
	}
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	write(tx, outbox.Message{ID: "1", Topic: "t", Key: "k", Headers: map[string]string{"a": "b"}})
	write(tx, outbox.Message{ID: "2", Topic: "t", Key: "k", Payload: []byte{0}})
	write(tx, outbox.Message{ID: "3", Topic: "t", Key: "k", Delay: time.Millisecond})
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	msgs := drain(t, pool, 3)
	if msgs[0].ID != "1" || msgs[0].Headers["a"] != "b" || msgs[1].ID != "2" || msgs[2].ID != "3" {
		t.Errorf("delivered %v", msgs)
	}
	if _, _, err := outboxpg.Statement(outbox.Message{}); !errors.Is(err, outbox.ErrInvalid) {
		t.Errorf("Statement of an invalid message = %v, want ErrInvalid", err)
	}
}

func TestWriterInjects(t *testing.T) {
	pool := migrated(t)
	w := &outboxpg.Writer{Inject: func(context.Context) map[string]string {
		return map[string]string{"traceparent": "00-1", "own": "injected"}
	}}
	err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
		return w.Append(t.Context(), tx, outbox.Message{Topic: "t", Headers: map[string]string{"own": "mine"}})
	})
	if err != nil {
		t.Fatal(err)
	}
	h := drain(t, pool, 1)[0].Headers
	if h["traceparent"] != "00-1" || h["own"] != "mine" {
		t.Errorf("headers = %v, want the injected one, and the message's own to win", h)
	}
}

func TestMigrate(t *testing.T) {
	pool := pgtest.Pool(t)
	errs := make(chan error, 8)
	for range cap(errs) {
		go func() { errs <- outboxpg.Migrate(context.Background(), pool) }()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	names, err := fs.Glob(outboxpg.Migrations(), "*.sql")
	if err != nil || len(names) == 0 {
		t.Errorf("Migrations holds %v, %v", names, err)
	}
}

func TestMissingTables(t *testing.T) {
	pool := pgtest.Pool(t)
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	err = outboxpg.Append(t.Context(), tx, outbox.Message{Topic: "t"})
	var pgErr *pgconn.PgError
	if !errors.Is(err, outbox.ErrNotMigrated) || !errors.As(err, &pgErr) || !strings.Contains(err.Error(), "Migrate") {
		t.Errorf("Append without tables = %v, want ErrNotMigrated, the driver's error and the remedy", err)
	}
	if err := outbox.NewRelay(outboxpg.New(pool, nil), &outboxtest.Recorder{}, nil).Run(t.Context()); !errors.Is(err, outbox.ErrNotMigrated) {
		t.Errorf("Run without tables = %v, want ErrNotMigrated", err)
	}
}

// A prepared transaction has committed nothing and may yet: it must hold its
// lane like any other.
func TestPreparedTransaction(t *testing.T) {
	pool := migrated(t)
	ctx := t.Context()
	var allowed int
	if err := pool.QueryRow(ctx, `SELECT setting::int FROM pg_settings WHERE name = 'max_prepared_transactions'`).Scan(&allowed); err != nil || allowed == 0 {
		pgtest.Missing(t, fmt.Sprintf("the server has max_prepared_transactions = 0 (%v)", err))
	}
	s := outboxpg.New(pool, nil)
	tx, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := outboxpg.Append(ctx, tx, outbox.Message{ID: "1", Topic: "t", Key: "k"}); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("outbox-%d", time.Now().UnixNano())
	if _, err := tx.Exec(ctx, `PREPARE TRANSACTION '`+name+`'`); err != nil {
		t.Fatal(err)
	}
	_ = tx.Rollback(ctx) // there is nothing left to roll back
	defer func() { _, _ = pool.Exec(context.Background(), `ROLLBACK PREPARED '`+name+`'`) }()
	commit(t, pool, outbox.Message{ID: "2", Topic: "t", Key: "k"})
	from := make([]outbox.Position, outbox.Lanes)
	for n := range from {
		from[n].Lane = n
	}
	for range 3 {
		if recs, err := s.Fetch(ctx, from, 10); err != nil || len(recs) != 0 {
			t.Fatalf("fetched %d records (%v) past a prepared transaction", len(recs), err)
		}
	}
	if _, err := pool.Exec(ctx, `COMMIT PREPARED '`+name+`'`); err != nil {
		t.Fatal(err)
	}
	if msgs := drain(t, pool, 2); msgs[0].ID != "1" || msgs[1].ID != "2" {
		t.Errorf("delivered %v, want 1 and 2", msgs)
	}
}

// A transaction that wrote nothing here holds nothing up, wherever it is.
func TestUnrelatedTransactionDoesNotStall(t *testing.T) {
	pool := migrated(t)
	other := pgtest.Open(t, pgtest.Database(t))
	for _, db := range []*pgxpool.Pool{pool, other} {
		if _, err := db.Exec(t.Context(), `CREATE TABLE unrelated (n int)`); err != nil {
			t.Fatal(err)
		}
		tx, err := db.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = tx.Rollback(context.Background()) }()
		if _, err := tx.Exec(t.Context(), `INSERT INTO unrelated VALUES (1)`); err != nil {
			t.Fatal(err)
		}
	}
	aborted, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := outboxpg.Append(t.Context(), aborted, outbox.Message{Topic: "t", Key: "k"}); err != nil {
		t.Fatal(err)
	}
	if err := aborted.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	commit(t, pool, outbox.Message{ID: "1", Topic: "t", Key: "k"})
	drain(t, pool, 1)
}

// pgBin returns a client program that is as new as the server, or skips.
func pgBin(t *testing.T, pool *pgxpool.Pool, name string) string {
	t.Helper()
	var major int
	if err := pool.QueryRow(t.Context(), `SELECT current_setting('server_version_num')::int / 10000`).Scan(&major); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/usr/lib/postgresql/%d/bin/%s", major, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	path, err := exec.LookPath(name)
	if err == nil {
		out, verr := exec.Command(path, "--version").Output()
		if verr == nil && strings.Contains(string(out), fmt.Sprintf(") %d.", major)) {
			return path
		}
	}
	pgtest.Missing(t, fmt.Sprintf("no %s of version %d is installed", name, major))
	return ""
}

// What was not delivered before a dump is delivered after the restore, in order
// and without what was delivered before.
func TestDumpAndRestore(t *testing.T) {
	from := pgtest.Open(t, pgtest.Database(t))
	dump := pgBin(t, from, "pg_dump")
	if err := outboxpg.Migrate(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	var old, fresh []outbox.Message
	for i := range 50 {
		old = append(old, outbox.Message{ID: fmt.Sprint("old", i), Topic: "t", Key: fmt.Sprint(i % 5)})
		fresh = append(fresh, outbox.Message{ID: fmt.Sprint("new", i), Topic: "t", Key: fmt.Sprint(i % 5)})
	}
	commit(t, from, old...)
	drain(t, from, len(old))
	commit(t, from, fresh...)

	file := filepath.Join(t.TempDir(), "dump.sql")
	if out, err := exec.Command(dump, "--no-owner", "-f", file, from.Config().ConnString()).CombinedOutput(); err != nil {
		t.Fatalf("pg_dump: %v\n%s", err, out)
	}
	to := pgtest.Database(t)
	psql := pgBin(t, from, "psql")
	if out, err := exec.Command(psql, "-q", "-v", "ON_ERROR_STOP=1", "-f", file, to).CombinedOutput(); err != nil {
		t.Fatalf("psql: %v\n%s", err, out)
	}
	restored := pgtest.Open(t, to)
	commit(t, restored, outbox.Message{ID: "last", Topic: "t", Key: "0"})
	seen := make(map[string]int)
	for _, m := range drain(t, restored, len(fresh)+1) {
		seen[m.Key]++
		if want := fmt.Sprint("new", (seen[m.Key]-1)*5+int(m.Key[0]-'0')); m.ID != want && m.ID != "last" {
			t.Errorf("key %s: delivered %s, want %s", m.Key, m.ID, want)
		}
	}
}
