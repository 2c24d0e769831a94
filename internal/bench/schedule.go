package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"

	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/schedulepg"
)

// The time from a tick of each second to the start of its work. A tick is rare,
// so each system has one slice in a round.
var tickLatencyExperiment = experiment{
	ids:  []string{"J2"},
	what: "p99 from a tick of each second to the start of its work",
	round: func(ctx context.Context, e *env, r *results) error {
		ticks := 15
		if e.quick {
			ticks = 4
		}
		for _, system := range []struct {
			name    string
			measure func(ctx context.Context, pool *pgxpool.Pool, late *lateness) error
		}{
			{"ours", oursTicks},
			{"river", func(ctx context.Context, pool *pgxpool.Pool, late *lateness) error {
				return riverTicks(ctx, pool, late, &river.Config{})
			}},
			{"river fast", func(ctx context.Context, pool *pgxpool.Pool, late *lateness) error {
				return riverTicks(ctx, pool, late, &river.Config{FetchCooldown: time.Millisecond, FetchPollInterval: 10 * time.Millisecond})
			}},
			{"floor", bareTicks},
		} {
			late, err := tickLatency(ctx, e, ticks, system.measure)
			if err != nil {
				return fmt.Errorf("%s: %w", system.name, err)
			}
			r.set(system.name, late.percentile(99))
			r.set(system.name+" p50", late.percentile(50))
		}
		return nil
	},
	bars: []bar{
		{id: "J2", what: "p99 of the lateness/River's with its default settings", atMost: 0.1, ratio: func(r *results) float64 { return r.of("ours", "river") }},
		{id: "J2", what: "p99 of the lateness/River's that fetches each millisecond", atMost: 1, ratio: func(r *results) float64 { return r.of("ours", "river fast") }},
		{id: "J2", what: "p99 of the lateness/(timer and one INSERT)", atMost: 5, ratio: func(r *results) float64 { return r.of("ours", "floor") }},
	},
}

// A lateness collects how late ticks were, without the first, for which
// statements are prepared.
type lateness struct {
	mu    sync.Mutex
	all   []float64
	first bool
	want  int
	done  chan struct{}
}

func (l *lateness) add(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.first {
		l.first = true
		return
	}
	l.all = append(l.all, d.Seconds())
	if len(l.all) == l.want {
		close(l.done)
	}
}

func (l *lateness) percentile(p float64) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	slices.Sort(l.all)
	return l.all[int(math.Ceil(float64(l.want)*p/100))-1]
}

func tickLatency(ctx context.Context, e *env, ticks int, measure func(context.Context, *pgxpool.Pool, *lateness) error) (*lateness, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return nil, err
	}
	defer drop()
	late := &lateness{want: ticks, done: make(chan struct{})}
	if err := measure(ctx, pool, late); err != nil {
		return nil, err
	}
	return late, nil
}

func oursTicks(ctx context.Context, pool *pgxpool.Pool, late *lateness) error {
	if err := schedulepg.Migrate(ctx, pool); err != nil {
		return err
	}
	store := schedulepg.New(pool)
	if _, err := store.Define(ctx, schedule.Definition{Name: "tick", Spec: "every 1s"}); err != nil {
		return err
	}
	runner := schedule.New(store, nil)
	runner.Handle("tick", func(_ context.Context, run schedule.Run) error {
		late.add(time.Since(run.Tick))
		return nil
	})
	rctx, stop := context.WithCancel(ctx)
	defer stop()
	finished := make(chan error, 1)
	go func() { finished <- runner.Run(rctx) }()
	<-late.done
	stop()
	return <-finished
}

type riverTick struct{}

func (riverTick) Kind() string { return "tick" }

type riverTickWorker struct {
	river.WorkerDefaults[riverTick]
	late *lateness
}

func (w *riverTickWorker) Work(_ context.Context, job *river.Job[riverTick]) error {
	w.late.add(time.Since(job.ScheduledAt)) // when it was to be inserted
	return nil
}

func riverTicks(ctx context.Context, pool *pgxpool.Pool, late *lateness, cfg *river.Config) error {
	driver := riverpgxv5.New(pool)
	migrator, err := rivermigrate.New(driver, nil)
	if err != nil {
		return err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return err
	}
	workers := river.NewWorkers()
	river.AddWorker(workers, &riverTickWorker{late: late})
	cfg.Queues = map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 100}}
	cfg.Workers = workers
	cfg.PeriodicJobs = []*river.PeriodicJob{river.NewPeriodicJob(river.PeriodicInterval(time.Second),
		func() (river.JobArgs, *river.InsertOpts) { return riverTick{}, nil }, nil)}
	client, err := river.NewClient(driver, cfg)
	if err != nil {
		return err
	}
	if err := client.Start(ctx); err != nil {
		return err
	}
	<-late.done
	return client.Stop(ctx)
}

// bareTicks sleeps until each tick and makes its row.
func bareTicks(ctx context.Context, pool *pgxpool.Pool, late *lateness) error {
	if _, err := pool.Exec(ctx, `CREATE TABLE bare (schedule text, tick timestamptz, PRIMARY KEY (schedule, tick))`); err != nil {
		return err
	}
	for {
		tick := time.Now().Truncate(time.Second).Add(time.Second)
		time.Sleep(time.Until(tick))
		if _, err := pool.Exec(ctx, `INSERT INTO bare VALUES ('tick', $1)`, tick); err != nil {
			return err
		}
		late.add(time.Since(tick))
		select {
		case <-late.done:
			return nil
		default:
		}
	}
}
