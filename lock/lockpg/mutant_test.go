package lockpg_test

import (
	"context"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
	"github.com/ashlar-go/ashlar/lock/locktest"
)

// A mutantStore is a store with one rule taken out.
type mutantStore struct {
	*lockpg.Store
	pool *pgxpool.Pool
	rule string
}

const upsert = `INSERT INTO lock_lease (key, owner, token, expires_at) VALUES ($1, $2, nextval('lock_token'), clock_timestamp() + $3::interval)
	ON CONFLICT (key) DO UPDATE SET owner = excluded.owner, token = excluded.token, expires_at = excluded.expires_at`

// Acquire without "atomic" looks first and then takes; without "fence" a token
// does not rise.
func (m mutantStore) Acquire(ctx context.Context, req lock.Request) (int64, error) {
	switch m.rule {
	case "atomic":
		var taken bool
		err := m.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM lock_lease WHERE key = ANY ($1::text[])
			AND expires_at > clock_timestamp() AND owner <> $2)`, req.Keys, req.Owner).Scan(&taken)
		if err != nil {
			return 0, err
		}
		if !taken {
			for _, key := range req.Keys {
				if _, err := m.pool.Exec(ctx, upsert, key, req.Owner, req.TTL); err != nil {
					return 0, err
				}
			}
			return 1, nil
		}
	case "fence":
		token, err := m.Store.Acquire(ctx, req)
		return min(token, 1), err
	}
	return m.Store.Acquire(ctx, req)
}

// Extend without "owner" brings back a lease that has ended, as an upsert does.
func (m mutantStore) Extend(ctx context.Context, req lock.Request) error {
	if m.rule != "owner" {
		return m.Store.Extend(ctx, req)
	}
	return pgx.BeginFunc(ctx, m.pool, func(tx pgx.Tx) error {
		for _, key := range req.Keys {
			if _, err := tx.Exec(ctx, upsert, key, req.Owner, req.TTL); err != nil {
				return err
			}
		}
		return nil
	})
}

const mutantEnv = "LOCKPG_MUTANT"

// TestMutant runs the suite on the mutant that the environment names; only
// TestMutantsAreCaught sets it.
func TestMutant(t *testing.T) {
	rule := os.Getenv(mutantEnv)
	if rule == "" {
		t.Skip("runs as a child of TestMutantsAreCaught")
	}
	locktest.TestStore(t, func(t *testing.T) lock.Store {
		pool := migrated(t)
		return mutantStore{lockpg.New(pool, nil), pool, rule}
	})
}

// Taking out any of the rules that the guarantees rest on turns the suite red.
func TestMutantsAreCaught(t *testing.T) {
	migrated(t) // skips without a server
	crashtest.Mutants(t, mutantEnv, map[string][]string{
		"none":   {"OneOfManyAcquires", "OneOfManyTakesOver", "ExtendIsForTheOwnerOnly", "TokensRise", "LeaseEndsThenTakeover"},
		"atomic": {"OneOfManyAcquires", "OneOfManyTakesOver"},
		"owner":  {"ExtendIsForTheOwnerOnly", "LeaseEndsThenTakeover"},
		"fence":  {"TokensRise", "LeaseEndsThenTakeover"},
	})
}
