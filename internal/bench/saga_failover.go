package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

const (
	failoverLease = time.Second
	failoverSagas = 40 // of each instance

	sagaEnv  = "BENCH_SAGA"     // what a child is, and its number
	sagaDSN  = "BENCH_SAGA_DSN" // of the schema
	sagaName = "BENCH_SAGA_SCHEMA"
)

// Three instances with forty sagas in hand each, one of which is killed: how long
// it takes until all of its sagas are in the hands of the others. The same with
// DBOS, which has no failover without its control plane.
var failoverExperiment = experiment{
	ids:  []string{"S4"},
	what: "sagas of one of three instances that is killed",
	round: func(ctx context.Context, e *env, r *results) error {
		took, err := failover(ctx, e, "ashlar", `SELECT count(*) FROM saga_instance s JOIN saga_runner r ON r.id = s.owner
			WHERE s.id LIKE '0-%' AND s.status = 'running' AND s.owner = (SELECT owner FROM victim)`)
		if err != nil {
			return err
		}
		r.set("ashlar", took.last.Seconds()/failoverLease.Seconds())
		took, err = failover(ctx, e, "dbos", `SELECT count(*) FROM workflow_status WHERE executor_id = '0' AND status = 'PENDING'`)
		if err != nil {
			return err
		}
		r.set("dbos", float64(failoverSagas-took.left))
		return nil
	},
	bars: []bar{
		{id: "S4", what: "until all sagas of a killed instance are taken over/lease", atMost: 1.2, ratio: func(r *results) float64 { return r.values["ashlar"] }},
		{id: "S4", what: "workflows of a killed instance that DBOS resumes within three leases", atMost: 0.5, unit: " ", ratio: func(r *results) float64 { return r.values["dbos"] }},
	},
}

type failedOver struct {
	last time.Duration // until the last one was taken over
	left int           // how many were not
}

func failover(ctx context.Context, e *env, system, remaining string) (out failedOver, err error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return out, err
	}
	defer drop()
	if system == "ashlar" {
		if err := sagapg.Migrate(ctx, pool); err != nil {
			return out, err
		}
	}
	var children []*exec.Cmd
	defer func() {
		for _, c := range children {
			_ = c.Process.Kill() // or it has ended
			_ = c.Wait()
		}
	}()
	for i := range 3 {
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), sagaEnv+"="+fmt.Sprint(system, " ", i), sagaDSN+"="+pool.Config().ConnString(), sagaName+"="+schemaOf(pool))
		cmd.Stderr = os.Stderr
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			return out, err
		}
		if err := cmd.Start(); err != nil {
			return out, err
		}
		children = append(children, cmd)
		if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
			return out, fmt.Errorf("%s %d: %w after %q", system, i, err, line)
		}
	}
	if system == "ashlar" {
		_, err := pool.Exec(ctx, `CREATE TABLE victim AS SELECT owner FROM saga_instance WHERE id = '0-0'`)
		if err != nil {
			return out, err
		}
	}
	left := 0
	if err := pool.QueryRow(ctx, remaining).Scan(&left); err != nil || left != failoverSagas {
		return out, fmt.Errorf("%s: %d sagas in the victim's hand, want %d: %w", system, left, failoverSagas, err)
	}
	if err := children[0].Process.Kill(); err != nil {
		return out, err
	}
	killed := time.Now()
	for time.Since(killed) < 3*failoverLease {
		if err := pool.QueryRow(ctx, remaining).Scan(&out.left); err != nil {
			return out, err
		}
		if out.last = time.Since(killed); out.left == 0 {
			return out, nil
		}
		time.Sleep(2 * time.Millisecond)
	}
	return out, nil
}

// sagaChild is one instance: it starts its sagas, says so, and runs until it is
// killed.
func sagaChild(plan string) error {
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	var system, number string
	if _, err := fmt.Sscan(plan, &system, &number); err != nil {
		return err
	}
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv(sagaDSN))
	if err != nil {
		return err
	}
	if system == "dbos" {
		return dbosChild(ctx, pool, number)
	}
	wait := func(ctx context.Context, _ *int) error { <-ctx.Done(); return ctx.Err() }
	s := saga.New[int]("long", 1).Step("wait", wait, nil, &saga.StepOptions{Timeout: time.Hour}).Build()
	r := saga.NewRunner(sagapg.New(pool, nil), []saga.Definition{s}, &saga.Options{Lease: failoverLease})
	go func() {
		for i := range failoverSagas {
			for { // until it is in this runner's hand
				id := fmt.Sprint(number, "-", i)
				if _, err := s.Start(ctx, r, id, 0); err != nil {
					fmt.Fprintln(os.Stderr, err)
				}
				if in, err := r.Get(ctx, id); err == nil && in.Owner != "" {
					break
				}
			}
		}
		fmt.Println("ready")
	}()
	return r.Run(ctx)
}

func dbosChild(ctx context.Context, pool *pgxpool.Pool, number string) error {
	d, err := dbos.NewContext(ctx, dbos.Config{
		AppName: "bench", SystemDBPool: pool, DatabaseSchema: os.Getenv(sagaName), ExecutorID: number, ApplicationVersion: "1",
		Logger: slog.Default(),
	})
	if err != nil {
		return err
	}
	workflow := func(ctx dbos.Context, n int) (int, error) {
		return dbos.RunAsStep(ctx, func(ctx context.Context) (int, error) { <-ctx.Done(); return n, ctx.Err() })
	}
	dbos.RegisterWorkflow(d, workflow)
	if err := dbos.Launch(d); err != nil {
		return err
	}
	for i := range failoverSagas {
		if _, err := dbos.RunWorkflow(d, workflow, i, dbos.WithWorkflowID(fmt.Sprint(number, "-", i))); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	select {}
}
