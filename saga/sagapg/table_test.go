package sagapg_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

func nothing(context.Context, *order) error { return nil }

func long(steps int) *saga.Saga[order] {
	d := saga.New[order]("long", 1)
	for i := range steps {
		d.Step(fmt.Sprint("step ", i), nothing, nothing, nil)
	}
	return d.Build()
}

// What a checkpoint changes is in no index. Those that end a saga do touch some,
// and a row that no longer fits its page.
func TestCheckpointsTouchNoIndex(t *testing.T) {
	pool := migrated(t)
	s := long(10)
	r := run(t, sagapg.New(pool, nil), s)
	for i := range 50 {
		_, err := s.Start(t.Context(), r, fmt.Sprint(i), order{})
		must(t, err)
		if i%5 == 4 { // five at a time
			for j := range 5 {
				settled(t, r, fmt.Sprint(i-j), saga.Done)
			}
		}
	}
	var hot, all int
	for range 500 { // statistics arrive late
		must(t, pool.QueryRow(t.Context(), `SELECT n_tup_hot_upd, n_tup_upd FROM pg_stat_user_tables WHERE relid = 'saga_instance'::regclass`).Scan(&hot, &all))
		if all >= 500 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if all < 500 || hot < 330 {
		t.Errorf("%d of %d updates touched no index, want nearly all but the 50 that ended a saga", hot, all)
	}
}

func TestArchive(t *testing.T) {
	pool := migrated(t)
	ctx := t.Context()
	store := sagapg.New(pool, &sagapg.Options{Keep: time.Millisecond, Archive: time.Hour})
	s := long(2)
	r := run(t, store, s)
	for i := range 5 {
		_, err := s.Start(ctx, r, fmt.Sprint("id-", i), order{})
		must(t, err)
		settled(t, r, fmt.Sprint("id-", i), saga.Done)
	}
	for {
		must(t, store.Maintain(ctx))
		if count(t, pool, `SELECT count(*) FROM saga_instance`) == 0 {
			break
		}
	}
	in, err := r.Get(ctx, "id-3")
	must(t, err)
	if in.Status != saga.Done || len(in.Steps) != 2 || in.EndedAt.IsZero() {
		t.Errorf("archived: %+v", in)
	}
	if list, err := r.List(ctx, saga.Query{After: "id-1", Status: saga.Done, Limit: 2}); err != nil || len(list) != 2 || list[0].ID != "id-2" {
		t.Errorf("list: %+v, %v", list, err)
	}
	// It is still known: not started again, not to be changed.
	if started, err := s.Start(ctx, r, "id-3", order{}); started || err != nil {
		t.Errorf("started %t, %v", started, err)
	}
	if n := count(t, pool, `SELECT count(*) FROM saga_instance`); n != 0 {
		t.Errorf("%d live sagas, want none", n)
	}
	for _, err := range []error{
		r.Signal(ctx, "id-3", "x", nil), r.Cancel(ctx, "id-3", saga.By{}), r.Retry(ctx, "id-3", saga.By{}),
	} {
		if !errors.Is(err, saga.ErrState) {
			t.Errorf("error %v, want ErrState", err)
		}
	}
	// Slots are emptied in turn: after three rotations it is there, after the
	// fourth it is not.
	for i := range 4 {
		if _, err := r.Get(ctx, "id-3"); err != nil {
			t.Errorf("gone after %d rotations: %v", i, err)
		}
		sql(t, pool, `UPDATE saga_control SET rotated_at = now() - interval '21 min'`)
		must(t, store.Maintain(ctx))
	}
	if _, err := r.Get(ctx, "id-3"); !errors.Is(err, saga.ErrNotFound) {
		t.Errorf("still there after four rotations: %v", err)
	}
	if started, err := s.Start(ctx, r, "id-3", order{}); !started || err != nil {
		t.Errorf("a forgotten ID: started %t, %v", started, err)
	}
	settled(t, r, "id-3", saga.Done)
}

// An ended saga is moved at the moment it is started again.
func TestArchiveRace(t *testing.T) {
	pool := migrated(t)
	store := sagapg.New(pool, &sagapg.Options{Keep: time.Nanosecond})
	s := long(1)
	r := run(t, store, s)
	for i := range 50 {
		id := fmt.Sprint(i)
		_, err := s.Start(t.Context(), r, id, order{})
		must(t, err)
		settled(t, r, id, saga.Done)
		moved := make(chan error)
		go func() { moved <- store.Maintain(t.Context()) }()
		for range 5 {
			started, err := s.Start(t.Context(), r, id, order{})
			if started {
				t.Fatalf("saga %s was started again, %v", id, err)
			}
		}
		must(t, <-moved)
	}
}

func TestNotMigrated(t *testing.T) {
	store := sagapg.New(pgtest.Pool(t), nil)
	s := long(1)
	err := saga.NewRunner(store, []saga.Definition{s}, nil).Run(t.Context())
	if !errors.Is(err, saga.ErrNotMigrated) {
		t.Errorf("Run = %v, want ErrNotMigrated", err)
	}
}

func TestMigrateTwice(t *testing.T) {
	pool := migrated(t)
	must(t, sagapg.Migrate(t.Context(), pool))
}

// A state that Postgres cannot take stops its own saga and no other.
func TestTooLargeState(t *testing.T) {
	pool := migrated(t)
	sql(t, pool, `ALTER TABLE saga_instance ADD CHECK (length(state) < 1000)`) // stands for the limit of 1 GB
	big := saga.New[[]byte]("big", 1).
		Step("grow", func(_ context.Context, s *[]byte) error { *s = make([]byte, 2000); return nil }, nil, nil).
		Build()
	s := long(20)
	r := run(t, sagapg.New(pool, nil), big, s)
	for i := range 10 {
		_, err := s.Start(t.Context(), r, fmt.Sprint("s", i), order{})
		must(t, err)
		_, err = big.Start(t.Context(), r, fmt.Sprint("b", i), nil)
		must(t, err)
	}
	for i := range 10 {
		settled(t, r, fmt.Sprint("s", i), saga.Done)
		settled(t, r, fmt.Sprint("b", i), saga.Stuck)
	}
}
