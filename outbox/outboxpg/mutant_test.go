package outboxpg_test

import (
	"context"
	"os"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
	"github.com/ashlar-go/ashlar/outbox/outboxtest"
)

// A mutant is a store with one rule taken out.
type mutant struct {
	*outboxpg.Store
	pool *pgxpool.Pool
	rule string
}

func (m mutant) Fetch(ctx context.Context, from []outbox.Position, limit int) ([]outbox.Record, error) {
	if m.rule == "gap" {
		return m.FetchAcrossGaps(ctx, from, limit)
	}
	return m.Store.Fetch(ctx, from, limit)
}

func (m mutant) Settle(ctx context.Context, st outbox.Settlement) ([]int, error) {
	if m.rule == "fence" {
		for i := range st.Advance {
			a := &st.Advance[i]
			err := m.pool.QueryRow(ctx, `SELECT epoch FROM outbox_lane WHERE lane = $1`, a.Number).Scan(&a.Epoch)
			if err != nil {
				return nil, err
			}
		}
	}
	return m.Store.Settle(ctx, st)
}

func (m mutant) Lease(ctx context.Context, req outbox.LeaseRequest) (outbox.Grant, error) {
	if m.rule == "claim" && req.TTL > 0 {
		_, err := m.pool.Exec(ctx, `UPDATE outbox_lane SET owner = $1, expires_at = now() + make_interval(secs => $2)`,
			req.Relay, req.TTL.Seconds())
		if err != nil {
			return outbox.Grant{}, err
		}
	}
	return m.Store.Lease(ctx, req)
}

const mutantEnv = "OUTBOXPG_MUTANT"

// TestMutant runs the suites on the mutant that the environment names; only
// TestMutantsAreCaught sets it.
func TestMutant(t *testing.T) {
	rule := os.Getenv(mutantEnv)
	if rule == "" {
		t.Skip("runs as a child of TestMutantsAreCaught")
	}
	open := func(t *testing.T) outboxtest.Backend {
		pool := migrated(t)
		b := backend(pool)
		b.Store = func() outbox.Store { return mutant{outboxpg.New(pool, nil), pool, rule} }
		return b
	}
	outboxtest.TestStore(t, open)
}

// Taking out any of the rules that the guarantees rest on turns the suite red.
func TestMutantsAreCaught(t *testing.T) {
	migrated(t) // skips without a server
	crashtest.Mutants(t, mutantEnv, map[string][]string{
		"none":  {"OpenTransactionHoldsItsLane", "ManyGaps", "Fence", "FenceHoldsForOutcomes", "LeaseExcludesOthers"},
		"gap":   {"OpenTransactionHoldsItsLane", "ManyGaps"},
		"fence": {"Fence", "FenceHoldsForOutcomes"},
		"claim": {"LeaseExcludesOthers"},
	})
}
