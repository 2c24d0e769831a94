package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// cacheDir is where downloaded programs are kept.
func cacheDir() string {
	dir, err := os.UserCacheDir()
	if err != nil || os.Geteuid() == 0 {
		dir = "/var/cache" // root's own is closed to the account that runs the server
	}
	return filepath.Join(dir, "ashlar")
}

// fetchPostgres returns the folder of server programs that are downloaded from
// Maven Central on first use.
func fetchPostgres(ctx context.Context, r *run, cache string) (string, error) {
	home := filepath.Join(cache, "postgres-"+string(embeddedpostgres.V17))
	bin := filepath.Join(home, "bin")
	if installed(bin) {
		return bin, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, "fetch-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	r.logf("postgres: downloading the server programs, version %s, to %s", embeddedpostgres.V17, cache)
	fetched := make(chan error, 1)
	go func() {
		err := fetch(tmp, home)
		fetched <- errors.Join(err, os.RemoveAll(tmp))
	}()
	select {
	case err = <-fetched:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return "", fmt.Errorf("download of the server programs from Maven Central: %w", err)
	}
	return bin, nil
}

func fetch(tmp, home string) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	unpacked := filepath.Join(tmp, "postgres")
	// The module has no call that only fetches: with an encoding that initdb
	// refuses, Start ends right after the programs are unpacked.
	err = embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(embeddedpostgres.V17).
		Port(uint32(port)).
		CachePath(filepath.Join(tmp, "archive")).
		BinariesPath(unpacked).
		RuntimePath(filepath.Join(tmp, "run")).
		Encoding("none").
		Logger(io.Discard)).Start()
	if !installed(filepath.Join(unpacked, "bin")) {
		return err
	}
	// Renaming is atomic: a parallel run sees all of it or nothing.
	if err := os.Rename(unpacked, home); err != nil && !installed(filepath.Join(home, "bin")) {
		return err
	}
	return nil
}

func installed(bin string) bool {
	for _, name := range []string{"postgres", "initdb"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return false
		}
	}
	return true
}
