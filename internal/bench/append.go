package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// A business transaction with one message, against the same with one bare
// INSERT, and with an INSERT that notifies in its transaction.
var appendExperiment = experiment{
	ids:  []string{"O4"},
	what: "business transactions at 32 writers, each with one message",
	round: func(ctx context.Context, e *env, r *results) error {
		pool, drop, err := e.schema(ctx)
		if err != nil {
			return err
		}
		defer drop()
		if err := outboxpg.Migrate(ctx, pool); err != nil {
			return err
		}
		_, err = pool.Exec(ctx, `CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
			INSERT INTO account SELECT i, 0 FROM generate_series(0, 9999) i;
			CREATE TABLE bare (n bigserial PRIMARY KEY, id text, topic text, key text, payload bytea, headers jsonb, created_at timestamptz NOT NULL DEFAULT now())`)
		if err != nil {
			return err
		}
		notifier := outboxpg.NewNotifier(pool, nil)
		nctx, stop := context.WithCancel(ctx)
		notified := make(chan error, 1)
		go func() { notified <- notifier.Run(nctx) }()
		// Short slices in turn, so that a disturbance meets all alike.
		total := make(map[string]float64)
		slices := 6
		if e.quick {
			slices = 2
		}
		for range slices {
			for name, insert := range map[string]func(context.Context, pgx.Tx, int) error{
				"ours": func(ctx context.Context, tx pgx.Tx, i int) error {
					return outboxpg.Append(ctx, tx, outbox.Message{ID: fmt.Sprint("id-", i), Topic: topic, Key: fmt.Sprint("key-", i%1000), Payload: payload})
				},
				"bare":   bareInsert,
				"notify": notifyInsert,
			} {
				after := func() {}
				if name == "ours" {
					after = notifier.Notify
				}
				n, err := writers(ctx, pool, 32, 500*time.Millisecond, insert, after)
				if err != nil {
					stop()
					return fmt.Errorf("%s: %w", name, err)
				}
				total[name] += float64(n)
			}
		}
		stop()
		for name, n := range total {
			r.set(name, n)
		}
		return <-notified
	},
	bars: []bar{
		{id: "O4", what: "append/bare insert, 32 writers", atLeast: 0.97, ratio: func(r *results) float64 { return r.of("ours", "bare") }},
		{id: "O4", what: "append/notify in each transaction, 32 writers", atLeast: 2, ratio: func(r *results) float64 { return r.of("ours", "notify") }},
	},
}

const bareSQL = `INSERT INTO bare (id, topic, key, payload) VALUES ($1, $2, $3, $4)`

func bareInsert(ctx context.Context, tx pgx.Tx, i int) error {
	_, err := tx.Exec(ctx, bareSQL, fmt.Sprint("id-", i), topic, fmt.Sprint("key-", i%1000), payload)
	return err
}

func notifyInsert(ctx context.Context, tx pgx.Tx, i int) error {
	if err := bareInsert(ctx, tx, i); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, `NOTIFY bare`)
	return err
}

// writers runs business transactions side by side for d and returns how many
// were committed.
func writers(ctx context.Context, pool *pgxpool.Pool, n int, d time.Duration, insert func(context.Context, pgx.Tx, int) error, after func()) (int64, error) {
	var count atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, n)
	end := time.Now().Add(d)
	for w := range n {
		wg.Go(func() {
			for i := w; time.Now().Before(end); i += n {
				err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
					if _, err := tx.Exec(ctx, `UPDATE account SET balance = balance + 1 WHERE id = $1`, i%10_000); err != nil {
						return err
					}
					return insert(ctx, tx, i)
				})
				if err != nil {
					errs <- err
					return
				}
				after()
				count.Add(1)
			}
		})
	}
	wg.Wait()
	close(errs)
	return count.Load(), <-errs
}
