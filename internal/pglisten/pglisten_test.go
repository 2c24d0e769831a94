package pglisten_test

import (
	"context"
	"io"
	"log/slog"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/internal/pglisten"
	"github.com/ashlar-go/ashlar/internal/pgtest"
)

// It is woken when it listens, by a notification, and again after its connection
// was cut; it ends with its context.
func TestListen(t *testing.T) {
	dsn := pgtest.URL(t)
	pool := pgtest.Open(t, dsn)
	woken, dialed := make(chan struct{}, 100), make(chan uint32, 100)
	dial := func(ctx context.Context) (*pgx.Conn, error) {
		conn, err := pgx.Connect(ctx, dsn)
		if err == nil {
			dialed <- conn.PgConn().PID()
		}
		return conn, err
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() {
		log := slog.New(slog.NewTextHandler(io.Discard, nil))
		ended <- pglisten.Listen(ctx, dial, "pglisten_test", func() { woken <- struct{}{} }, log, "not listening")
	}()
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	pid := <-dialed
	<-woken
	exec("NOTIFY pglisten_test")
	<-woken
	exec("SELECT pg_terminate_backend($1::int)", pid)
	if again := <-dialed; again == pid {
		t.Errorf("the connection %d was not replaced", pid)
	}
	<-woken
	exec("NOTIFY pglisten_test")
	<-woken
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Listen = %v, want nil", err)
	}
}
