// Package pgmigrate applies a backend's embedded migrations to Postgres. Every
// Postgres backend has the same few lines to do so; here they are once.
package pgmigrate

import (
	"context"
	"fmt"
	"io/fs"

	"github.com/jackc/pgx/v5"
)

// Apply runs those of the .sql files in the root of files that table does not
// list yet, in the order of their names and all in one transaction, in the first
// schema of search_path. Calls at the same time wait for one another. The table
// is made if it is missing; its name must be a plain identifier.
func Apply(ctx context.Context, db interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}, table string, files fs.FS,
) error {
	names, err := fs.Glob(files, "*.sql") // sorted
	if err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		// The lock is not of one schema: two may wait for each other here, no more.
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtext($1))`, table); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS `+table+` (
			name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())`)
		if err != nil {
			return err
		}
		for _, name := range names {
			tag, err := tx.Exec(ctx, `INSERT INTO `+table+` (name) VALUES ($1) ON CONFLICT DO NOTHING`, name)
			if err != nil {
				return err
			}
			if tag.RowsAffected() == 0 {
				continue // applied before
			}
			sql, err := fs.ReadFile(files, name)
			if err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, string(sql)); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		return nil
	})
}
