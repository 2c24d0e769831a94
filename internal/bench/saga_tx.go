package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

// Business transactions that are steps of ten-step sagas, against the same
// transactions by themselves and against DBOS's.
var sagaTxExperiment = experiment{
	ids:  []string{"S3"},
	what: "business transactions as steps of sagas, at 16 clients",
	round: func(ctx context.Context, e *env, r *results) error {
		turns, slice := 4, 500*time.Millisecond
		if e.quick {
			turns = 1
		}
		subjects := make(map[string]sagaSubject)
		for name, open := range map[string]func(context.Context, *pgxpool.Pool) (sagaSubject, error){
			"ours": oursTx, "bare": bareTx, "dbos": dbosTx,
		} {
			pool, drop, err := e.schema(ctx)
			if err != nil {
				return err
			}
			defer drop()
			_, err = pool.Exec(ctx, `CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
				INSERT INTO account SELECT i, 0 FROM generate_series(0, 9999) i`)
			if err != nil {
				return err
			}
			subject, err := open(ctx, pool)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			defer subject.close()
			subjects[name] = subject
		}
		for turn := range turns {
			for name, subject := range subjects {
				start := time.Now()
				n, err := clients(ctx, 16, slice, func(i int) error { return subject.run(ctx, turn*1_000_000+i) })
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				r.values[name] += float64(n*sagaSteps) / time.Since(start).Seconds()
			}
		}
		return nil
	},
	bars: []bar{
		{id: "S3", what: "transactional steps/bare transactions", atLeast: 0.85, ratio: func(r *results) float64 { return r.of("ours", "bare") }},
		{id: "S3", what: "transactional steps/DBOS's", atLeast: 1, ratio: func(r *results) float64 { return r.of("ours", "dbos") }},
	},
}

func oursTx(ctx context.Context, pool *pgxpool.Pool) (sagaSubject, error) {
	if err := sagapg.Migrate(ctx, pool); err != nil {
		return sagaSubject{}, err
	}
	d := saga.New[int]("bench", 1)
	for i := range sagaSteps {
		step := sagapg.Tx(pool, func(ctx context.Context, tx pgx.Tx, n *int) error { return business(ctx, tx, *n*sagaSteps+i) })
		d.Step(fmt.Sprint("step ", i), step, nil, nil)
	}
	s := d.Build()
	runner, stop := runSagas(ctx, pool, s)
	return sagaSubject{
		run:   func(ctx context.Context, i int) error { return oneSaga(ctx, runner, s, fmt.Sprint("saga-", i), i) },
		close: stop,
	}, nil
}

// runSagas runs a runner until stop is called.
func runSagas(ctx context.Context, pool *pgxpool.Pool, s saga.Definition) (r *saga.Runner, stop func()) {
	r = saga.NewRunner(sagapg.New(pool, nil), []saga.Definition{s}, nil)
	rctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- r.Run(rctx) }()
	return r, func() { cancel(); <-done }
}

// oneSaga runs one saga to its end.
func oneSaga[S any](ctx context.Context, r *saga.Runner, s *saga.Saga[S], id string, state S) error {
	if _, err := s.Start(ctx, r, id, state); err != nil {
		return err
	}
	in, err := r.Wait(ctx, id)
	if err == nil && in.Status != saga.Done {
		err = fmt.Errorf("%s is %s: %s", id, in.Status, in.Reason)
	}
	return err
}

func bareTx(_ context.Context, pool *pgxpool.Pool) (sagaSubject, error) {
	return sagaSubject{
		run: func(ctx context.Context, i int) error {
			for k := range sagaSteps {
				if err := bareRequest(ctx, pool, i*sagaSteps+k); err != nil {
					return err
				}
			}
			return nil
		},
		close: func() {},
	}, nil
}

func dbosTx(ctx context.Context, pool *pgxpool.Pool) (sagaSubject, error) {
	dctx, stop := context.WithCancel(ctx)
	system, err := pgxpool.NewWithConfig(ctx, pool.Config()) // which DBOS closes
	if err != nil {
		stop()
		return sagaSubject{}, err
	}
	d, err := dbos.NewContext(dctx, dbos.Config{
		AppName: "bench", SystemDBPool: system, DatabaseSchema: schemaOf(pool), Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		stop()
		return sagaSubject{}, err
	}
	source, err := dbos.NewDataSource(d, pool)
	if err != nil {
		stop()
		return sagaSubject{}, err
	}
	workflow := func(ctx dbos.Context, n int) (int, error) {
		for i := range sagaSteps {
			_, err := dbos.RunAsTransaction(ctx, source, func(ctx context.Context, tx dbos.Tx) (int, error) {
				_, err := tx.Exec(ctx, `UPDATE account SET balance = balance + 1 WHERE id = $1`, (n*sagaSteps+i)%10_000)
				return 0, err
			}, dbos.WithStepName(fmt.Sprint("step ", i)))
			if err != nil {
				return 0, err
			}
		}
		return n, nil
	}
	dbos.RegisterWorkflow(d, workflow)
	if err := dbos.Launch(d); err != nil {
		stop()
		return sagaSubject{}, err
	}
	return sagaSubject{
		run: func(_ context.Context, i int) error {
			h, err := dbos.RunWorkflow(d, workflow, i, dbos.WithWorkflowID(fmt.Sprint("saga-", i)))
			if err != nil {
				return err
			}
			_, err = h.GetResult()
			return err
		},
		close: func() {
			_ = dbos.Shutdown(d, 5*time.Second) // it has nothing more to do
			stop()
		},
	}, nil
}

func schemaOf(pool *pgxpool.Pool) string {
	return pool.Config().ConnConfig.RuntimeParams["search_path"]
}
