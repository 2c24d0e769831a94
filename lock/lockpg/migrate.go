package lockpg

import (
	"context"
	"embed"
	"fmt"
	"io/fs"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/internal/pgmigrate"
)

//go:embed migrations/*.sql
var files embed.FS

// Migrations returns the SQL files that make the tables, for those who apply
// migrations with a tool of their own: in the order of their names, each once.
func Migrations() fs.FS {
	sub, err := fs.Sub(files, "migrations")
	if err != nil {
		panic(err) // the folder is embedded
	}
	return sub
}

// A Beginner starts transactions: a *pgxpool.Pool or a *pgx.Conn.
type Beginner interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}

// Migrate makes the tables in the first schema of search_path, or brings them up
// to date. It applies what lock_migration does not list yet, all in one
// transaction; calls at the same time wait for one another.
func Migrate(ctx context.Context, db Beginner) error {
	if err := pgmigrate.Apply(ctx, db, "lock_migration", Migrations()); err != nil {
		return fmt.Errorf("lockpg: migrate: %w", err)
	}
	return nil
}
