package idempotencypg_test

import (
	"context"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
)

// Every way in which pgx may send statements works, so also those that a
// connection pooler asks for.
func TestExecModes(t *testing.T) {
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec,
		pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		t.Run(mode.String(), func(t *testing.T) {
			base := ledger(t)
			cfg := base.Config()
			cfg.ConnConfig.DefaultQueryExecMode = mode
			pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Close()
			result := []byte("\x00\xff'\\")
			odd := idempotency.Key{Scope: `te'n\ant`, ID: "k", Fingerprint: result}
			for i := range 3 {
				got, replayed, err := idempotencypg.DoTx(t.Context(), pool, odd, nil, func(ctx context.Context, tx pgx.Tx) ([]byte, error) {
					_, err := effect("k")(ctx, tx)
					return result, err
				})
				if err != nil || string(got) != string(result) || replayed != (i > 0) {
					t.Fatalf("DoTx: %q, %v, %v", got, replayed, err)
				}
			}
			broken := errors.New("broken")
			_, _, err = idempotencypg.DoTx(t.Context(), pool, key("fails"), nil, func(ctx context.Context, tx pgx.Tx) (string, error) {
				if _, err := effect("fails")(ctx, tx); err != nil {
					t.Error(err)
				}
				return "", broken
			})
			if !errors.Is(err, broken) || effects(t, base, "fails") != 0 || effects(t, base, "k") != 1 {
				t.Fatalf("%v, %d effects of work that failed, %d of work that did not", err, effects(t, base, "fails"), effects(t, base, "k"))
			}
			store := idempotencypg.New(pool)
			for i := range 2 {
				got, replayed, err := idempotency.Do(t.Context(), store, key("two-phase"), nil, func(ctx context.Context) ([]byte, error) {
					return result, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return idempotencypg.CompleteTx(ctx, tx, result) })
				})
				if err != nil || string(got) != string(result) || replayed != (i > 0) {
					t.Fatalf("Do: %q, %v, %v", got, replayed, err)
				}
			}
			if _, err := store.Purge(t.Context(), 10); err != nil {
				t.Fatal(err)
			}
		})
	}
}
