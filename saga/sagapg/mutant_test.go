package sagapg_test

import (
	"context"
	"os"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
	"github.com/ashlar-go/ashlar/saga/sagatest"
)

// A mutant is a store with one rule taken out.
type mutant struct {
	*sagapg.Store
	pool *pgxpool.Pool
	rule string
}

// Create without "record" does not put the first steps on record before they run.
func (m mutant) Create(ctx context.Context, sagas []saga.Instance) ([]string, error) {
	if m.rule == "record" {
		for i := range sagas {
			sagas[i].Steps = withoutBegun(sagas[i].Steps)
		}
	}
	return m.Store.Create(ctx, sagas)
}

func withoutBegun(steps []saga.StepRecord) []saga.StepRecord {
	return slices.DeleteFunc(slices.Clone(steps), func(r saga.StepRecord) bool { return r.Outcome == saga.Begun })
}

func (m mutant) Save(ctx context.Context, runner string, cs []saga.Checkpoint) ([]saga.Ack, error) {
	switch m.rule {
	case "record": // nor the next ones
		for i := range cs {
			cs[i].Steps = withoutBegun(cs[i].Steps)
		}
	case "await": // nor looks for the signals that a saga waits for
		for i := range cs {
			cs[i].Await = nil
		}
	case "fence": // takes checkpoints of whoever comes
		var acks []saga.Ack
		for i := range cs {
			var owner *string
			if err := m.pool.QueryRow(ctx, `SELECT owner::text FROM saga_instance WHERE id = $1`, cs[i].ID).Scan(&owner); err == nil && owner != nil {
				runner = *owner
			}
			ack, err := m.Store.Save(ctx, runner, cs[i:i+1])
			if err != nil {
				return nil, err
			}
			acks = append(acks, ack...)
		}
		return acks, nil
	}
	return m.Store.Save(ctx, runner, cs)
}

// Lease without "take" reads what is due first and then takes it, as if nobody
// came between.
func (m mutant) Lease(ctx context.Context, req saga.LeaseRequest) (saga.Grant, error) {
	if m.rule != "take" || req.TTL <= 0 {
		return m.Store.Lease(ctx, req)
	}
	limit := req.Limit
	req.Limit = 0
	g, err := m.Store.Lease(ctx, req)
	if err != nil || limit == 0 {
		return g, err
	}
	rows, err := m.pool.Query(ctx, `SELECT id FROM saga_instance WHERE owner IS NULL AND wake_at <= now() ORDER BY id LIMIT $1`, limit)
	if err != nil {
		return g, err
	}
	var ids []string
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return g, err
		}
		ids = append(ids, id)
	}
	for _, id := range ids {
		if _, err := m.pool.Exec(ctx, `UPDATE saga_instance SET owner = $1 WHERE id = $2`, req.Runner, id); err != nil {
			return g, err
		}
		in, err := m.Get(ctx, id)
		if err != nil {
			return g, err
		}
		g.Taken = append(g.Taken, in)
	}
	return g, nil
}

const mutantEnv = "SAGAPG_MUTANT"

// TestMutant runs the suite on the mutant that the environment names; only
// TestMutantsAreCaught sets it.
func TestMutant(t *testing.T) {
	rule := os.Getenv(mutantEnv)
	if rule == "" {
		t.Skip("runs as a child of TestMutantsAreCaught")
	}
	sagatest.TestStore(t, func(t *testing.T) saga.Store {
		pool := migrated(t)
		return mutant{sagapg.New(pool, nil), pool, rule}
	})
}

// Taking out any of the rules that the guarantees rest on turns the suite red.
func TestMutantsAreCaught(t *testing.T) {
	migrated(t) // skips without a server
	crashtest.Mutants(t, mutantEnv, map[string][]string{
		"none":   {"Fence", "UndoIsOnRecordBeforeDo", "SignalBeforeTheWait", "OneOfManyTakes"},
		"fence":  {"Fence"},
		"record": {"UndoIsOnRecordBeforeDo"},
		"await":  {"SignalBeforeTheWait"},
		"take":   {"OneOfManyTakes"},
	})
}
