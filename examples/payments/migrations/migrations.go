// Package migrations makes the tables of the payments example.
package migrations

import (
	"context"
	"embed"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/internal/pgmigrate"
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
	if err := pgmigrate.Apply(ctx, pool, "payments_migration", files); err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	return nil
}
