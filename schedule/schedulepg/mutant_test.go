package schedulepg_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/schedulepg"
	"github.com/ashlar-go/ashlar/schedule/scheduletest"
)

// A mutant is a store with one rule taken out.
type mutant struct {
	*schedulepg.Store
	pool *pgxpool.Pool
	rule string
}

func (m mutant) Claim(ctx context.Context, req schedule.ClaimRequest) (schedule.Claim, error) {
	switch {
	case m.rule == "unique" && len(req.Decisions) > 0:
		return m.lockAroundTheTick(ctx, req)
	case m.rule == "queue":
		return m.ClaimTogether(ctx, req)
	case m.rule == "lease" && req.Slots > 0:
		if _, err := m.pool.Exec(ctx, `UPDATE schedule_run SET lease_until = now() WHERE state = 'running'`); err != nil {
			return schedule.Claim{}, err
		}
	case m.rule == "due":
		for _, d := range req.Decisions {
			for i := range d.Ticks {
				d.Ticks[i].Due = time.Now().Add(-time.Hour)
			}
		}
	}
	return m.Store.Claim(ctx, req)
}

// lockAroundTheTick is what schedulers with a distributed lock do: whoever gets
// the lock runs the tick, and lets the lock go. The one that comes a moment
// later gets it too.
func (m mutant) lockAroundTheTick(ctx context.Context, req schedule.ClaimRequest) (claim schedule.Claim, err error) {
	d := req.Decisions[0]
	err = pgx.BeginFunc(ctx, m.pool, func(tx pgx.Tx) error {
		var locked bool
		if err := tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock(hashtext($1))`, d.Name+d.Ticks[0].At.String()).Scan(&locked); err != nil || !locked {
			return err
		}
		for _, t := range d.Ticks {
			if _, err := tx.Exec(ctx, `INSERT INTO schedule_run (id, schedule, tick, due_at, state, attempt, instance, lease_until, started_at)
				VALUES ($1::uuid, $2, $3, $4, 'running', 1, $5, now() + $6::interval, now())`, t.ID, d.Name, t.At, t.Due, req.Instance, req.Lease); err != nil {
				return err
			}
			claim.Runs = append(claim.Runs, schedule.Run{ID: t.ID, Tick: t.At, Attempt: 1})
		}
		_, err := tx.Exec(ctx, `UPDATE schedule_definition SET next_tick = $2, next_due = $2 WHERE name = $1`, d.Name, d.Next)
		return err
	})
	return claim, err
}

// Finish without "fence" takes the outcome of whoever comes.
func (m mutant) Finish(ctx context.Context, run schedule.Ref, o schedule.Outcome) (bool, error) {
	if m.rule == "fence" {
		if err := m.pool.QueryRow(ctx, `SELECT attempt FROM schedule_run WHERE id = $1::uuid`, run.ID).Scan(&run.Attempt); err != nil {
			return false, err
		}
	}
	return m.Store.Finish(ctx, run, o)
}

const mutantEnv = "SCHEDULEPG_MUTANT"

// TestMutant runs the suite on the mutant that the environment names; only
// TestMutantsAreCaught sets it.
func TestMutant(t *testing.T) {
	rule := os.Getenv(mutantEnv)
	if rule == "" {
		t.Skip("runs as a child of TestMutantsAreCaught")
	}
	scheduletest.TestStore(t, func(t *testing.T) scheduletest.Store {
		pool := migrated(t)
		if rule == "unique" {
			if _, err := pool.Exec(t.Context(), `DROP INDEX schedule_run_tick`); err != nil {
				t.Fatal(err)
			}
		}
		return mutant{schedulepg.New(pool), pool, rule}
	})
}

// Taking out any of the rules that the guarantees rest on turns the suite red.
func TestMutantsAreCaught(t *testing.T) {
	migrated(t) // skips without a server
	crashtest.Mutants(t, mutantEnv, map[string][]string{
		"none":   {"OneRowForATick", "TickThatHasARow", "LeaseEndsThenTakeover", "Retry", "ExtendKeepsTheRun", "OverlapUnderConcurrency", "NotDue"},
		"unique": {"OneRowForATick", "TickThatHasARow"},
		"fence":  {"LeaseEndsThenTakeover", "Retry"},
		"lease":  {"LeaseEndsThenTakeover", "ExtendKeepsTheRun"},
		"queue":  {"OverlapUnderConcurrency"},
		"due":    {"NotDue"},
	})
}
