package lockpg_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
	"github.com/ashlar-go/ashlar/lock/locktest"
)

func migrated(tb testing.TB) *pgxpool.Pool {
	tb.Helper()
	pool := pgtest.Pool(tb)
	if err := lockpg.Migrate(context.Background(), pool); err != nil {
		tb.Fatal(err)
	}
	return pool
}

func TestStore(t *testing.T) {
	locktest.TestStore(t, func(t *testing.T) lock.Store { return lockpg.New(migrated(t), nil) })
}
