package pgtest

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
)

// fakeTB records how a test that uses the package would end.
type fakeTB struct {
	testing.TB
	failed, skipped string
}

func (f *fakeTB) Helper()        {}
func (f *fakeTB) Cleanup(func()) {}

func (f *fakeTB) Fatal(args ...any) {
	f.failed = fmt.Sprint(args...)
	runtime.Goexit()
}

func (f *fakeTB) Fatalf(format string, args ...any) { f.Fatal(fmt.Sprintf(format, args...)) }

func (f *fakeTB) Skip(args ...any) {
	f.skipped = fmt.Sprint(args...)
	runtime.Goexit()
}

// outcome runs what a test would call.
func outcome(t *testing.T, call func(tb testing.TB)) *fakeTB {
	t.Helper()
	f := &fakeTB{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		call(f)
	}()
	<-done
	return f
}

func says(t *testing.T, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%q lacks %q", got, w)
		}
	}
}

// nobody is an address at which no server listens.
func nobody(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestUnset(t *testing.T) {
	t.Setenv("TEST_POSTGRES_URL", "")
	t.Setenv("TEST_REQUIRE_BACKENDS", "")
	says(t, outcome(t, useURL).skipped, "pgtest:", "TEST_POSTGRES_URL is not set", "go run ./examples/testenv -- go test")
	t.Setenv("TEST_REQUIRE_BACKENDS", "1")
	says(t, outcome(t, useURL).failed, "pgtest:", "TEST_POSTGRES_URL is not set", "go run ./examples/testenv -- go test")
}

func useURL(tb testing.TB) { URL(tb) }

func TestUnusableServers(t *testing.T) {
	for _, tt := range []struct {
		name, dsn string
		want      []string
	}{
		{"keywords", "host=localhost user=postgres", []string{"must be a URL such as postgres://"}},
		{"another scheme", "mysql://localhost/db", []string{"must be a URL such as postgres://"}},
		{"garbage", "postgres://a b", []string{"must be a URL such as postgres://"}},
		{"no server", "postgres://postgres@" + nobody(t) + "/postgres", []string{"cannot reach the server that TEST_POSTGRES_URL names", "go run ./examples/testenv"}},
		{"too old", "postgres://postgres@" + old(t) + "/postgres?sslmode=disable", []string{"the server is Postgres 14, ashlar needs 15 or newer", "point TEST_POSTGRES_URL at a newer server"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("TEST_POSTGRES_URL", tt.dsn)
			for _, call := range []func(testing.TB){useURL, func(tb testing.TB) { Database(tb) }, func(tb testing.TB) { Pool(tb) }} {
				says(t, outcome(t, call).failed, append(tt.want, "pgtest:")...)
			}
		})
	}
}

// A password that is a part of the URL does not reach the log.
func TestPasswordIsNotPrinted(t *testing.T) {
	t.Setenv("TEST_POSTGRES_URL", "postgres://postgres:hunter2@"+nobody(t)+"/postgres")
	if f := outcome(t, useURL); f.failed == "" || strings.Contains(f.failed, "hunter2") {
		t.Errorf("it says %q", f.failed)
	}
}

func TestSchemaAndDatabaseAreOwn(t *testing.T) {
	serverURL(t) // skips without a server
	var schemas, databases [2]string
	t.Run("use", func(t *testing.T) {
		for i := range schemas {
			pool := Pool(t)
			// The same name twice: there is nothing shared.
			if _, err := pool.Exec(t.Context(), "CREATE TABLE one (id int)"); err != nil {
				t.Fatal(err)
			}
			if err := pool.QueryRow(t.Context(), "SELECT current_schema()").Scan(&schemas[i]); err != nil {
				t.Fatal(err)
			}
			db := Open(t, Database(t))
			if err := db.QueryRow(t.Context(), "SELECT current_database()").Scan(&databases[i]); err != nil {
				t.Fatal(err)
			}
		}
	})
	if schemas[0] == schemas[1] || databases[0] == databases[1] {
		t.Fatalf("shared: %v %v", schemas, databases)
	}
	conn, err := pgx.Connect(context.Background(), os.Getenv("TEST_POSTGRES_URL"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var left int
	const query = `SELECT (SELECT count(*) FROM pg_namespace WHERE nspname = ANY($1)) + (SELECT count(*) FROM pg_database WHERE datname = ANY($2))`
	if err := conn.QueryRow(t.Context(), query, schemas[:], databases[:]).Scan(&left); err != nil || left != 0 {
		t.Errorf("%d schemas and databases are left behind, %v", left, err)
	}
}

func TestParametersOfTheURLAreKept(t *testing.T) {
	got := withParam(t, "postgres://u:p@h:1/db?sslmode=disable&application_name=x", "search_path", "s")
	u, err := url.Parse(got)
	if err != nil {
		t.Fatal(err)
	}
	if q := u.Query(); q.Get("sslmode") != "disable" || q.Get("application_name") != "x" || q.Get("search_path") != "s" || u.Path != "/db" || u.User.String() != "u:p" {
		t.Errorf("got %s", got)
	}
}

// old answers as Postgres 14 would.
func old(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				answer(pgproto3.NewBackend(conn, conn))
			}()
		}
	}()
	return l.Addr().String()
}

func answer(b *pgproto3.Backend) {
	if _, err := b.ReceiveStartupMessage(); err != nil {
		return
	}
	b.Send(&pgproto3.AuthenticationOk{})
	b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	version := pgproto3.FieldDescription{Name: []byte("current_setting"), DataTypeOID: 23, DataTypeSize: 4, Format: 0}
	for b.Flush() == nil {
		msg, err := b.Receive()
		if err != nil {
			return
		}
		switch msg := msg.(type) {
		case *pgproto3.Parse:
			b.Send(&pgproto3.ParseComplete{})
		case *pgproto3.Describe:
			b.Send(&pgproto3.ParameterDescription{})
			b.Send(&pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{version}})
		case *pgproto3.Bind:
			version.Format = 0
			if len(msg.ResultFormatCodes) > 0 {
				version.Format = msg.ResultFormatCodes[0]
			}
			b.Send(&pgproto3.BindComplete{})
		case *pgproto3.Execute:
			value := []byte("140009")
			if version.Format == 1 {
				value = []byte{0, 2, 0x22, 0xe9} // 140009
			}
			b.Send(&pgproto3.DataRow{Values: [][]byte{value}})
			b.Send(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
		case *pgproto3.Sync:
			b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		}
	}
}
