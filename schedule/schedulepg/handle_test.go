package schedulepg_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/schedulepg"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("still waiting for %s after 30 s", what)
}

// runner runs a runner until the test ends.
func runner(t *testing.T, store schedule.Store, opts schedule.Options, name string, h schedule.Handler) {
	t.Helper()
	opts.Logger, opts.Poll = quiet, 20*time.Millisecond
	r := schedule.New(store, &opts)
	r.Handle(name, h)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := r.Run(ctx); err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

func effects(t *testing.T) (*pgxpool.Pool, *schedulepg.Store) {
	t.Helper()
	pool := migrated(t)
	run(t, pool, `CREATE TABLE effect (schedule text NOT NULL, tick timestamptz NOT NULL)`)
	return pool, schedulepg.New(pool)
}

func effect(ctx context.Context, tx interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}, r schedule.Run,
) error {
	rows, err := tx.Query(ctx, `INSERT INTO effect (schedule, tick) VALUES ($1, $2)`, r.Schedule.Name, r.Tick)
	if err != nil {
		return err
	}
	rows.Close()
	return rows.Err()
}

// The work and the record that it is done are committed together: what fails
// leaves nothing, and the runner does not record a second time.
func TestHandleTx(t *testing.T) {
	pool, store := effects(t)
	if _, err := store.Define(t.Context(), schedule.Definition{Name: "n", Spec: "@yearly", Attempts: 4, RetryBase: time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Trigger(t.Context(), schedule.Trigger{Name: "n"}); err != nil {
		t.Fatal(err)
	}
	calls := &finishes{Store: store}
	runner(t, calls, schedule.Options{}, "n", schedulepg.HandleTx(pool, func(ctx context.Context, tx pgx.Tx, r schedule.Run) error {
		if err := effect(ctx, tx, r); err != nil {
			return err
		}
		switch r.Attempt {
		case 1:
			return errors.New("no")
		case 2:
			panic("no")
		case 3:
			_, err := tx.Exec(ctx, `SELECT 1/0`)
			return err
		}
		return nil
	}))
	eventually(t, "the run", func() bool { return count(t, pool, `SELECT count(*) FROM schedule_run WHERE state = 'done'`) == 1 })
	if n := count(t, pool, `SELECT count(*) FROM effect`); n != 1 {
		t.Errorf("%d effects of four attempts, of which one succeeded", n)
	}
	calls.mu.Lock()
	defer calls.mu.Unlock()
	if len(calls.outcomes) != 3 || !strings.Contains(calls.outcomes[2].Err, "division by zero") {
		t.Errorf("the runner recorded %+v, want the three failures", calls.outcomes)
	}
}

type finishes struct {
	schedule.Store
	mu       sync.Mutex
	outcomes []schedule.Outcome
}

func (f *finishes) Finish(ctx context.Context, run schedule.Ref, o schedule.Outcome) (bool, error) {
	f.mu.Lock()
	f.outcomes = append(f.outcomes, o)
	f.mu.Unlock()
	return f.Store.Finish(ctx, run, o)
}

// A run that was taken over while its owner worked leaves nothing of what the
// owner did.
func TestHandleTxAfterATakeover(t *testing.T) {
	pool, store := effects(t)
	if _, err := store.Define(t.Context(), schedule.Definition{Name: "n", Spec: "@yearly"}); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Trigger(t.Context(), schedule.Trigger{Name: "n"}); err != nil {
		t.Fatal(err)
	}
	claim := func(lease time.Duration) (r schedule.Run) {
		eventually(t, "a claim", func() bool {
			c, err := store.Claim(t.Context(), schedule.ClaimRequest{Instance: "a", Handlers: []string{"n"}, Slots: 1, PerSchedule: 1, Lease: lease})
			if err != nil {
				t.Fatal(err)
			}
			if len(c.Runs) == 1 {
				r = c.Runs[0]
			}
			return len(c.Runs) == 1
		})
		return r
	}
	first := claim(time.Millisecond)
	h := schedulepg.HandleTx(pool, func(ctx context.Context, tx pgx.Tx, r schedule.Run) error {
		if r.Attempt == 1 {
			claim(time.Minute) // another takes it over, in the middle of this
		}
		return effect(ctx, tx, r)
	})
	if err := h(t.Context(), first); !errors.Is(err, schedule.ErrLeaseLost) {
		t.Errorf("the handler whose run was taken over = %v, want ErrLeaseLost", err)
	}
	if n := count(t, pool, `SELECT count(*) FROM effect`); n != 0 {
		t.Errorf("it left %d effects", n)
	}
	if err := h(t.Context(), schedule.Run{ID: first.ID, Attempt: 2, Schedule: first.Schedule, Tick: first.Tick}); err == nil || !strings.Contains(err.Error(), "not one that a runner gave") {
		t.Errorf("a handler outside of a runner = %v", err)
	}
}

// While the transaction of one run ends, the leases of the others are extended.
func TestExtendPassesWhatIsBeingFinished(t *testing.T) {
	pool, store := effects(t)
	for _, name := range []string{"ends", "goes on"} {
		if _, err := store.Define(t.Context(), schedule.Definition{Name: name, Handler: "h", Spec: "@yearly"}); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Trigger(t.Context(), schedule.Trigger{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	c, err := store.Claim(t.Context(), schedule.ClaimRequest{Instance: "a", Handlers: []string{"h"}, Slots: 2, PerSchedule: 2, Lease: time.Minute})
	if err != nil || len(c.Runs) != 2 {
		t.Fatalf("%+v, %v", c, err)
	}
	refs := []schedule.Ref{{ID: c.Runs[0].ID, Attempt: 1}, {ID: c.Runs[1].ID, Attempt: 1}}
	err = pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(t.Context(), `SELECT FROM schedule_run WHERE id = $1::uuid FOR UPDATE`, refs[0].ID); err != nil {
			return err
		}
		kept, lost, err := store.Extend(t.Context(), refs, time.Minute)
		if err != nil || len(kept) != 1 || kept[0] != refs[1] || len(lost) != 0 {
			t.Errorf("Extend = kept %v, lost %v, %v; want the run that is not locked kept", kept, lost, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
