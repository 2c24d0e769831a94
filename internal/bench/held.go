package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxkafka"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// Traffic at 2,000 messages a second while an old snapshot is held, and then the
// rate at which a backlog drains, against the same without the snapshot.
var heldExperiment = experiment{
	ids:  []string{"O7"},
	what: "draining after a time of traffic under a held snapshot (see -held)",
	round: func(ctx context.Context, e *env, r *results) error {
		d := 10 * time.Second
		if e.quick {
			d = 2 * time.Second
		}
		if heldFor > 0 {
			d = heldFor
		}
		for name, held := range map[string]bool{"held": true, "free": false} {
			rate, dead, err := heldRate(ctx, e, d, held)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			r.set(name, rate)
			r.set(name+" dead", float64(dead))
		}
		return nil
	},
	bars: []bar{
		{id: "O7", what: "drain rate after traffic under a held snapshot/without it", atLeast: 0.95, ratio: func(r *results) float64 { return r.of("held", "free") }},
		{id: "O7", what: "dead tuples in the message table", atMost: 0.5, unit: " ", ratio: func(r *results) float64 { return r.values["held dead"] }},
	},
}

func heldRate(ctx context.Context, e *env, d time.Duration, held bool) (rate float64, dead int64, err error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer drop()
	if err := outboxpg.Migrate(ctx, pool); err != nil {
		return 0, 0, err
	}
	if held {
		tx, err := pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
		if err != nil {
			return 0, 0, err
		}
		defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
		if _, err := tx.Exec(ctx, `SELECT pg_current_xact_id()`); err != nil { // takes a snapshot and an xid
			return 0, 0, err
		}
	}
	n := e.n(200_000)
	traffic := int(d.Seconds()) * 2000
	pub := newCounting(outboxkafka.New(e.client), traffic)
	rctx, stop := context.WithCancel(ctx)
	finished := make(chan error, 1)
	go func() { finished <- outbox.NewRelay(outboxpg.New(pool, nil), pub, nil).Run(rctx) }()
	start := time.Now()
	for i := range traffic / 20 {
		time.Sleep(time.Until(start.Add(time.Duration(i) * 10 * time.Millisecond)))
		if err := fill(ctx, pool, 20); err != nil {
			stop()
			return 0, 0, err
		}
	}
	<-pub.done
	stop()
	if err := <-finished; err != nil {
		return 0, 0, err
	}
	if err := fill(ctx, pool, n); err != nil {
		return 0, 0, err
	}
	drain := newCounting(outboxkafka.New(e.client), n)
	rctx, stop = context.WithCancel(ctx)
	start = time.Now()
	go func() { finished <- outbox.NewRelay(outboxpg.New(pool, nil), drain, nil).Run(rctx) }()
	<-drain.done
	rate = float64(n) / time.Since(start).Seconds()
	stop()
	if err := <-finished; err != nil {
		return 0, 0, err
	}
	err = pool.QueryRow(ctx, `SELECT coalesce(sum(n_dead_tup), 0)::bigint FROM pg_stat_user_tables
		WHERE relname LIKE 'outbox_message_%' AND schemaname = current_schema`).Scan(&dead)
	return rate, dead, err
}
