package idempotencypg_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/internal/ids"
	"github.com/ashlar-go/ashlar/internal/pgtest"
)

const crashLease = 300 * time.Millisecond

// IDEMPOTENCY_CRASH_FULL=1 runs the long form: at least 64 duplicates of each of
// 10,000 keys and 250 kills, which takes minutes.
func storm(mode, dsn string, points ...string) crashtest.Storm {
	s := crashtest.Storm{
		Test: "TestCrashChild", Points: points, Kills: 24, Processes: 3, Window: 12,
		Plan: crashtest.Plan{Mode: mode, Backend: dsn, Duplicates: 4},
	}
	if os.Getenv("IDEMPOTENCY_CRASH_FULL") != "" {
		s.Kills, s.Processes, s.Window, s.Plan.Duplicates = 250, 8, 640, 8
	}
	return s
}

func crashLedger(t *testing.T) (*pgxpool.Pool, string) {
	t.Helper()
	dsn := pgtest.URL(t)
	pool := pgtest.Open(t, dsn)
	if err := idempotencypg.Migrate(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	run(t, pool, `CREATE TABLE effect (id text NOT NULL, nonce text NOT NULL)`)
	return pool, dsn
}

// Children run duplicates of the same keys and are killed at every step. The
// effect of each key is there exactly once, and all saw the same result.
func TestCrash(t *testing.T) {
	for mode, points := range map[string][]string{
		"one transaction": {"claimed", "worked", "committed", crashtest.Anywhere},
		"two phases":      {"claimed", "worked", "completed", "committed", crashtest.Anywhere},
	} {
		t.Run(mode, func(t *testing.T) {
			pool, dsn := crashLedger(t)
			storm := storm(mode, dsn, points...)
			keys, landed, at := storm.Run(t)
			t.Logf("kills: %v, keys: %d", landed, keys)
			for _, point := range points {
				if landed[point] == 0 && point != crashtest.Anywhere {
					t.Errorf("no kill landed at %q", point)
				}
			}
			if t.Failed() {
				return
			}
			// What the dead have claimed is free within a lease, by the database's clock.
			if n := count(t, pool, `SELECT count(*) FROM idempotency_key WHERE lease_until > clock_timestamp() + $1::interval`, crashLease); n != 0 {
				t.Errorf("%d keys stay taken for longer than the lease", n)
			}
			for _, point := range points[:2] { // before the effect was committed
				for _, id := range at[point] {
					if n := effects(t, pool, id); n > 1 {
						t.Errorf("%d effects of %s, which was killed at %q", n, id, point)
					}
				}
			}
			storm.Sweep(t, keys)
			exactlyOnce(t, pool, keys)
		})
	}
}

func exactlyOnce(t *testing.T, pool *pgxpool.Pool, keys int) {
	t.Helper()
	if n := count(t, pool, `SELECT count(DISTINCT id) FROM effect`); n != keys {
		t.Errorf("%d keys of %d took effect", n, keys)
	}
	if n := count(t, pool, `SELECT count(*) FROM (SELECT id FROM effect GROUP BY id HAVING count(*) > 1) AS twice`); n != 0 {
		t.Errorf("%d keys took effect more than once", n)
	}
	if n := count(t, pool, `SELECT count(*) FROM idempotency_key WHERE lease_until IS NULL`); n != keys {
		t.Errorf("%d keys of %d are completed", n, keys)
	}
	if n := count(t, pool, `SELECT count(*) FROM effect e JOIN idempotency_key k USING (id) WHERE convert_from(k.result, 'UTF8')::json ->> 'Nonce' <> e.nonce`); n != 0 {
		t.Errorf("the record of %d keys is not of the execution that took effect", n)
	}
}

// A process that is paused in the middle of its work, for longer than its lease,
// must not add its effect to that of whoever took the key over.
func TestCrashZombie(t *testing.T) {
	pool, dsn := crashLedger(t)
	zombies(t, "pause two phases", pool, dsn)
	exactlyOnce(t, pool, 5)
}

func zombies(t *testing.T, mode string, pool *pgxpool.Pool, dsn string) {
	t.Helper()
	for i := range 5 {
		plan := crashtest.Plan{Mode: mode, Backend: dsn, Point: "worked", From: i, To: i + 1, Duplicates: 1}
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
			t.Error("the key was not taken over")
		}
		if !p.Wait() {
			t.Error("the child that was paused did not end well")
		}
	}
}

type receipt struct{ Nonce string }

// TestCrashChild runs its keys one after the other, each by several duplicates
// at once that do not give up.
func TestCrashChild(t *testing.T) {
	c := crashtest.Current(t)
	pool := pgtest.Open(t, c.Backend)
	for i := c.From; i < c.To; i++ {
		id := fmt.Sprintf("key %d", i)
		var wg sync.WaitGroup
		for range c.Duplicates {
			wg.Go(func() {
				got, err := crashWork(t.Context(), c, pool, id)
				if err != nil {
					t.Errorf("%s: %v", id, err)
					return
				}
				c.At("committed", id)
				var nonce string
				if err := pool.QueryRow(t.Context(), `SELECT nonce FROM effect WHERE id = $1`, id).Scan(&nonce); err != nil || nonce != got.Nonce {
					t.Errorf("%s: the result is of %q, the effect of %q: %v", id, got.Nonce, nonce, err)
				}
			})
		}
		wg.Wait()
	}
}

func crashWork(ctx context.Context, c *crashtest.Child, pool *pgxpool.Pool, id string) (receipt, error) {
	work := func(ctx context.Context, tx pgx.Tx) (receipt, error) {
		c.At("claimed", id)
		r := receipt{ids.New()}
		_, err := tx.Exec(ctx, `INSERT INTO effect (id, nonce) VALUES ($1, $2)`, id, r.Nonce)
		c.At("worked", id)
		return r, err
	}
	if c.Mode == "one transaction" {
		r, _, err := idempotencypg.DoTx(ctx, pool, key(id), &idempotencypg.TxOptions{Wait: time.Minute}, work)
		return r, err
	}
	if c.Mode == "unlocked" {
		return unlocked(ctx, pool, id, work)
	}
	for {
		opts := &idempotency.Options{Lease: crashLease, Wait: time.Minute, Release: func(error) bool { return false }}
		r, _, err := idempotency.Do(ctx, idempotencypg.New(pool), key(id), opts, func(held context.Context) (r receipt, err error) {
			ctx := context.WithoutCancel(held) // a zombie does not notice
			err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				if r, err = work(ctx, tx); err != nil {
					return err
				}
				if strings.HasSuffix(c.Mode, "unfenced") {
					return completeUnfenced(ctx, tx, id, r)
				}
				err := idempotencypg.CompleteTx(ctx, tx, r)
				c.At("completed", id)
				return err
			})
			return r, err
		})
		if !errors.Is(err, idempotency.ErrLeaseLost) {
			return r, err
		}
	}
}

// unlocked is DoTx without the atomicity of its claim.
func unlocked(ctx context.Context, pool *pgxpool.Pool, id string, work func(context.Context, pgx.Tx) (receipt, error)) (r receipt, err error) {
	err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `SELECT convert_from(result, 'UTF8')::json ->> 'Nonce' FROM idempotency_key WHERE id = $1`, id).Scan(&r.Nonce)
		if !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		if r, err = work(ctx, tx); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `INSERT INTO idempotency_key (scope, id, fingerprint, token, expires_at, result)
			VALUES ('tenant', $1, '', '', now() + interval '1 h', convert_to($2, 'UTF8')) ON CONFLICT DO NOTHING`, id, `{"Nonce":"`+r.Nonce+`"}`)
		return err
	})
	return r, err
}

// completeUnfenced is CompleteTx without the check of the token.
func completeUnfenced(ctx context.Context, tx pgx.Tx, id string, r receipt) error {
	_, err := tx.Exec(ctx, `UPDATE idempotency_key SET lease_until = NULL, result = convert_to($2, 'UTF8') WHERE id = $1`, id, `{"Nonce":"`+r.Nonce+`"}`)
	return err
}

const crashMutantEnv = "IDEMPOTENCYPG_CRASH_MUTANT"

// TestCrashMutant runs the crash checks on a mutant; only
// TestCrashMutantsAreCaught sets the environment.
func TestCrashMutant(t *testing.T) {
	switch os.Getenv(crashMutantEnv) {
	case "unlocked":
		pool, dsn := crashLedger(t)
		sweepers := make([]*crashtest.Process, 3)
		for i := range sweepers {
			sweepers[i] = crashtest.Start(t, "TestCrashChild", crashtest.Plan{Mode: "unlocked", Backend: dsn, To: 50, Duplicates: 4})
		}
		for _, p := range sweepers {
			p.Wait()
		}
		exactlyOnce(t, pool, 50)
	case "unfenced":
		pool, dsn := crashLedger(t)
		zombies(t, "pause unfenced", pool, dsn)
		exactlyOnce(t, pool, 5)
	default:
		t.Skip("runs as a child of TestCrashMutantsAreCaught")
	}
}

// The crash checks notice a claim that is not atomic and a missing fence.
func TestCrashMutantsAreCaught(t *testing.T) {
	migrated(t) // skips without a server
	for _, mutant := range []string{"unlocked", "unfenced"} {
		t.Run(mutant, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrashMutant$", "-test.v", "-test.timeout=2m")
			cmd.Env = append(os.Environ(), crashMutantEnv+"="+mutant)
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), "took effect more than once") {
				t.Errorf("the checks did not notice:\n%s", out)
			}
		})
	}
}
