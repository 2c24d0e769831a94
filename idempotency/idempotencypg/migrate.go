package idempotencypg

import (
	"context"
	"embed"
	"fmt"
	"io/fs"

	"github.com/jackc/pgx/v5"
)

//go:embed migrations/*.sql
var files embed.FS

// Migrations returns the SQL files that make the table, for those who apply
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

// Migrate makes the table in the first schema of search_path, or brings it up
// to date. It applies what idempotency_migration does not list yet, all in one
// transaction; calls at the same time wait for one another.
func Migrate(ctx context.Context, db Beginner) error {
	if err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error { return migrate(ctx, tx) }); err != nil {
		return fmt.Errorf("idempotencypg: migrate: %w", err)
	}
	return nil
}

func migrate(ctx context.Context, tx pgx.Tx) error {
	// Not a name in a schema: two schemas may wait for each other here, no more.
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtext('idempotency_migration'))`); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS idempotency_migration (
		name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())`); err != nil {
		return err
	}
	entries, err := fs.ReadDir(Migrations(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		tag, err := tx.Exec(ctx, `INSERT INTO idempotency_migration (name) VALUES ($1) ON CONFLICT DO NOTHING`, e.Name())
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			continue
		}
		sql, err := fs.ReadFile(Migrations(), e.Name())
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, string(sql)); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	return nil
}
