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

// The time from a tick of each second to the start of its work. So that there
// are enough ticks for a p99 and all see the same moments of the machine, the
// systems run side by side, a quarter of a second apart.
var tickLatencyExperiment = experiment{
	ids:  []string{"J2"},
	what: "p99 from a tick of each second to the start of its work",
	round: func(ctx context.Context, e *env, r *results) error {
		ticks := 120
		if e.quick {
			ticks = 10
		}
		systems := []struct {
			name    string
			measure func(ctx context.Context, pool *pgxpool.Pool, late *lateness) error
		}{
			{"ours", oursTicks},
			{"river", func(ctx context.Context, pool *pgxpool.Pool, late *lateness) error {
				return riverTicks(ctx, pool, late, &river.Config{}, 250*time.Millisecond)
			}},
			{"floor", bareTicks},
			{"river fast", func(ctx context.Context, pool *pgxpool.Pool, late *lateness) error {
				return riverTicks(ctx, pool, late, &river.Config{FetchCooldown: time.Millisecond, FetchPollInterval: 10 * time.Millisecond}, 750*time.Millisecond)
			}},
		}
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		var wg sync.WaitGroup
		all := make([]*lateness, len(systems))
		for i, system := range systems {
			all[i] = &lateness{want: ticks, done: make(chan struct{})}
			wg.Go(func() {
				if err := tickLatency(ctx, e, all[i], system.measure); err != nil {
					cancel(fmt.Errorf("%s: %w", system.name, err))
				}
			})
		}
		wg.Wait()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		for i, system := range systems {
			r.set(system.name, all[i].percentile(99))
			r.set(system.name+" p50", all[i].percentile(50))
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
	if len(l.all) == l.want {
		return
	}
	if l.all = append(l.all, d.Seconds()); len(l.all) == l.want {
		close(l.done)
	}
}

func (l *lateness) percentile(p float64) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	slices.Sort(l.all)
	return l.all[int(math.Ceil(float64(l.want)*p/100))-1]
}

func tickLatency(ctx context.Context, e *env, late *lateness, measure func(context.Context, *pgxpool.Pool, *lateness) error) error {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return err
	}
	defer drop()
	return measure(ctx, pool, late)
}

// wait waits for the last tick.
func (l *lateness) wait(ctx context.Context) {
	select {
	case <-l.done:
	case <-ctx.Done():
	}
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
	late.wait(ctx)
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

func riverTicks(ctx context.Context, pool *pgxpool.Pool, late *lateness, cfg *river.Config, phase time.Duration) error {
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
	time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second + phase))) // its ticks are counted from here
	if err := client.Start(ctx); err != nil {
		return err
	}
	late.wait(ctx)
	return client.Stop(ctx)
}

// bareTicks sleeps until each tick, at half a second, and makes its row.
func bareTicks(ctx context.Context, pool *pgxpool.Pool, late *lateness) error {
	if _, err := pool.Exec(ctx, `CREATE TABLE bare (schedule text, tick timestamptz, PRIMARY KEY (schedule, tick))`); err != nil {
		return err
	}
	for {
		tick := time.Now().Add(500 * time.Millisecond).Truncate(time.Second).Add(500 * time.Millisecond)
		time.Sleep(time.Until(tick))
		if _, err := pool.Exec(ctx, `INSERT INTO bare VALUES ('tick', $1)`, tick); err != nil {
			return err
		}
		late.add(time.Since(tick))
		select {
		case <-late.done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
	}
}
