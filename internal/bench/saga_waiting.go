package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

// A runner with a hundred thousand sagas that wait for a signal, against the same
// with a thousand: what it costs that they wait.
var sagaWaitingExperiment = experiment{
	ids:  []string{"S6"},
	what: "100,000 sagas that wait for a signal",
	round: func(ctx context.Context, e *env, r *results) error {
		pool, drop, err := e.schema(ctx)
		if err != nil {
			return err
		}
		defer drop()
		if err := sagapg.Migrate(ctx, pool); err != nil {
			return err
		}
		s := saga.New[sagaState]("bench", 1).
			Step("ask", func(context.Context, *sagaState) error { return nil }, nil, nil).
			Await("answer", nil, &saga.AwaitOptions{Deadline: time.Hour}).
			Build()
		runner, stop := runSagas(ctx, pool, s)
		defer stop()
		const waiting = 100_000                                                    // in the quick form too: of less, the noise is all one sees
		if err := startWaiting(ctx, runner, s, pool, 0, waiting/100); err != nil { // so that the pool is warm
			return err
		}
		few, err := idleCost(ctx, pool)
		if err != nil {
			return err
		}
		if err := startWaiting(ctx, runner, s, pool, waiting/100, waiting); err != nil {
			return err
		}
		many, err := idleCost(ctx, pool)
		if err != nil {
			return err
		}
		r.set("heap", max(0, float64(many.heap)-float64(few.heap))/waiting)
		r.set("blocks", many.blocks/few.blocks)
		r.set("cpu", many.cpu/few.cpu)
		if os.Getenv("BENCH_VERBOSE") != "" {
			fmt.Fprintf(os.Stderr, "\n%d waiting %+v, %d waiting %+v\n", waiting/100, few, waiting, many)
		}
		// They are there: one of them goes on.
		if err := runner.Signal(ctx, "saga-7", "answer", nil); err != nil {
			return err
		}
		in, err := runner.Wait(ctx, "saga-7")
		if err == nil && in.Status != saga.Done {
			err = fmt.Errorf("saga-7 is %s", in.Status)
		}
		return err
	},
	bars: []bar{
		{id: "S6", what: "heap for each waiting saga", atMost: 10, unit: " B", ratio: func(r *results) float64 { return r.values["heap"] }},
		{id: "S6", what: "blocks that Postgres touches, 100,000 waiting/1,000", atMost: 2, ratio: func(r *results) float64 { return r.values["blocks"] }},
		{id: "S6", what: "CPU of the runner, 100,000 waiting/1,000", atMost: 2, ratio: func(r *results) float64 { return r.values["cpu"] }},
	},
}

func startWaiting(ctx context.Context, r *saga.Runner, s *saga.Saga[sagaState], pool *pgxpool.Pool, from, n int) error {
	const starters = 128
	errs := make(chan error, starters)
	for w := range starters {
		go func() {
			for i := from + w; i < n; i += starters {
				if _, err := s.Start(ctx, r, fmt.Sprint("saga-", i), sagaState{}); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range starters {
		if err := <-errs; err != nil {
			return err
		}
	}
	for {
		var left int
		if err := pool.QueryRow(ctx, `SELECT $1 - count(*) FROM saga_instance WHERE owner IS NULL AND wake_at > now()`, n).Scan(&left); err != nil || left == 0 {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// An idle cost is what a runner uses in a second that has nothing to do.
type idle struct {
	heap   uint64
	cpu    float64 // seconds
	blocks float64
}

func idleCost(ctx context.Context, pool *pgxpool.Pool) (idle, error) {
	const seconds = 4
	if _, err := pool.Exec(ctx, `VACUUM ANALYZE saga_instance`); err != nil { // it would come in between
		return idle{}, err
	}
	time.Sleep(11 * time.Second) // idle connections report their statistics after ten
	before, err := blocksTouched(ctx, pool)
	if err != nil {
		return idle{}, err
	}
	cpu := cpuTime()
	time.Sleep(seconds * time.Second)
	used := cpuTime() - cpu
	time.Sleep(time.Second) // statistics arrive late
	after, err := blocksTouched(ctx, pool)
	if err != nil {
		return idle{}, err
	}
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return idle{heap: m.HeapAlloc, cpu: used.Seconds() / seconds, blocks: after - before}, nil
}

func blocksTouched(ctx context.Context, pool *pgxpool.Pool) (n float64, err error) {
	err = pool.QueryRow(ctx, `SELECT sum(heap_blks_hit + heap_blks_read + coalesce(idx_blks_hit, 0) + coalesce(idx_blks_read, 0))::float8
		FROM pg_statio_user_tables WHERE schemaname = current_schema()`).Scan(&n)
	return n, err
}
