package outboxpg_test

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// Writers may go through PgBouncer in transaction mode, where each of their
// transactions runs on another connection of the server.
func TestPgBouncer(t *testing.T) {
	bin, err := exec.LookPath("pgbouncer")
	if err != nil {
		pgtest.Missing(t, "pgbouncer is not installed")
	}
	direct := pgtest.Open(t, pgtest.Database(t))
	if err := outboxpg.Migrate(t.Context(), direct); err != nil {
		t.Fatal(err)
	}
	via := bounce(t, bin, direct)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 20 {
				err := pgx.BeginFunc(t.Context(), via, func(tx pgx.Tx) error {
					return outboxpg.Append(t.Context(), tx, outbox.Message{ID: fmt.Sprintf("%d-%02d", w, i), Topic: "t", Key: fmt.Sprint(w)})
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	last := make(map[string]string)
	for _, m := range drain(t, direct, 160) {
		if m.ID <= last[m.Key] {
			t.Errorf("key %s: %s after %s", m.Key, m.ID, last[m.Key])
		}
		last[m.Key] = m.ID
	}
}

// bounce runs PgBouncer with three server connections and returns a pool on it.
func bounce(t *testing.T, bin string, direct *pgxpool.Pool) *pgxpool.Pool {
	t.Helper()
	cfg := direct.Config().ConnConfig
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	dir, err := os.MkdirTemp("", "pgbouncer-") // not t.TempDir: another user must reach it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ini := filepath.Join(dir, "pgbouncer.ini")
	target := fmt.Sprintf("host=%s port=%d dbname=%s user=%s", cfg.Host, cfg.Port, cfg.Database, cfg.User)
	if cfg.Password != "" {
		target += " password=" + cfg.Password
	}
	config := fmt.Sprintf("[databases]\n%s = %s\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port=%d\n"+
		"auth_type=any\npool_mode=transaction\ndefault_pool_size=3\nunix_socket_dir=\nignore_startup_parameters=extra_float_digits\n",
		cfg.Database, target, port)
	if err := os.WriteFile(ini, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{ini}
	if os.Geteuid() == 0 { // it refuses to run as root
		args = append([]string{"-u", "nobody"}, args...)
	}
	cmd := exec.Command(bin, args...)
	out := &syncBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	u := url.URL{Scheme: "postgres", User: url.User(cfg.User), Host: fmt.Sprintf("127.0.0.1:%d", port), Path: "/" + cfg.Database}
	// Transaction mode knows no prepared statements of a session.
	u.RawQuery = "sslmode=disable&default_query_exec_mode=exec"
	pool := pgtest.Open(t, u.String())
	eventually(t, "PgBouncer", func() bool {
		if cmd.ProcessState != nil {
			t.Fatalf("pgbouncer: %s", out)
		}
		return pool.Ping(t.Context()) == nil
	})
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
