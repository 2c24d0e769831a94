// Package migrations makes the tables of the payments example.
package migrations

import (
	"context"
	"embed"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

//go:embed *.sql
var files embed.FS

// Up makes the tables of the example and of the patterns it uses in the first
// schema of search_path, or brings them up to date. Calls at the same time wait
// for one another.
func Up(ctx context.Context, pool *pgxpool.Pool) error {
	if err := outboxpg.Migrate(ctx, pool); err != nil {
		return err
	}
	if err := idempotencypg.Migrate(ctx, pool); err != nil {
		return err
	}
	if err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return up(ctx, tx) }); err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	return nil
}

func up(ctx context.Context, tx pgx.Tx) error {
	if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtext('payments_migration'))`); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, `CREATE TABLE IF NOT EXISTS payments_migration (
		name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())`); err != nil {
		return err
	}
	entries, err := files.ReadDir(".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		tag, err := tx.Exec(ctx, `INSERT INTO payments_migration (name) VALUES ($1) ON CONFLICT DO NOTHING`, e.Name())
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			continue
		}
		sql, err := files.ReadFile(e.Name())
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, string(sql)); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	return nil
}
