package sagapg_test

import (
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
	"github.com/ashlar-go/ashlar/saga/sagatest"
)

func migrated(t testing.TB) *pgxpool.Pool {
	t.Helper()
	pool := pgtest.Pool(t)
	if err := sagapg.Migrate(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	return pool
}

func TestStore(t *testing.T) {
	sagatest.TestStore(t, func(t *testing.T) saga.Store { return sagapg.New(migrated(t), nil) })
}
