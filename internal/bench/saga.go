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

const sagaSteps = 10

// Sagas of ten steps that do nothing, against DBOS's workflows and against bare
// statements: one INSERT of the saga, and for each step one that is fenced by
// its owner.
var sagaExperiment = experiment{
	ids:  []string{"S1", "S2"},
	what: "steps of ten-step sagas in Postgres, by 1 and by 64 clients",
	round: func(ctx context.Context, e *env, r *results) error {
		subjects := map[string]func(context.Context, *env) (sagaSubject, error){"ours": oursSagas, "dbos": dbosSagas, "bare": bareSagas}
		turns, slice := 3, 700*time.Millisecond
		if e.quick {
			turns = 1
		}
		for name, open := range subjects {
			subject, err := open(ctx, e)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			defer subject.close()
			if _, err := clients(ctx, 4, 200*time.Millisecond, func(i int) error { return subject.run(ctx, -1-i) }); err != nil { // warm
				return fmt.Errorf("%s: %w", name, err)
			}
			subjects[name] = func(context.Context, *env) (sagaSubject, error) { return subject, nil }
		}
		for turn := range turns {
			for _, c := range []int{1, 64} {
				for name, open := range subjects {
					subject, _ := open(ctx, e) // is open
					start := time.Now()
					n, err := clients(ctx, c, slice, func(i int) error { return subject.run(ctx, (turn*100+c)*1_000_000+i) })
					if err != nil {
						return fmt.Errorf("%s at %d: %w", name, c, err)
					}
					r.values[fmt.Sprint(name, c)] += float64(n*sagaSteps) / time.Since(start).Seconds()
				}
			}
		}
		return nil
	},
	bars: []bar{
		{id: "S1", what: "steps at 1 client/DBOS", atLeast: 5, ratio: func(r *results) float64 { return r.of("ours1", "dbos1") }},
		{id: "S1", what: "steps at 64 clients/DBOS", atLeast: 8, ratio: func(r *results) float64 { return r.of("ours64", "dbos64") }},
		{id: "S2", what: "steps at 1 client/bare fenced inserts", atLeast: 0.9, ratio: func(r *results) float64 { return r.of("ours1", "bare1") }},
		{id: "S2", what: "steps at 64 clients/bare fenced inserts", atLeast: 1.5, ratio: func(r *results) float64 { return r.of("ours64", "bare64") }},
	},
}

// A sagaSubject runs one saga to its end.
type sagaSubject struct {
	run   func(ctx context.Context, i int) error
	close func()
}

type sagaState struct{ Order, Payment string }

func oursSagas(ctx context.Context, e *env) (sagaSubject, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return sagaSubject{}, err
	}
	if err := sagapg.Migrate(ctx, pool); err != nil {
		drop()
		return sagaSubject{}, err
	}
	nothing := func(context.Context, *sagaState) error { return nil }
	d := saga.New[sagaState]("bench", 1)
	for i := range sagaSteps {
		d.Step(fmt.Sprint("step ", i), nothing, nothing, nil)
	}
	s := d.Build()
	runner, stop := runSagas(ctx, pool, s)
	return sagaSubject{
		run: func(ctx context.Context, i int) error {
			id := fmt.Sprint("saga-", i)
			return oneSaga(ctx, runner, s, id, sagaState{Order: id})
		},
		close: func() { stop(); drop() },
	}, nil
}

func dbosSagas(ctx context.Context, e *env) (sagaSubject, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return sagaSubject{}, err
	}
	dctx, stop := context.WithCancel(ctx)
	d, err := dbos.NewContext(dctx, dbos.Config{
		AppName: "bench", SystemDBPool: pool, DatabaseSchema: schemaOf(pool),
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		stop()
		drop()
		return sagaSubject{}, err
	}
	step := func(context.Context) (string, error) { return "", nil }
	workflow := func(ctx dbos.Context, in sagaState) (string, error) {
		for i := range sagaSteps {
			if _, err := dbos.RunAsStep(ctx, step, dbos.WithStepName(fmt.Sprint("step ", i))); err != nil {
				return "", err
			}
		}
		return in.Order, nil
	}
	dbos.RegisterWorkflow(d, workflow)
	if err := dbos.Launch(d); err != nil {
		stop()
		drop()
		return sagaSubject{}, err
	}
	return sagaSubject{
		run: func(_ context.Context, i int) error {
			id := fmt.Sprint("saga-", i)
			h, err := dbos.RunWorkflow(d, workflow, sagaState{Order: id}, dbos.WithWorkflowID(id))
			if err != nil {
				return err
			}
			_, err = h.GetResult()
			return err
		},
		close: func() {
			_ = dbos.Shutdown(d, 5*time.Second) // closes the pool
			stop()
			drop()
		},
	}, nil
}

func bareSagas(ctx context.Context, e *env) (sagaSubject, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return sagaSubject{}, err
	}
	_, err = pool.Exec(ctx, `CREATE TABLE flow (id text PRIMARY KEY, owner text NOT NULL, state bytea NOT NULL, started_at timestamptz NOT NULL DEFAULT now());
		CREATE TABLE flow_step (flow text NOT NULL, name text NOT NULL, outcome text NOT NULL, state bytea NOT NULL,
			ended_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (flow, name))`)
	if err != nil {
		drop()
		return sagaSubject{}, err
	}
	return sagaSubject{
		run:   func(ctx context.Context, i int) error { return bareSaga(ctx, pool, fmt.Sprint("saga-", i)) },
		close: drop,
	}, nil
}

func bareSaga(ctx context.Context, pool *pgxpool.Pool, id string) error {
	state := []byte(`{"Order":"` + id + `","Payment":""}`)
	if _, err := pool.Exec(ctx, `INSERT INTO flow (id, owner, state) VALUES ($1, 'me', $2)`, id, state); err != nil {
		return err
	}
	for i := range sagaSteps {
		tag, err := pool.Exec(ctx, `INSERT INTO flow_step (flow, name, outcome, state)
			SELECT id, $2, 'ok', $3 FROM flow WHERE id = $1 AND owner = 'me' FOR SHARE`, id, fmt.Sprint("step ", i), state)
		if err != nil {
			return err
		}
		if tag.RowsAffected() != 1 {
			return pgx.ErrNoRows
		}
	}
	return nil
}
