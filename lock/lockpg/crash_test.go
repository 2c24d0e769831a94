package lockpg_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
)

const (
	crashTTL    = 500 * time.Millisecond
	crashWrites = 8 // of each process, at least
)

// A ledger has a counter that is read when a lease begins and written back at its
// end, and a row for each write.
func crashLedger(t *testing.T) (*pgxpool.Pool, string) {
	t.Helper()
	dsn := pgtest.URL(t)
	pool := pgtest.Open(t, dsn)
	if err := lockpg.Migrate(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	run(t, pool, `CREATE TABLE counter (value bigint NOT NULL, writes bigint NOT NULL);
		INSERT INTO counter VALUES (0, 0);
		CREATE TABLE written (n bigint PRIMARY KEY, token bigint NOT NULL)`)
	return pool, dsn
}

// Three processes write under one lease. One is killed, one is stopped past its
// lease and then goes on to write, in ignorance. LOCK_CRASH_FULL=1 is the long form.
func TestCrash(t *testing.T) {
	rounds := 3
	if os.Getenv("LOCK_CRASH_FULL") != "" {
		rounds = 30
	}
	pool, dsn := crashLedger(t)
	landed := make(map[string]int)
	for round := range rounds {
		point := []string{"held", "written", "committed"}[round%3]
		trio(t, pool, dsn, "", point)
		landed[point]++
	}
	t.Logf("kills: %v, and as many stops", landed)
	noStaleWrite(t, pool)
}

// trio runs the three processes.
func trio(t *testing.T, pool *pgxpool.Pool, dsn, mode, point string) {
	t.Helper()
	start := func(mode, point string, after int) *crashtest.Process {
		return crashtest.Start(t, "TestCrashChild", crashtest.Plan{Mode: mode, Backend: dsn, Point: point, After: after})
	}
	killed, stopped, other := start("die "+mode, point, 2), start("pause "+mode, "held", 2), start("other "+mode, "", 0)
	var held int64
	for toKill, toStop := killed.Lines, stopped.Lines; toKill != nil || toStop != nil; {
		// Whichever is there first: the others may wait for what it holds.
		select {
		case line := <-toKill:
			if !strings.HasPrefix(line, "at ") {
				t.Fatalf("the child that is to be killed reports %q", line)
			}
			killed.Kill()
			toKill = nil
		case line := <-toStop:
			n, err := strconv.ParseInt(strings.TrimPrefix(line, "at "), 10, 64)
			if err != nil {
				t.Fatalf("the child that is to be stopped reports %q", line)
			}
			stopped.Signal(syscall.SIGSTOP)
			held, toStop = n, nil
		}
	}
	eventually(t, "another to take the lease over", func() bool {
		var now int64
		if err := pool.QueryRow(t.Context(), `SELECT token FROM lock_lease WHERE key = 'crash'`).Scan(&now); err != nil {
			t.Fatal(err)
		}
		return now > held
	})
	stopped.Continue()
	refused := false
	for line := range stopped.Lines {
		refused = refused || line == fmt.Sprint("refused ", held)
		if strings.HasPrefix(line, "failed ") {
			t.Error(line)
		}
	}
	if !refused {
		t.Errorf("the write under token %d, which was stopped past its lease, was not refused", held)
	}
	other.Continue() // to its end
	if !stopped.Wait() || !other.Wait() {
		t.Error("a child failed")
	}
}

// noStaleWrite checks that the writes were made in the order of their tokens, and
// that none was made of a value that another had replaced.
func noStaleWrite(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	var writes, value, stale int64
	err := pool.QueryRow(t.Context(), `SELECT value, writes, (SELECT count(*) FROM
		(SELECT token < lag(token) OVER (ORDER BY n) AS stale FROM written) AS w WHERE stale) FROM counter`).Scan(&value, &writes, &stale)
	if err != nil {
		t.Fatal(err)
	}
	if stale != 0 || value != writes || writes == 0 {
		t.Errorf("%d stale writes; the counter is %d after %d writes", stale, value, writes)
	}
}

// TestCrashChild adds to the counter, each time under a lease.
func TestCrashChild(t *testing.T) {
	c := crashtest.Current(t)
	pool := pgtest.Open(t, c.Backend)
	locker := lock.New(lockpg.New(pool, nil), &lock.Options{TTL: crashTTL, Poll: 100 * time.Millisecond})
	var over atomic.Bool
	if strings.HasPrefix(c.Mode, "other") {
		go func() {
			_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // until the parent has seen enough
			over.Store(true)
		}()
	} else {
		over.Store(true)
	}
	for done := 0; done < crashWrites || !over.Load(); {
		lease, err := locker.Lock(t.Context(), "crash")
		if err != nil {
			t.Fatal(err)
		}
		var value int64
		if err := pool.QueryRow(t.Context(), `SELECT value FROM counter`).Scan(&value); err != nil {
			t.Fatal(err)
		}
		c.At("held", fmt.Sprint(lease.Token()))
		lost := lease.Err() // which one who does not look ignores
		err = pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			if !strings.HasSuffix(c.Mode, "unfenced") {
				tag, err := tx.Exec(t.Context(), lockpg.GuardSQL, lease.Keys(), lease.Owner())
				if err != nil {
					return err
				}
				if tag.RowsAffected() == 0 {
					if lost == nil && lease.Err() == nil {
						t.Error("the lease had passed on before its holder was told")
					}
					return lock.ErrLost
				}
			}
			var n int64
			if err := tx.QueryRow(t.Context(), `UPDATE counter SET value = $1, writes = writes + 1 RETURNING writes`, value+1).Scan(&n); err != nil {
				return err
			}
			_, err := tx.Exec(t.Context(), `INSERT INTO written (n, token) VALUES ($1, $2)`, n, lease.Token())
			c.At("written", "")
			return err
		})
		switch {
		case err == nil:
			c.At("committed", "")
			done++
		case errors.Is(err, lock.ErrLost):
			c.Report("refused %d", lease.Token())
		default:
			t.Fatal(err)
		}
		if err := lease.Release(t.Context()); err != nil && !errors.Is(err, lock.ErrLost) {
			t.Fatal(err)
		}
	}
}

const crashMutantEnv = "LOCKPG_CRASH_MUTANT"

// TestCrashMutant runs the crash checks without the fence; only
// TestCrashMutantIsCaught sets the environment.
func TestCrashMutant(t *testing.T) {
	if os.Getenv(crashMutantEnv) == "" {
		t.Skip("runs as a child of TestCrashMutantIsCaught")
	}
	pool, dsn := crashLedger(t)
	trio(t, pool, dsn, "unfenced", "held")
	noStaleWrite(t, pool)
}

// Without Guard, the crash checks turn red.
func TestCrashMutantIsCaught(t *testing.T) {
	migrated(t) // skips without a server
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrashMutant$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), crashMutantEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "was not refused") || !strings.Contains(string(out), " stale writes; the counter is ") ||
		strings.Contains(string(out), "\n0 stale writes") {
		t.Errorf("the checks did not notice:\n%s", out)
	}
}
