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
// with none: what it costs that they wait.
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
		waiting := e.n(100_000)
		none, err := idleCost(ctx, pool)
		if err != nil {
			return err
		}
		if err := startWaiting(ctx, runner, s, pool, waiting); err != nil {
			return err
		}
		many, err := idleCost(ctx, pool)
		if err != nil {
			return err
		}
		r.set("heap", float64(many.heap-none.heap)/float64(waiting))
		r.set("blocks", many.blocks/none.blocks)
		r.set("cpu", many.cpu/none.cpu)
		if os.Getenv("BENCH_VERBOSE") != "" {
			fmt.Fprintf(os.Stderr, "\nnone waiting %+v, %d waiting %+v\n", none, waiting, many)
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
		{id: "S6", what: "blocks that Postgres touches, 100,000 waiting/none", atMost: 1.5, ratio: func(r *results) float64 { return r.values["blocks"] }},
		{id: "S6", what: "CPU of the runner, 100,000 waiting/none", atMost: 1.5, ratio: func(r *results) float64 { return r.values["cpu"] }},
	},
}

func startWaiting(ctx context.Context, r *saga.Runner, s *saga.Saga[sagaState], pool *pgxpool.Pool, n int) error {
	const starters = 128
	errs := make(chan error, starters)
	for w := range starters {
		go func() {
			for i := w; i < n; i += starters {
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
	time.Sleep(time.Second)
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
