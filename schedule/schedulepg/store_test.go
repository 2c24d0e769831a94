package schedulepg_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/schedule/schedulepg"
	"github.com/ashlar-go/ashlar/schedule/scheduletest"
)

func migrated(tb testing.TB) *pgxpool.Pool {
	tb.Helper()
	pool := pgtest.Pool(tb)
	if err := schedulepg.Migrate(context.Background(), pool); err != nil {
		tb.Fatal(err)
	}
	return pool
}

func TestStore(t *testing.T) {
	scheduletest.TestStore(t, func(t *testing.T) scheduletest.Store { return schedulepg.New(migrated(t)) })
}
