package pgtest

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	osexec "os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Bounce runs PgBouncer in transaction mode, with three connections to the
// server of direct, and returns a pool on it. It is [Missing] where it is not
// installed.
func Bounce(tb testing.TB, direct *pgxpool.Pool) *pgxpool.Pool {
	tb.Helper()
	bin, err := osexec.LookPath("pgbouncer")
	if err != nil {
		Missing(tb, "pgbouncer is not installed")
	}
	cfg := direct.Config().ConnConfig
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	dir, err := os.MkdirTemp("", "pgbouncer-") // not t.TempDir: another user must reach it
	if err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	ini := filepath.Join(dir, "pgbouncer.ini")
	target := fmt.Sprintf("host=%s port=%d dbname=%s user=%s", cfg.Host, cfg.Port, cfg.Database, cfg.User)
	if cfg.Password != "" {
		target += " password=" + cfg.Password
	}
	config := fmt.Sprintf("[databases]\n%s = %s\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port=%d\n"+
		"auth_type=any\npool_mode=transaction\ndefault_pool_size=3\nunix_socket_dir=\nignore_startup_parameters=extra_float_digits\n",
		cfg.Database, target, port)
	if err := os.WriteFile(ini, []byte(config), 0o644); err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	args := []string{ini}
	if os.Geteuid() == 0 { // it refuses to run as root
		args = append([]string{"-u", "nobody"}, args...)
	}
	cmd := osexec.Command(bin, args...)
	out := &syncBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	tb.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	u := url.URL{Scheme: "postgres", User: url.User(cfg.User), Host: fmt.Sprintf("127.0.0.1:%d", port), Path: "/" + cfg.Database}
	// Transaction mode knows no prepared statements of a session.
	u.RawQuery = "sslmode=disable&default_query_exec_mode=exec"
	pool := Open(tb, u.String())
	for range 3000 {
		if pool.Ping(context.Background()) == nil {
			return pool
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Fatalf("pgtest: pgbouncer: %s", out)
	return pool
}

type syncBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b = append(s.b, p...)
	return len(p), nil
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.b)
}
