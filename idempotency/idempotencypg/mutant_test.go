package idempotencypg_test

import (
	"context"
	"os"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/idempotency/idempotencytest"
	"github.com/ashlar-go/ashlar/internal/crashtest"
)

// A mutantStore is a store with one rule taken out.
type mutantStore struct {
	*idempotencypg.Store
	pool *pgxpool.Pool
	rule string
}

// Claim without "claim" reads first and then writes, as if nobody came between.
func (m mutantStore) Claim(ctx context.Context, k idempotency.Key, req idempotency.ClaimRequest) (idempotency.Claim, error) {
	if m.rule == "claim" {
		var taken bool
		err := m.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM idempotency_key WHERE scope = $1 AND id = $2
			AND (lease_until IS NULL OR lease_until > now() OR fingerprint <> $3 OR $4))`, k.Scope, k.ID, k.Fingerprint, req.AtMostOnce).Scan(&taken)
		if err != nil {
			return idempotency.Claim{}, err
		}
		if !taken {
			_, err := m.pool.Exec(ctx, `INSERT INTO idempotency_key (scope, id, fingerprint, token, lease_until, expires_at)
				VALUES ($1, $2, $3, $4, now() + $5::interval, now() + $6::interval)
				ON CONFLICT (scope, id) DO UPDATE SET token = excluded.token, lease_until = excluded.lease_until`,
				k.Scope, k.ID, append([]byte{}, k.Fingerprint...), req.Token, req.Lease, req.TTL)
			return idempotency.Claim{}, err
		}
	}
	return m.Store.Claim(ctx, k, req)
}

// Complete without "token" takes the result of whoever comes.
func (m mutantStore) Complete(ctx context.Context, k idempotency.Key, token string, result []byte) error {
	if m.rule == "token" {
		err := m.pool.QueryRow(ctx, `SELECT token FROM idempotency_key WHERE scope = $1 AND id = $2`, k.Scope, k.ID).Scan(&token)
		if err != nil {
			return err
		}
	}
	return m.Store.Complete(ctx, k, token, result)
}

const mutantEnv = "IDEMPOTENCYPG_MUTANT"

// TestMutant runs the suite on the mutant that the environment names; only
// TestMutantsAreCaught sets it.
func TestMutant(t *testing.T) {
	rule := os.Getenv(mutantEnv)
	if rule == "" {
		t.Skip("runs as a child of TestMutantsAreCaught")
	}
	idempotencytest.TestStore(t, func(t *testing.T) idempotency.Store {
		pool := migrated(t)
		return mutantStore{idempotencypg.New(pool), pool, rule}
	})
}

// Taking out any of the rules that the guarantees rest on turns the suite red.
func TestMutantsAreCaught(t *testing.T) {
	migrated(t) // skips without a server
	crashtest.Mutants(t, mutantEnv, map[string][]string{
		"none":  {"OneOfManyClaims", "OneOfManyTakesOver", "InProgress", "LeaseEndsThenTakeover"},
		"claim": {"OneOfManyClaims", "OneOfManyTakesOver"},
		"token": {"InProgress", "LeaseEndsThenTakeover"},
	})
}
