package pgtest

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// PgBouncer runs PgBouncer in transaction mode, with three connections to the
// database of direct, until the test ends, and returns a pool on it. The database
// must be the test's own, for search_path is not passed on. Without the program the
// test is skipped or fails, as by Missing.
func PgBouncer(tb testing.TB, direct *pgxpool.Pool) *pgxpool.Pool {
	tb.Helper()
	bin, err := exec.LookPath("pgbouncer")
	if err != nil {
		Missing(tb, "pgbouncer is not installed")
	}
	cfg := direct.Config().ConnConfig
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	dir := tb.TempDir()
	ini := filepath.Join(dir, "pgbouncer.ini")
	target := fmt.Sprintf("host=%s port=%d dbname=%s user=%s", cfg.Host, cfg.Port, cfg.Database, cfg.User)
	if cfg.Password != "" {
		target += " password=" + cfg.Password
	}
	config := fmt.Sprintf("[databases]\n%s = %s\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port=%d\n"+
		"auth_type=any\npool_mode=transaction\ndefault_pool_size=3\nunix_socket_dir=\nignore_startup_parameters=extra_float_digits\n",
		cfg.Database, target, port)
	if err := os.WriteFile(ini, []byte(config), 0o644); err != nil {
		tb.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	args := []string{ini}
	if os.Geteuid() == 0 { // it refuses to run as root
		args = append([]string{"-u", "nobody"}, args...)
	}
	log, err := os.Create(filepath.Join(tb.TempDir(), "log"))
	if err != nil {
		tb.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(bin, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	u := url.URL{Scheme: "postgres", User: url.User(cfg.User), Host: fmt.Sprintf("127.0.0.1:%d", port), Path: "/" + cfg.Database}
	// Transaction mode knows no prepared statements of a session.
	u.RawQuery = "sslmode=disable&default_query_exec_mode=exec"
	pool := Open(tb, u.String())
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for err = pool.Ping(ctx); err != nil; err = pool.Ping(ctx) {
		if ctx.Err() != nil {
			out, _ := os.ReadFile(log.Name())
			tb.Fatalf("pgtest: no PgBouncer: %v\n%s", err, out)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return pool
}
