package idempotencypg_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/idempotency/idempotencytest"
	"github.com/ashlar-go/ashlar/internal/pgtest"
)

func migrated(tb testing.TB) *pgxpool.Pool {
	tb.Helper()
	pool := pgtest.Pool(tb)
	if err := idempotencypg.Migrate(context.Background(), pool); err != nil {
		tb.Fatal(err)
	}
	return pool
}

func TestStore(t *testing.T) {
	idempotencytest.TestStore(t, func(t *testing.T) idempotency.Store { return idempotencypg.New(migrated(t)) })
}
