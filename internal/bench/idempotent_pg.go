package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
)

// An idempotent business transaction in Postgres, against the bare one and
// against the shape that reserves the key in a commit of its own first.
var idempotentPGExperiment = experiment{
	ids:  []string{"I1"},
	what: "idempotent business transactions in Postgres at 16 clients",
	round: func(ctx context.Context, e *env, r *results) error {
		pool, drop, err := e.schema(ctx)
		if err != nil {
			return err
		}
		defer drop()
		if err := idempotencypg.Migrate(ctx, pool); err != nil {
			return err
		}
		_, err = pool.Exec(ctx, `CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
			INSERT INTO account SELECT i, 0 FROM generate_series(0, 9999) i;
			CREATE TABLE reserved (scope text, id text, fingerprint bytea, state int NOT NULL, token text, lease_expires_at timestamptz, result bytea, expires_at timestamptz, PRIMARY KEY (scope, id));
			CREATE INDEX ON reserved (expires_at) -- without which expired keys cannot be removed; ours has one too`)
		if err != nil {
			return err
		}
		total := make(map[string]float64)
		turns := 6
		if e.quick {
			turns = 2
		}
		for turn := range turns {
			for name, request := range map[string]func(context.Context, *pgxpool.Pool, int) error{
				"ours": oursRequest, "bare": bareRequest, "reserve": reserveRequest,
			} {
				n, err := clients(ctx, 16, 500*time.Millisecond, func(i int) error { return request(ctx, pool, turn*10_000_000+i) })
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				total[name] += float64(n)
			}
		}
		for name, n := range total {
			r.set(name, n)
		}
		return nil
	},
	bars: []bar{
		{id: "I1", what: "claim and complete in one transaction/bare transaction", atLeast: 0.65, ratio: func(r *results) float64 { return r.of("ours", "bare") }},
		{id: "I1", what: "claim and complete in one transaction/reserve, then complete", atLeast: 1.5, ratio: func(r *results) float64 { return r.of("ours", "reserve") }},
	},
}

// clients runs f side by side for d and returns how often it succeeded.
func clients(ctx context.Context, n int, d time.Duration, f func(i int) error) (count int64, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	for w := range n {
		wg.Go(func() {
			done := int64(0)
			var failed error
			for i := w; failed == nil && time.Now().Before(end) && ctx.Err() == nil; i += n {
				if failed = f(i); failed == nil {
					done++
				}
			}
			mu.Lock()
			defer mu.Unlock()
			count += done
			if failed != nil {
				err = failed
			}
		})
	}
	wg.Wait()
	return count, err
}

var requestResult = []byte(`{"payment":"0192f0c1","state":"AUTHORIZED","amount":1999,"currency":"EUR"}`)

func business(ctx context.Context, tx pgx.Tx, i int) error {
	_, err := tx.Exec(ctx, `UPDATE account SET balance = balance + 1 WHERE id = $1`, i%10_000)
	return err
}

func bareRequest(ctx context.Context, pool *pgxpool.Pool, i int) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return business(ctx, tx, i) })
}

func oursRequest(ctx context.Context, pool *pgxpool.Pool, i int) error {
	key := idempotency.Key{Scope: "tenant", ID: fmt.Sprint("key-", i), Fingerprint: []byte("fingerprint")}
	_, replayed, err := idempotencypg.DoTx(ctx, pool, key, nil, func(ctx context.Context, tx pgx.Tx) ([]byte, error) {
		return requestResult, business(ctx, tx, i)
	})
	if err == nil && replayed {
		return fmt.Errorf("key %d was replayed", i)
	}
	return err
}

// reserveRequest is the shape that others use: the claim is committed first, and
// completed in the business transaction.
func reserveRequest(ctx context.Context, pool *pgxpool.Pool, i int) error {
	id := fmt.Sprint("key-", i)
	tag, err := pool.Exec(ctx, `INSERT INTO reserved (scope, id, fingerprint, state, token, lease_expires_at, expires_at)
		VALUES ('tenant', $1, $2, 1, $1, now() + interval '5 s', now() + interval '1 day') ON CONFLICT DO NOTHING`, id, []byte("fingerprint"))
	if err != nil {
		return err
	}
	if tag.RowsAffected() != 1 {
		return fmt.Errorf("key %d was reserved before", i)
	}
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if err := business(ctx, tx, i); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `UPDATE reserved SET state = 2, result = $2
			WHERE scope = 'tenant' AND id = $1 AND token = $1 AND state = 1 AND lease_expires_at > now()`, id, requestResult)
		if err == nil && tag.RowsAffected() != 1 {
			err = fmt.Errorf("key %d was lost", i)
		}
		return err
	})
}
