package outboxpg_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

func TestInboxHandlesOnce(t *testing.T) {
	pool := migrated(t)
	inbox := outboxpg.NewInbox("orders")
	if _, err := pool.Exec(t.Context(), `CREATE TABLE effect (id text)`); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var fresh atomic.Int32
	for i := range 64 {
		wg.Go(func() {
			id := fmt.Sprint("m", i%8)
			ok, err := inbox.Handle(t.Context(), pool, id, func(tx pgx.Tx) error {
				_, err := tx.Exec(t.Context(), `INSERT INTO effect VALUES ($1)`, id)
				return err
			})
			if err != nil {
				t.Error(err)
			}
			if ok {
				fresh.Add(1)
			}
		})
	}
	wg.Wait()
	var effects int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM effect`).Scan(&effects); err != nil {
		t.Fatal(err)
	}
	if fresh.Load() != 8 || effects != 8 {
		t.Errorf("8 messages, each delivered 8 times at once: %d fresh, %d effects", fresh.Load(), effects)
	}
}

func TestInboxForgetsWhatFailed(t *testing.T) {
	pool := migrated(t)
	inbox := outboxpg.NewInbox("orders")
	boom := errors.New("boom")
	fresh, err := inbox.Handle(t.Context(), pool, "m", func(pgx.Tx) error { return boom })
	if !errors.Is(err, boom) || fresh {
		t.Fatalf("Handle = %v, %v; want the handler's error", fresh, err)
	}
	if fresh, err = inbox.Handle(t.Context(), pool, "m", func(pgx.Tx) error { return nil }); err != nil || !fresh {
		t.Errorf("after a failure: %v, %v; want the message fresh", fresh, err)
	}
	if fresh, err = inbox.Handle(t.Context(), pool, "m", func(pgx.Tx) error { t.Error("called for a duplicate"); return nil }); err != nil || fresh {
		t.Errorf("duplicate: %v, %v", fresh, err)
	}
	if fresh, err = outboxpg.NewInbox("mails").Handle(t.Context(), pool, "m", func(pgx.Tx) error { return nil }); err != nil || !fresh {
		t.Errorf("other consumer: %v, %v; want the message fresh", fresh, err)
	}
}

func TestInboxBatch(t *testing.T) {
	pool := migrated(t)
	inbox := outboxpg.NewInbox("orders")
	accept := func(ids ...string) (fresh []bool) {
		t.Helper()
		err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) (err error) {
			fresh, err = inbox.AcceptAll(t.Context(), tx, ids)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return fresh
	}
	if got, want := accept("b", "a", "b"), []bool{true, true, false}; !slices.Equal(got, want) {
		t.Errorf("AcceptAll = %v, want %v", got, want)
	}
	if got, want := accept("c", "a"), []bool{true, false}; !slices.Equal(got, want) {
		t.Errorf("AcceptAll = %v, want %v", got, want)
	}
	// Batches that overlap in opposite orders must not deadlock.
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			ids := []string{"x", "y", "z", fmt.Sprint(i)}
			if i%2 == 0 {
				slices.Reverse(ids)
			}
			accept(ids...)
		})
	}
	wg.Wait()
}

func TestInboxPurge(t *testing.T) {
	pool := migrated(t)
	inbox := outboxpg.NewInbox("orders")
	for i := range 5 {
		if _, err := inbox.Handle(t.Context(), pool, fmt.Sprint(i), func(pgx.Tx) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := pool.Exec(t.Context(), `UPDATE outbox_inbox SET received_at = now() - interval '8 days' WHERE message_id < '3'`); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{2, 1, 0} {
		if n, err := inbox.Purge(t.Context(), pool, 7*24*time.Hour, 2); err != nil || n != want {
			t.Errorf("Purge = %d, %v; want %d", n, err, want)
		}
	}
}
