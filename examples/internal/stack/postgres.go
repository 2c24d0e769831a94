package stack

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"syscall"

	embedded "github.com/fergusstrange/embedded-postgres"
)

// localPostgres runs the newest Postgres that is installed.
func localPostgres(ctx context.Context, logf func(string, ...any)) (*Service, error) {
	bin, version := findPostgres()
	if bin == "" {
		return nil, fmt.Errorf("no Postgres %d or newer is installed: %w", minPostgres, errUnavailable)
	}
	return runPostgres(ctx, bin, version)
}

var versionPattern = regexp.MustCompile(`\(PostgreSQL\) (\d+)[.\w]*`)

// findPostgres returns the folder of the newest installed server's programs.
func findPostgres() (dir, version string) {
	var dirs []string
	if path, err := exec.LookPath("postgres"); err == nil {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = real
		}
		dirs = append(dirs, filepath.Dir(path))
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin",
		"/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin",
	} {
		found, _ := filepath.Glob(pattern) // the patterns are well-formed
		dirs = append(dirs, found...)
	}
	newest := minPostgres - 1
	for _, d := range dirs {
		if _, err := os.Stat(filepath.Join(d, "initdb")); err != nil {
			continue
		}
		out, err := exec.Command(filepath.Join(d, "postgres"), "--version").Output()
		m := versionPattern.FindSubmatch(out)
		if err != nil || m == nil {
			continue
		}
		if major, _ := strconv.Atoi(string(m[1])); major > newest {
			newest, dir, version = major, d, string(m[0][len("(PostgreSQL) "):])
		}
	}
	return dir, version
}

// embeddedPostgres runs installed binaries, or else fetches some.
func embeddedPostgres(ctx context.Context, logf func(string, ...any)) (*Service, error) {
	if bin, version := findPostgres(); bin != "" {
		return runPostgres(ctx, bin, version)
	}
	// In a place that an unprivileged user can read, since root may not run them.
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("ashlar-postgres-%s-%s-%d", embedded.V17, runtime.GOARCH, os.Geteuid()))
	bin := filepath.Join(dir, "bin")
	if _, err := os.Stat(filepath.Join(bin, "postgres")); err != nil {
		logf("postgres: no binaries here, fetching version %s (about 30 MB, once)", embedded.V17)
		if err := fetchPostgres(dir); err != nil {
			return nil, err
		}
	}
	return runPostgres(ctx, bin, string(embedded.V17))
}

// fetchPostgres has the library fetch and unpack binaries into dir. It also
// starts a server, which fails for root; that server is of no interest.
func fetchPostgres(dir string) error {
	work, err := os.MkdirTemp("", "ashlar-fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	port, err := freePort()
	if err != nil {
		return err
	}
	unpacked := filepath.Join(work, "binaries")
	pg := embedded.NewDatabase(embedded.DefaultConfig().Version(embedded.V17).Port(uint32(port)).
		CachePath(filepath.Join(work, "cache")).RuntimePath(filepath.Join(work, "run")).BinariesPath(unpacked).Logger(&tail{}))
	startErr := pg.Start()
	if startErr == nil {
		if err := pg.Stop(); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(unpacked, "bin", "postgres")); err != nil {
		return fmt.Errorf("fetch Postgres binaries: %w", startErr)
	}
	if err := os.Chmod(unpacked, 0o755); err != nil {
		return err
	}
	// A rename is atomic: of parallel runs one wins, and the others use its.
	if err := os.Rename(unpacked, dir); err != nil {
		if _, statErr := os.Stat(filepath.Join(dir, "bin", "postgres")); statErr != nil {
			return err
		}
	}
	return nil
}

// runPostgres makes a database cluster in a temporary folder and runs it.
func runPostgres(ctx context.Context, bin, version string) (*Service, error) {
	user, err := unprivileged()
	if err != nil {
		return nil, err
	}
	dir, err := tempDir(user, "ashlar-pg-")
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	initdb := exec.CommandContext(ctx, filepath.Join(bin, "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
	initdb.Dir, initdb.SysProcAttr = dir, dieWithParent()
	if user != nil {
		user.apply(initdb.SysProcAttr)
	}
	if out, err := initdb.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	port, err := freePort()
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	svc := &Service{Version: version, Address: fmt.Sprintf("postgres://postgres@%s/postgres?sslmode=disable", hostPort(port)), Real: true}
	var p *process
	start := func(ctx context.Context) (err error) {
		p, err = spawn(user, dir, nil, filepath.Join(bin, "postgres"), "-D", data,
			"-c", "listen_addresses=127.0.0.1", "-c", "port="+strconv.Itoa(port), "-c", "unix_socket_directories="+dir,
			"-c", "max_connections=300", "-c", "max_prepared_transactions=20")
		if err != nil {
			return err
		}
		err = ready(ctx, p.gone, func(ctx context.Context) error { _, err := postgresVersion(ctx, svc.Address); return err })
		if err != nil {
			return fmt.Errorf("%w\n%s", err, p.output)
		}
		return nil
	}
	svc.stop = func() error {
		defer os.RemoveAll(dir)
		return p.stop(syscall.SIGINT) // fast shutdown
	}
	svc.restart = func(ctx context.Context, immediate bool) error {
		sig := syscall.SIGINT
		if immediate {
			sig = syscall.SIGQUIT // immediate shutdown: recovery at the next start
		}
		if err := p.stop(sig); err != nil {
			return err
		}
		return start(ctx)
	}
	if err := start(ctx); err != nil {
		if p != nil {
			_ = p.stop(syscall.SIGQUIT) // the error that matters is the one above
		}
		os.RemoveAll(dir)
		return nil, err
	}
	return svc, nil
}
