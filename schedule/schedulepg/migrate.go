package schedulepg

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/ashlar-go/ashlar/internal/pgmigrate"
	"github.com/ashlar-go/ashlar/schedule"
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

// Migrate makes the tables in the first schema of search_path, or brings them
// up to date. It applies what schedule_migration does not list yet, all in one
// transaction; calls at the same time wait for one another.
func Migrate(ctx context.Context, db Beginner) error {
	if err := pgmigrate.Apply(ctx, db, "schedule_migration", Migrations()); err != nil {
		return fmt.Errorf("schedulepg: migrate: %w", err)
	}
	return nil
}

// wrap names the operation, and missing tables with their remedy.
func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "42P01" { // undefined_table
		return fmt.Errorf("schedulepg: %s: %w: call schedulepg.Migrate, or check search_path: %w", op, schedule.ErrNotMigrated, err)
	}
	return fmt.Errorf("schedulepg: %s: %w", op, err)
}
