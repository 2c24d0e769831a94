// Package pgtest gives every test a schema or a database of its own on the
// Postgres server that TEST_POSTGRES_URL names.
//
// Without the variable a test is skipped; with TEST_REQUIRE_BACKENDS=1 it fails.
package pgtest

import (
	"context"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/ids"
)

const minVersion = 150000

// URL returns a connection string whose search_path is a fresh schema.
// The schema is dropped when the test ends.
func URL(tb testing.TB) string {
	tb.Helper()
	server := serverURL(tb)
	schema := "t_" + strings.ReplaceAll(ids.New(), "-", "")
	execSQL(tb, server, "CREATE SCHEMA "+schema)
	tb.Cleanup(func() { execSQL(tb, server, "DROP SCHEMA "+schema+" CASCADE") })
	return withParam(tb, server, "search_path", schema)
}

// Pool returns a pool of at most 40 connections on a fresh schema.
// Pool and schema are removed when the test ends.
func Pool(tb testing.TB) *pgxpool.Pool {
	tb.Helper()
	return Open(tb, URL(tb))
}

// Open returns a pool on dsn that is closed when the test ends.
func Open(tb testing.TB, dsn string) *pgxpool.Pool {
	tb.Helper()
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	cfg.MaxConns = 40
	pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
	if err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	tb.Cleanup(pool.Close)
	return pool
}

// Database creates an empty database and returns its connection string.
// The database is dropped when the test ends.
func Database(tb testing.TB) string {
	tb.Helper()
	server := serverURL(tb)
	name := "t_" + strings.ReplaceAll(ids.New(), "-", "")
	execSQL(tb, server, "CREATE DATABASE "+name)
	tb.Cleanup(func() { execSQL(tb, server, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)") })
	u, err := url.Parse(server)
	if err != nil {
		tb.Fatalf("pgtest: TEST_POSTGRES_URL: %v", err)
	}
	u.Path = "/" + name
	return u.String()
}

func serverURL(tb testing.TB) string {
	tb.Helper()
	dsn := os.Getenv("TEST_POSTGRES_URL")
	if dsn == "" {
		Missing(tb, "TEST_POSTGRES_URL is not set; run the tests with: go run ./examples/testenv -- go test ./...")
	}
	if u, err := url.Parse(dsn); err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" || u.Host == "" {
		tb.Fatal("pgtest: TEST_POSTGRES_URL must be a URL such as postgres://user:password@host:5432/database")
	}
	return dsn
}

// Missing skips a test that lacks what it needs; with TEST_REQUIRE_BACKENDS=1 it
// fails it.
func Missing(tb testing.TB, what string) {
	tb.Helper()
	if os.Getenv("TEST_REQUIRE_BACKENDS") == "1" {
		tb.Fatal("pgtest: " + what)
	}
	tb.Skip("pgtest: " + what)
}

func execSQL(tb testing.TB, dsn, sql string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		tb.Fatalf("pgtest: cannot reach the server that TEST_POSTGRES_URL names: %v\nStart one with: go run ./examples/testenv -- go test ./...", err)
	}
	defer conn.Close(ctx)
	var version int
	if err := conn.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&version); err != nil {
		tb.Fatalf("pgtest: server version: %v", err)
	}
	if version < minVersion {
		tb.Fatalf("pgtest: the server is Postgres %d, ashlar needs %d or newer; point TEST_POSTGRES_URL at a newer server", version/10000, minVersion/10000)
	}
	if _, err := conn.Exec(ctx, sql); err != nil {
		tb.Fatalf("pgtest: %s: %v", sql, err)
	}
}

func withParam(tb testing.TB, dsn, key, value string) string {
	tb.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	q := u.Query()
	q.Set(key, value)
	u.RawQuery = q.Encode()
	return u.String()
}
