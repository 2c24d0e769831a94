package schedulepg_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/schedulepg"
)

const (
	crashEnv   = "SCHEDULEPG_CRASH_CHILD"
	crashTick  = 100 * time.Millisecond
	crashLease = 600 * time.Millisecond
)

// A crashPlan tells a child what to do.
type crashPlan struct {
	DSN      string
	Point    string // where it stops to be killed, or paused
	After    int64  // how often it passes the point first
	Unfenced bool   // the handler ends its run without a fence
}

// A crashChild is the child's side.
type crashChild struct {
	crashPlan
	passed atomic.Int64
}

// at is called at a named point. If it is the plan's, the parent is told, and
// the caller stops until the process is killed or told to go on.
func (c *crashChild) at(point string) {
	if point == c.Point && c.passed.Add(1) == c.After+1 {
		fmt.Println("REACHED")
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	}
}

// TestCrashChild is an instance that a crash test starts and kills. It ends well
// on SIGTERM.
func TestCrashChild(t *testing.T) {
	text := os.Getenv(crashEnv)
	if text == "" {
		t.Skip("runs as a child of the crash tests")
	}
	c := &crashChild{}
	if err := json.Unmarshal([]byte(text), &c.crashPlan); err != nil {
		t.Fatal(err)
	}
	pool := pgtest.Open(t, c.DSN)
	r := schedule.New(schedulepg.New(pool), &schedule.Options{
		Poll: 50 * time.Millisecond, Lease: crashLease, Logger: quiet,
		Observer: schedule.Observer{Finished: func(context.Context, schedule.Run, schedule.State, error, time.Duration) { c.at("recorded") }},
	})
	r.Handle("tx", c.transaction(pool))
	r.Handle("plain", func(ctx context.Context, run schedule.Run) error {
		c.at("claimed")
		defer c.at("worked")
		return effect(ctx, pool, run)
	})
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fmt.Println("READY")
	if err := r.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

func (c *crashChild) transaction(pool *pgxpool.Pool) schedule.Handler {
	work := func(ctx context.Context, tx pgx.Tx, run schedule.Run) error {
		ctx = context.WithoutCancel(ctx) // a zombie does not notice
		c.at("claimed")
		defer c.at("worked")
		return effect(ctx, tx, run)
	}
	fenced := schedulepg.HandleTx(pool, work)
	return func(ctx context.Context, run schedule.Run) error {
		if !c.Unfenced {
			return fenced(context.WithoutCancel(ctx), run)
		}
		ctx = context.WithoutCancel(ctx)
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			if err := work(ctx, tx, run); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `UPDATE schedule_run SET state = 'done', finished_at = now() WHERE id = $1::uuid`, run.ID)
			return err
		})
	}
}

// A process is the parent's side of a child.
type process struct {
	t       *testing.T
	cmd     *exec.Cmd
	stdin   io.Writer
	reached chan bool // false: the child has ended
}

func startChild(t *testing.T, plan crashPlan) *process {
	t.Helper()
	text, err := json.Marshal(plan)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestCrashChild$", "-test.timeout=30m")
	cmd.Env = append(os.Environ(), crashEnv+"="+string(text))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	p := &process{t: t, cmd: cmd, stdin: in, reached: make(chan bool, 2)}
	ready := make(chan bool, 2)
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			switch s.Text() {
			case "READY":
				ready <- true
			case "REACHED":
				p.reached <- true
			}
		}
		ready <- false
		p.reached <- false
	}()
	if !<-ready {
		t.Fatal("a child ended before it was ready")
	}
	return p
}

func (p *process) await() {
	p.t.Helper()
	if !<-p.reached {
		p.t.Fatal("a child ended before it reached its point")
	}
}

func (p *process) signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("signal %v: %v", sig, err)
	}
}

// kill fails the test unless SIGKILL is what ended the child.
func (p *process) kill() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	_ = p.cmd.Wait() // its state tells
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGKILL {
		p.t.Fatalf("the kill did not land: %v", p.cmd.ProcessState)
	}
}

// stop has the child drain.
func (p *process) stop() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("a child that was told to stop ended with %v", err)
	}
}

func crashSchedules(t *testing.T, spec string) (*pgxpool.Pool, *schedulepg.Store, string) {
	t.Helper()
	dsn := pgtest.URL(t)
	pool := pgtest.Open(t, dsn)
	if err := schedulepg.Migrate(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	run(t, pool, `CREATE TABLE effect (schedule text NOT NULL, tick timestamptz NOT NULL)`)
	store := schedulepg.New(pool)
	for _, name := range []string{"tx", "plain"} {
		d := schedule.Definition{Name: name, Spec: spec, Overlap: schedule.OverlapAllow, Misfire: schedule.MisfireBackfill, Backfill: 1000}
		if _, err := store.Define(t.Context(), d); err != nil {
			t.Fatal(err)
		}
	}
	return pool, store, dsn
}

// Instances are killed at every step, and told to stop and replaced, while two
// schedules tick: each tick has one row, none is missing, the effect of each is
// there; that in the transaction once.
//
// SCHEDULE_CRASH_FULL=1 runs the long form of about five minutes.
func TestCrash(t *testing.T) {
	pool, store, dsn := crashSchedules(t, "every "+crashTick.String())
	points := []string{"claimed", "worked", "recorded", "anywhere"}
	kills := 12
	if os.Getenv("SCHEDULE_CRASH_FULL") != "" {
		kills = 600
	}
	instances := []*process{startChild(t, crashPlan{DSN: dsn}), startChild(t, crashPlan{DSN: dsn})}
	for i := range kills {
		point := points[i%len(points)]
		victim := startChild(t, crashPlan{DSN: dsn, Point: point, After: rand.Int64N(4)})
		if point == "anywhere" {
			time.Sleep(rand.N(2 * crashTick))
		} else {
			victim.await()
		}
		victim.kill()
		if i%3 == 2 { // a deployment: one comes, one goes
			instances = append(instances, startChild(t, crashPlan{DSN: dsn}))
			instances[0].stop()
			instances = instances[1:]
		}
	}
	for _, name := range []string{"tx", "plain"} {
		if err := store.Pause(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all runs to end", func() bool {
		return count(t, pool, `SELECT count(*) FROM schedule_run WHERE state IN ('waiting', 'running')`) == 0
	})
	for _, p := range instances {
		p.stop()
	}
	for _, name := range []string{"tx", "plain"} {
		auditTicks(t, store, name)
	}
	exactlyOnce(t, pool)
	ticks := count(t, pool, `SELECT count(*) FROM schedule_run WHERE schedule = 'plain'`)
	effects := count(t, pool, `SELECT count(*) FROM effect WHERE schedule = 'plain'`)
	without := count(t, pool, `SELECT count(*) FROM schedule_run r WHERE NOT EXISTS (SELECT FROM effect e WHERE e.schedule = r.schedule AND e.tick = r.tick)`)
	if without != 0 {
		t.Errorf("%d ticks have no effect", without)
	}
	// A kill repeats what its victim had in work.
	if repeated := count(t, pool, `SELECT sum(attempt - 1)::int FROM schedule_run WHERE schedule = 'plain'`); effects-ticks > repeated {
		t.Errorf("%d effects of %d ticks, of which %d were repeated", effects, ticks, repeated)
	}
	t.Logf("%d kills, %d ticks, %d repeated effects outside of transactions, 0 duplicate or missing ticks unless said above", kills, ticks, effects-ticks)
}

// auditTicks expects one row for each tick from the first to the last.
func auditTicks(t *testing.T, store *schedulepg.Store, name string) {
	t.Helper()
	runs, err := store.Runs(t.Context(), name, 1_000_000)
	if err != nil || len(runs) == 0 {
		t.Fatalf("%d runs of %s, %v", len(runs), name, err)
	}
	slices.Reverse(runs)
	for i, r := range runs {
		if r.State != schedule.Done {
			t.Errorf("%s: the tick %v is %s: %s", name, r.Tick, r.State, r.Err)
		}
		if i > 0 && r.Tick.Sub(runs[i-1].Tick) != crashTick {
			t.Errorf("%s: between two ticks are %v", name, r.Tick.Sub(runs[i-1].Tick))
		}
	}
}

func exactlyOnce(t *testing.T, pool *pgxpool.Pool) {
	t.Helper()
	if n := count(t, pool, `SELECT count(*) FROM (SELECT FROM effect WHERE schedule = 'tx' GROUP BY tick HAVING count(*) > 1) twice`); n != 0 {
		t.Errorf("%d ticks took effect more than once", n)
	}
}

// A process that is paused in the middle of a run, for longer than its lease,
// must not add its effect to that of whoever took the run over.
func TestZombie(t *testing.T) { zombie(t, false) }

func zombie(t *testing.T, unfenced bool) {
	t.Helper()
	pool, store, dsn := crashSchedules(t, "@yearly")
	for i := range 3 {
		if _, err := store.Trigger(t.Context(), schedule.Trigger{Name: "tx"}); err != nil {
			t.Fatal(err)
		}
		p := startChild(t, crashPlan{DSN: dsn, Point: "worked", Unfenced: unfenced})
		p.await()
		p.signal(syscall.SIGSTOP)
		other := startChild(t, crashPlan{DSN: dsn})
		ended := func() int {
			return count(t, pool, `SELECT count(*) FROM schedule_run WHERE schedule = 'tx' AND state = 'done' AND attempt = 2`)
		}
		eventually(t, "another to take the run over", func() bool { return ended() == i+1 })
		other.stop()
		p.signal(syscall.SIGCONT)
		if _, err := p.stdin.Write([]byte("\n")); err != nil {
			t.Fatal(err)
		}
		p.stop()
		if n := ended(); n != i+1 && !unfenced {
			t.Errorf("after the zombie woke %d runs are done at their second attempt, want %d", n, i+1)
		}
	}
	exactlyOnce(t, pool)
	if n := count(t, pool, `SELECT count(*) FROM effect`); n < 3 {
		t.Errorf("%d effects of 3 runs", n)
	}
}

const crashMutantEnv = "SCHEDULEPG_CRASH_MUTANT"

// TestZombieMutant runs the check on a handler without a fence; only
// TestZombieMutantIsCaught sets the environment.
func TestZombieMutant(t *testing.T) {
	if os.Getenv(crashMutantEnv) == "" {
		t.Skip("runs as a child of TestZombieMutantIsCaught")
	}
	zombie(t, true)
}

// TestZombie notices a handler that ends its run without a fence.
func TestZombieMutantIsCaught(t *testing.T) {
	migrated(t) // skips without a server
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestZombieMutant$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), crashMutantEnv+"=1")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "took effect more than once") {
		t.Errorf("the check did not notice:\n%s", out)
	}
}
