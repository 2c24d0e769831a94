package sagapg_test

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

const crashLease = 400 * time.Millisecond

// declined decides which sagas are compensated.
func declined(id string) bool { return crc32.ChecksumIEEE([]byte(id))%2 == 0 }

// crashTrip is a saga of steps of every kind, whose effects are rows. c stops it
// at named points.
func crashTrip(pool *pgxpool.Pool, c *crashtest.Child) *saga.Saga[order] {
	// A participant with a database of its own, which this stands for.
	outside := func(ctx context.Context, _ *order) error {
		ctx = context.WithoutCancel(ctx) // a zombie does not notice
		call := saga.CurrentCall(ctx)
		kind := "do"
		if call.Compensating {
			kind = "undo"
		}
		c.At("before "+kind, call.Saga)
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			if strings.HasSuffix(c.Mode, "without a barrier") {
				_, err := tx.Exec(ctx, `INSERT INTO effect (saga, kind, nonce) VALUES ($1, $2, 1)`, call.Saga, call.Step)
				return err
			}
			return participate(ctx, tx, call)
		})
		c.At("in "+kind, call.Saga)
		return err
	}
	inside := sagapg.Tx(pool, func(ctx context.Context, tx pgx.Tx, o *order) error {
		ctx = context.WithoutCancel(ctx)
		call := saga.CurrentCall(ctx)
		o.Nonce++
		effect := 1
		if call.Compensating {
			effect = -1
		}
		_, err := tx.Exec(ctx, `INSERT INTO effect (saga, kind, nonce) VALUES ($1, $2, $3)`, call.Saga, call.Step, effect)
		c.At("in tx", call.Saga)
		return err
	})
	opts := &saga.StepOptions{MaxAttempts: 1000, UndoMaxAttempts: 1000, RetryBase: time.Millisecond, RetryMax: 20 * time.Millisecond}
	return saga.New[order]("trip", 1).
		Step("hotel", outside, outside, opts).
		Step("order", inside, inside, opts).
		Parallel(
			func(d *saga.Draft[order]) { d.Step("flight", outside, outside, opts) },
			func(d *saga.Draft[order]) { d.Step("car", outside, outside, opts) },
		).
		Pivot("charge", func(ctx context.Context, o *order) error {
			if declined(saga.CurrentCall(ctx).Saga) {
				return saga.Abort(errors.New("declined"))
			}
			return outside(ctx, o)
		}, opts).
		Step("ticket", inside, opts).
		Build()
}

// SAGA_CRASH_FULL=1 runs the long form, which takes minutes.
func crashStorm(dsn string, points ...string) crashtest.Storm {
	s := crashtest.Storm{
		Test: "TestCrashChild", Points: points, Kills: 28, Processes: 3, Window: 24,
		Plan: crashtest.Plan{Mode: "run", Backend: dsn},
	}
	if os.Getenv("SAGA_CRASH_FULL") != "" {
		s.Kills, s.Processes, s.Window = 250, 4, 32 // about a thousand sagas
	}
	return s
}

func crashBooks(t *testing.T) (*pgxpool.Pool, string) {
	t.Helper()
	dsn := pgtest.URL(t)
	pool := pgtest.Open(t, dsn)
	must(t, sagapg.Migrate(t.Context(), pool))
	sql(t, pool, `CREATE TABLE effect (saga text, kind text, nonce int)`)
	return pool, dsn
}

// Runners are killed at every boundary of a step and within each kind of do and
// undo. Every saga ends, with all of its effects or with none.
func TestCrash(t *testing.T) {
	pool, dsn := crashBooks(t)
	points := []string{"before do", "in do", "in tx", "stepped", "before undo", "in undo", crashtest.Anywhere}
	storm := crashStorm(dsn, points...)
	keys, landed, _ := storm.Run(t)
	t.Logf("kills: %v, sagas: %d", landed, keys)
	for _, point := range points {
		if landed[point] == 0 && point != crashtest.Anywhere {
			t.Errorf("no kill landed at %q", point)
		}
	}
	if t.Failed() {
		return
	}
	storm.Sweep(t, keys)
	allOrNothing(t, pool, keys)
}

func allOrNothing(t *testing.T, pool *pgxpool.Pool, keys int) {
	t.Helper()
	for what, query := range map[string]string{
		"sagas have not ended": `SELECT $1 - count(*) FROM (SELECT id FROM saga_instance WHERE status IN ('done', 'compensated')
			UNION ALL SELECT id FROM saga_archive) AS ended`,
		"sagas are done without each effect once": `SELECT count(*) FROM saga_instance s WHERE status = 'done' AND $1 > 0 AND
			(SELECT count(*) FILTER (WHERE nonce = 1) * 10 + count(*) FROM effect WHERE saga = s.id) <> 66`,
		"sagas are compensated and left effects": `SELECT count(*) FROM saga_instance s WHERE status = 'compensated' AND $1 > 0 AND
			EXISTS (SELECT FROM effect WHERE saga = s.id GROUP BY kind HAVING sum(nonce) <> 0 OR count(*) <> 2 OR kind IN ('charge', 'ticket'))`,
		"sagas do not say what was decided": `SELECT count(*) FROM saga_instance s WHERE $1 > 0 AND
			(status = 'done') <> EXISTS (SELECT FROM effect WHERE saga = s.id AND kind = 'charge')`,
	} {
		if n := count(t, pool, query, keys); n != 0 {
			t.Errorf("%d %s", n, what)
		}
	}
	if n := count(t, pool, `SELECT count(DISTINCT status) FROM saga_instance`); keys > 20 && n != 2 {
		t.Errorf("%d kinds of ends among %d sagas, want both", n, keys)
	}
}

// TestCrashChild starts its sagas, runs whatever is due, and waits for its own to
// end.
func TestCrashChild(t *testing.T) {
	c := crashtest.Current(t)
	pool := pgtest.Open(t, c.Backend)
	s := crashTrip(pool, c)
	r := saga.NewRunner(sagapg.New(pool, &sagapg.Options{Keep: time.Hour}), []saga.Definition{s}, &saga.Options{
		Lease: crashLease, Poll: 20 * time.Millisecond, MaxDeaths: 1000, Logger: slog.New(slog.DiscardHandler),
		Observer: saga.Observer{Stepped: func(_ context.Context, in saga.Instance, _ saga.Call, _ error, _ time.Duration) {
			c.At("stepped", in.ID)
		}},
	})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	for i := c.From; i < c.To; i++ {
		if _, err := s.Start(ctx, r, fmt.Sprint("trip ", i), order{}); err != nil {
			t.Error(err)
		}
	}
	for i := c.From; i < c.To; i++ {
		if in, err := r.Wait(ctx, fmt.Sprint("trip ", i)); err != nil || !in.Status.Ended() {
			t.Errorf("%s is %s: %s, %v", in.ID, in.Status, in.Reason, err)
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A process that is paused in the middle of a step, for longer than its lease,
// must not add its effect to that of whoever took the saga over.
func TestCrashZombie(t *testing.T) {
	pool, dsn := crashBooks(t)
	for i, point := range []string{"in tx", "before do", "in do", "stepped"} {
		zombie(t, "pause", point, dsn, i)
	}
	allOrNothing(t, pool, 4)
}

func zombie(t *testing.T, mode, point, dsn string, i int) {
	t.Helper()
	plan := crashtest.Plan{Mode: mode, Backend: dsn, Point: point, From: i, To: i + 1}
	p := crashtest.Start(t, "TestCrashChild", plan)
	if line := <-p.Lines; !strings.HasPrefix(line, "at ") {
		t.Fatalf("the child reports %q", line)
	}
	p.Signal(syscall.SIGSTOP)
	plan.Point = ""
	other := crashtest.Start(t, "TestCrashChild", plan)
	took := other.Wait()
	p.Continue()
	if !took {
		t.Errorf("the saga was not taken over from one that was paused %s", point)
	}
	if !p.Wait() {
		t.Errorf("the child that was paused %s did not end well", point)
	}
}

const crashMutantEnv = "SAGAPG_CRASH_MUTANT"

// TestCrashMutant runs the checks on participants that have no barrier; only
// TestCrashMutantIsCaught sets the environment.
func TestCrashMutant(t *testing.T) {
	if os.Getenv(crashMutantEnv) == "" {
		t.Skip("runs as a child of TestCrashMutantIsCaught")
	}
	pool, dsn := crashBooks(t)
	zombie(t, "pause without a barrier", "in do", dsn, 0)
	allOrNothing(t, pool, 1)
}

// The crash checks notice an effect that happened twice.
func TestCrashMutantIsCaught(t *testing.T) {
	migrated(t) // skips without a server
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrashMutant$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), crashMutantEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "effect") {
		t.Errorf("the checks did not notice:\n%s", out)
	}
}
