package outboxpg_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
	"github.com/ashlar-go/ashlar/outbox/outboxtest"
)

func migrated(tb testing.TB) *pgxpool.Pool {
	tb.Helper()
	pool := pgtest.Pool(tb)
	if err := outboxpg.Migrate(context.Background(), pool); err != nil {
		tb.Fatal(err)
	}
	return pool
}

type pgTx struct{ pgx.Tx }

func (tx pgTx) Append(ctx context.Context, msgs ...outbox.Message) error {
	return outboxpg.Append(ctx, tx.Tx, msgs...)
}

func backend(pool *pgxpool.Pool) outboxtest.Backend {
	s := outboxpg.New(pool, nil)
	return outboxtest.Backend{
		Store: func() outbox.Store { return outboxpg.New(pool, nil) },
		Begin: func(ctx context.Context) (outboxtest.Tx, error) {
			tx, err := pool.Begin(ctx)
			return pgTx{tx}, err
		},
		DeadLetters: s.DeadLetters, Replay: s.Replay, Sample: s.Sample,
	}
}

func TestStore(t *testing.T) {
	outboxtest.TestStore(t, func(t *testing.T) outboxtest.Backend { return backend(migrated(t)) })
}

func TestRelay(t *testing.T) {
	outboxtest.TestRelay(t, func(t *testing.T) outboxtest.Backend { return backend(migrated(t)) })
}
