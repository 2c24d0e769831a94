package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	gocronredis "github.com/go-co-op/gocron-redis-lock/v2"
	"github.com/go-co-op/gocron/v2"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/schedulepg"
)

// Five processes of each system, ten schedules with a tick each second, and
// rolling restarts: one process of each is told to stop and replaced, in turn.
// What ran is in a table.
// The instances of gocron share their ticks by a cron expression; its own
// example, an interval from the start of each process, would run five times.
var restartsExperiment = experiment{
	ids:  []string{"J1"},
	what: "five instances, ten schedules of a second, rolling restarts (see -restarts)",
	round: func(ctx context.Context, e *env, r *results) error {
		d := 20 * time.Second
		if e.quick {
			d = 10 * time.Second
		}
		if restartsFor > 0 {
			d = restartsFor
		}
		return restarts(ctx, e, r, d)
	},
	bars: []bar{
		{id: "J1", what: "ticks with more than one row or none", atMost: 0.01, unit: " ", ratio: func(r *results) float64 { return r.values["ours twice"] + r.values["ours missing"] }},
		{id: "J1", what: "ticks that gocron with a Redis lock ran twice or not at all", atLeast: 0.01, unit: " ", ratio: func(r *results) float64 { return r.values["gocron twice"] + r.values["gocron missing"] }},
	},
}

// restartsFor is for how long J1 restarts; zero means its default.
var restartsFor time.Duration

const (
	schedules   = 10
	scheduleEnv = "BENCH_SCHEDULE" // which system a child is an instance of
	scheduleDSN = "BENCH_SCHEDULE_DSN"
)

func restarts(ctx context.Context, e *env, r *results, d time.Duration) error {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return err
	}
	defer drop()
	if err := schedulepg.Migrate(ctx, pool); err != nil {
		return err
	}
	if _, err := pool.Exec(ctx, `CREATE TABLE ran (system text, schedule text, tick timestamptz, instance int)`); err != nil {
		return err
	}
	store := schedulepg.New(pool)
	for i := range schedules {
		d := schedule.Definition{Name: tickName(i), Handler: "tick", Spec: "* * * * * *", Misfire: schedule.MisfireBackfill, Backfill: 1000}
		if _, err := store.Define(ctx, d); err != nil {
			return err
		}
	}
	systems := []string{"ours", "gocron"}
	var running [5][2]*exec.Cmd
	start := func(i int) (err error) {
		for j, system := range systems {
			if running[i][j], err = startInstance(ctx, system, pool.Config().ConnString()); err != nil {
				return err
			}
		}
		return nil
	}
	defer func() {
		for _, pair := range running {
			for _, cmd := range pair {
				if cmd != nil && cmd.ProcessState == nil {
					_ = cmd.Process.Kill() // the measurement has failed already
					_ = cmd.Wait()
				}
			}
		}
	}()
	for i := range running {
		if err := start(i); err != nil {
			return err
		}
	}
	from := time.Now().Truncate(time.Second).Add(2 * time.Second)
	until := from.Add(d)
	time.Sleep(time.Until(from))
	for i := 0; time.Now().Before(until); i = (i + 1) % len(running) {
		time.Sleep(1300 * time.Millisecond)
		if err := stopInstances(running[i][:]); err != nil {
			return err
		}
		if err := start(i); err != nil {
			return err
		}
	}
	time.Sleep(time.Second) // the last tick
	for i := range schedules {
		if err := store.Pause(ctx, tickName(i)); err != nil {
			return err
		}
	}
	for i := range running {
		if err := stopInstances(running[i][:]); err != nil {
			return err
		}
	}
	return countTicks(ctx, pool, r, from, until)
}

// countTicks counts the seconds that have two rows or none. For ours it looks at
// what ran and at the history.
func countTicks(ctx context.Context, pool *pgxpool.Pool, r *results, from, until time.Time) error {
	for name, source := range map[string]string{
		"ours":         `SELECT schedule, tick FROM ran WHERE system = 'ours'`,
		"ours history": `SELECT schedule, tick FROM schedule_run WHERE state = 'done'`,
		"gocron":       `SELECT schedule, tick FROM ran WHERE system = 'gocron'`,
	} {
		var twice, missing float64
		err := pool.QueryRow(ctx, `SELECT count(*) FILTER (WHERE n > 1)::float8, count(*) FILTER (WHERE n = 0)::float8
			FROM (SELECT count(x.tick) AS n FROM generate_series($1::timestamptz, $2::timestamptz, '1 s') s
				CROSS JOIN (SELECT 'tick ' || generate_series(0, $3 - 1) AS name) names
				LEFT JOIN (`+source+`) x ON x.tick = s AND x.schedule = name GROUP BY s, name) t`, from, until, schedules).Scan(&twice, &missing)
		if err != nil {
			return err
		}
		r.set(name+" twice", twice)
		r.set(name+" missing", missing)
	}
	r.values["ours twice"] += r.values["ours history twice"]
	r.values["ours missing"] += r.values["ours history missing"]
	return nil
}

func tickName(i int) string { return fmt.Sprint("tick ", i) }

func startInstance(ctx context.Context, system, dsn string) (*exec.Cmd, error) {
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), scheduleEnv+"="+system, scheduleDSN+"="+dsn)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	_, err = bufio.NewReader(out).ReadString('\n') // it has started
	return cmd, err
}

func stopInstances(cmds []*exec.Cmd) error {
	for _, cmd := range cmds {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
	}
	for _, cmd := range cmds {
		if err := cmd.Wait(); err != nil {
			return err
		}
	}
	return nil
}

// instance is what a child runs until it is told to stop.
func instance(system string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	pool, err := pgxpool.New(ctx, os.Getenv(scheduleDSN))
	if err != nil {
		return err
	}
	defer pool.Close()
	ran := func(name string, tick time.Time) error {
		_, err := pool.Exec(context.WithoutCancel(ctx), `INSERT INTO ran VALUES ($1, $2, $3, $4)`, system, name, tick, os.Getpid())
		return err
	}
	if system == "gocron" {
		return gocronInstance(ctx, ran)
	}
	runner := schedule.New(schedulepg.New(pool), nil)
	runner.Handle("tick", func(_ context.Context, run schedule.Run) error { return ran(run.Schedule.Name, run.Tick) })
	fmt.Println("started")
	return runner.Run(ctx)
}

func gocronInstance(ctx context.Context, ran func(name string, tick time.Time) error) error {
	addr, err := redis.ParseURL(os.Getenv("TEST_REDIS_URL"))
	if err != nil {
		return err
	}
	client := redis.NewClient(addr)
	defer func() { _ = client.Close() }() // the process ends
	locker, err := gocronredis.NewRedisLocker(client, gocronredis.WithTries(1))
	if err != nil {
		return err
	}
	s, err := gocron.NewScheduler(gocron.WithDistributedLocker(locker))
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	for i := range schedules {
		_, err = s.NewJob(gocron.CronJob("* * * * * *", true), gocron.NewTask(func() {
			if err := ran(tickName(i), time.Now().Round(time.Second)); err != nil {
				select {
				case failed <- err:
				default:
				}
			}
		}), gocron.WithName(fmt.Sprint(tickName(i), " of ", os.Getppid())))
		if err != nil {
			return err
		}
	}
	s.Start()
	fmt.Println("started")
	select {
	case <-ctx.Done():
		return s.Shutdown()
	case err := <-failed:
		return errors.Join(err, s.Shutdown())
	}
}
