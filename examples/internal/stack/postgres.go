package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// What tests need beyond a server's defaults, whoever starts it.
var postgresSettings = []string{
	"-c", "max_connections=300",
	"-c", "max_prepared_transactions=20",
	"-c", "wal_level=logical",
}

func postgresURL(port int) string {
	return fmt.Sprintf("postgres://postgres@%s/postgres?sslmode=disable", hostPort(port))
}

func localPostgres(ctx context.Context, r *run) (*Service, error) {
	bin, err := findPostgres()
	if err != nil {
		return nil, err
	}
	return startPostgres(ctx, r, bin)
}

func embeddedPostgres(ctx context.Context, r *run) (*Service, error) {
	bin, err := findPostgres()
	if err != nil {
		if bin, err = fetchPostgres(ctx, r, cacheDir()); err != nil {
			return nil, err
		}
	}
	return startPostgres(ctx, r, bin)
}

// findPostgres returns the folder of the newest installed server programs.
func findPostgres() (string, error) {
	var dirs []string
	if path, err := exec.LookPath("postgres"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			dirs = append(dirs, filepath.Dir(path))
		}
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin",
		"/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin",
		"/Applications/Postgres.app/Contents/Versions/*/bin",
	} {
		found, _ := filepath.Glob(pattern)
		dirs = append(dirs, found...)
	}
	best, bestMajor := "", 0
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, "initdb")); err != nil {
			continue
		}
		out, err := exec.Command(filepath.Join(dir, "postgres"), "--version").Output()
		if err != nil {
			continue
		}
		_, version, _ := strings.Cut(string(out), "(PostgreSQL) ")
		major, _ := strconv.Atoi(version[:len(version)-len(strings.TrimLeft(version, "0123456789"))])
		if major > bestMajor {
			best, bestMajor = dir, major
		}
	}
	switch {
	case best == "":
		return "", fmt.Errorf("no Postgres is installed (apt install postgresql, brew install postgresql@17): %w", errUnavailable)
	case bestMajor < 15:
		return "", fmt.Errorf("the newest Postgres installed is %d, needed is 15 or newer: %w", bestMajor, errUnavailable)
	}
	return best, nil
}

func startPostgres(ctx context.Context, r *run, bin string) (*Service, error) {
	acct, err := unprivileged()
	if err != nil {
		return nil, err
	}
	p, err := newProgram(r, Postgres, acct)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(p.dir, "data")
	if err := command(ctx, acct, p.dir, filepath.Join(bin, "initdb"), "--pgdata="+data, "--username=postgres",
		"--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"); err != nil {
		return nil, errors.Join(err, p.close())
	}
	sockets := p.dir
	if len(sockets) > 80 { // a socket's path has room for about 100 bytes
		sockets = ""
	}
	p.argv = func(port int) []string {
		return append([]string{
			filepath.Join(bin, "postgres"), "-D", data, "-p", strconv.Itoa(port),
			"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=" + sockets,
		}, postgresSettings...)
	}
	p.probe = func(ctx context.Context, port int) (string, error) {
		if got, err := pgShow(ctx, postgresURL(port), "data_directory"); err != nil || got != data {
			return "", fmt.Errorf("data directory %q instead of %q: %w", got, data, err)
		}
		return pgVersion(ctx, postgresURL(port))
	}
	// Fast and immediate shutdown. SIGKILL would leave shared memory behind.
	p.gentle, p.crash = syscall.SIGINT, syscall.SIGQUIT
	version, err := p.launch(ctx)
	if err != nil {
		return nil, err
	}
	return &Service{Real: true, Version: version, Address: postgresURL(p.port), inst: p}, nil
}
