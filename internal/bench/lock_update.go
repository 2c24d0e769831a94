package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
)

// Four processes of four writers each add to one row.
var lockUpdateExperiment = experiment{
	ids:  []string{"LK9"},
	what: "updates of one hot row by 16 writers in four processes",
	round: func(ctx context.Context, e *env, r *results) error {
		pool, drop, err := e.schema(ctx)
		if err != nil {
			return err
		}
		defer drop()
		if _, err := pool.Exec(ctx, `CREATE TABLE hot (id text PRIMARY KEY, version bigint NOT NULL, value bigint NOT NULL)`); err != nil {
			return err
		}
		turns, d := 3, time.Second
		if e.quick {
			turns, d = 1, 500*time.Millisecond
		}
		total := make(map[string]hotCount)
		lost := int64(0)
		for range turns {
			for _, mode := range []string{"ours", "for update", "naive", "jitter", "ours alone"} {
				n, missing, err := hotProcesses(ctx, pool, mode, d)
				if err != nil {
					return fmt.Errorf("%s: %w", mode, err)
				}
				sum := total[mode]
				total[mode] = hotCount{sum.Done + n.Done, sum.Attempts + n.Attempts}
				lost += missing
			}
		}
		for mode, n := range total {
			r.set(mode, float64(n.Done))
			r.set(mode+" attempts", float64(n.Attempts)/float64(n.Done))
		}
		r.set("lost", float64(lost))
		return nil
	},
	bars: []bar{
		{id: "LK9", what: "attempts for each update", atMost: 1.5, unit: " ", ratio: func(r *results) float64 { return r.values["ours attempts"] }},
		{id: "LK9", what: "updates/those by SELECT FOR UPDATE", atLeast: 1.5, ratio: func(r *results) float64 { return r.of("ours", "for update") }},
		{id: "LK9", what: "lost updates", atMost: 0.5, unit: " ", ratio: func(r *results) float64 { return r.values["lost"] }},
		{id: "LK9", what: "updates, each stored by itself (Batch 1)/those by SELECT FOR UPDATE, for comparison", atLeast: 0, ratio: func(r *results) float64 { return r.of("ours alone", "for update") }},
		{id: "LK9", what: "attempts of a bare loop, for comparison", atLeast: 0, unit: " ", ratio: func(r *results) float64 { return r.values["naive attempts"] }},
		{id: "LK9", what: "attempts of a loop with full jitter, for comparison", atLeast: 0, unit: " ", ratio: func(r *results) float64 { return r.values["jitter attempts"] }},
	},
}

// A hotCount is what a process has done.
type hotCount struct{ Done, Attempts int64 }

const hotEnv = "BENCH_LOCK_CHILD"

type hotPlan struct {
	DSN, Mode string
	For       time.Duration
}

// hotProcesses runs four children and returns what they have done, and how much of
// that is not there.
func hotProcesses(ctx context.Context, pool *pgxpool.Pool, mode string, d time.Duration) (sum hotCount, lost int64, err error) {
	if _, err := pool.Exec(ctx, `INSERT INTO hot VALUES ('k', 1, 0) ON CONFLICT (id) DO UPDATE SET version = 1, value = 0`); err != nil {
		return sum, 0, err
	}
	plan, err := json.Marshal(hotPlan{DSN: childDSN(pool), Mode: mode, For: d})
	if err != nil {
		return sum, 0, err
	}
	type child struct {
		cmd *exec.Cmd
		out *bufio.Reader
		in  *os.File
	}
	var children []child
	for range 4 {
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), hotEnv+"="+string(plan))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			return sum, 0, err
		}
		r, w, err := os.Pipe()
		if err != nil {
			return sum, 0, err
		}
		cmd.Stdin = r
		if err := cmd.Start(); err != nil {
			return sum, 0, err
		}
		_ = r.Close() // the child has it
		children = append(children, child{cmd, bufio.NewReader(out), w})
	}
	for _, c := range children { // connected
		if _, err := c.out.ReadString('\n'); err != nil {
			return sum, 0, err
		}
	}
	for _, c := range children {
		_ = c.in.Close() // go
	}
	for _, c := range children {
		var n hotCount
		if err := json.NewDecoder(c.out).Decode(&n); err != nil {
			return sum, 0, err
		}
		if err := c.cmd.Wait(); err != nil {
			return sum, 0, err
		}
		sum.Done += n.Done
		sum.Attempts += n.Attempts
	}
	var value int64
	err = pool.QueryRow(ctx, `SELECT value FROM hot`).Scan(&value)
	return sum, sum.Done - value, err
}

// childDSN is the address of the pool with its schema.
func childDSN(pool *pgxpool.Pool) string {
	u, err := url.Parse(pool.Config().ConnString())
	if err != nil {
		panic(err) // the pool was made of it
	}
	return u.String()
}

// hotChild is a child: it connects, waits for its input to end, and works.
func hotChild(ctx context.Context, text string) error {
	var plan hotPlan
	if err := json.Unmarshal([]byte(text), &plan); err != nil {
		return err
	}
	cfg, err := pgxpool.ParseConfig(plan.DSN)
	if err != nil {
		return err
	}
	cfg.MaxConns, cfg.MinConns = 4, 4
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return err
	}
	defer pool.Close()
	var n hotCount
	add := hotWriter(pool, plan.Mode, &n.Attempts)
	if err := pool.Ping(ctx); err != nil {
		return err
	}
	fmt.Println("ready")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // ends with the input
	end := time.Now().Add(plan.For)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range 4 {
		wg.Go(func() {
			for time.Now().Before(end) {
				failed := add(ctx)
				if failed == nil {
					atomic.AddInt64(&n.Done, 1)
					continue
				}
				mu.Lock()
				err = failed
				mu.Unlock()
				return
			}
		})
	}
	wg.Wait()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(n)
}

// hotWriter returns a function that adds one to the row.
func hotWriter(pool *pgxpool.Pool, mode string, attempts *int64) func(ctx context.Context) error {
	rows := lockpg.Rows[int64]{
		DB:      pool,
		Select:  `SELECT version, value FROM hot WHERE id = $1`,
		Update:  `UPDATE hot SET version = version + 1, value = $3 WHERE id = $1 AND version = $2 RETURNING version`,
		Columns: func(v *int64) []any { return []any{v} },
	}
	increment := func(n int64) (int64, error) { return n + 1, nil }
	switch mode {
	case "for update":
		return func(ctx context.Context) error {
			atomic.AddInt64(attempts, 1)
			return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				var n int64
				if err := tx.QueryRow(ctx, `SELECT value FROM hot WHERE id = 'k' FOR UPDATE`).Scan(&n); err != nil {
					return err
				}
				_, err := tx.Exec(ctx, `UPDATE hot SET version = version + 1, value = $1 WHERE id = 'k'`, n+1)
				return err
			})
		}
	case "naive", "jitter":
		return func(ctx context.Context) error {
			for attempt := 0; ; attempt++ {
				n, version, err := rows.Load(ctx, "k")
				if err != nil {
					return err
				}
				atomic.AddInt64(attempts, 1)
				tag, err := pool.Exec(ctx, `UPDATE hot SET version = version + 1, value = $2 WHERE id = 'k' AND version = $1`, version, n+1)
				if err != nil || tag.RowsAffected() == 1 {
					return err
				}
				if mode == "jitter" {
					if err := backoff.Sleep(ctx, backoff.Policy{Base: time.Millisecond, Max: 50 * time.Millisecond}.Next(attempt)); err != nil {
						return err
					}
				}
			}
		}
	}
	opts := &lock.UpdateOptions{Attempts: 10_000, Observer: lock.UpdateObserver{
		Stored:     func(context.Context, string, int) { atomic.AddInt64(attempts, 1) },
		Conflicted: func(context.Context, string, int, error) { atomic.AddInt64(attempts, 1) },
	}}
	if mode == "ours alone" {
		opts.Batch = 1
	}
	u := lock.NewUpdater(rows, opts)
	return func(ctx context.Context) error {
		_, version, err := u.Update(ctx, "k", increment)
		if err == nil && version <= 0 {
			err = errors.New("an update without a version")
		}
		return err
	}
}
