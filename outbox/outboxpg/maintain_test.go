package outboxpg_test

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
	"github.com/ashlar-go/ashlar/outbox/outboxtest"
)

// eventually polls until ok or half a minute has passed.
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

func scan[T any](t *testing.T, pool *pgxpool.Pool, sql string, args ...any) (v T) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), sql, args...).Scan(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// Delivered messages are removed by truncation: the table stays small and never
// has a dead tuple, while an old snapshot is held elsewhere too.
func TestRotation(t *testing.T) {
	pool := migrated(t)
	old, err := pool.BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = old.Rollback(context.Background()) }()
	if _, err := old.Exec(t.Context(), `SELECT 1`); err != nil { // takes its snapshot
		t.Fatal(err)
	}
	var r outboxtest.Recorder
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	store := outboxpg.New(pool, &outboxpg.Options{RotateBytes: 256 << 10})
	go func() { done <- outbox.NewRelay(store, &r, nil).Run(ctx) }()

	slots := make(map[int]bool)
	sent := 0
	for range 200 {
		var msgs []outbox.Message
		for range 50 {
			msgs = append(msgs, outbox.Message{ID: fmt.Sprint(sent), Topic: "t", Key: fmt.Sprint(sent % 10), Payload: make([]byte, 500)})
			sent++
		}
		commit(t, pool, msgs...)
		slots[scan[int](t, pool, `SELECT slot FROM outbox_control`)] = true
		if len(slots) == 3 && sent > 5000 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	eventually(t, "all deliveries", func() bool { return len(r.Messages()) == sent })
	if len(slots) != 3 {
		t.Errorf("writers used the slots %v, want all three in turn", slots)
	}
	eventually(t, "the delivered slots to be truncated", func() bool {
		return scan[int64](t, pool, `SELECT count(*) FROM generate_series(0, 2) s, outbox_control
			WHERE s <> slot AND pg_relation_size(('outbox_message_' || s)::regclass) > 0`) == 0
	})
	dead := scan[int64](t, pool, `SELECT coalesce(sum(n_dead_tup), 0)::bigint FROM pg_stat_user_tables
		WHERE relname LIKE 'outbox_message_%' AND schemaname = current_schema`)
	if dead != 0 {
		t.Errorf("%d dead tuples in the message table, want none", dead)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for i, m := range r.Messages() {
		if i > 0 && m.Key == r.Messages()[0].Key && len(m.Payload) != 500 {
			t.Fatalf("message %s has %d bytes", m.ID, len(m.Payload))
		}
	}
}

// A slot that holds an undelivered message, or into which somebody may still
// write, is never truncated.
func TestRotationLosesNothing(t *testing.T) {
	pool := migrated(t)
	store := outboxpg.New(pool, &outboxpg.Options{RotateBytes: 1})
	slow, err := pool.Begin(t.Context()) // uses slot 0 until it ends
	if err != nil {
		t.Fatal(err)
	}
	if err := outboxpg.Append(t.Context(), slow, outbox.Message{ID: "slow", Topic: "t", Key: "k"}); err != nil {
		t.Fatal(err)
	}
	commit(t, pool, outbox.Message{ID: "behind", Topic: "t", Key: "k"})
	for range 10 { // nothing is delivered yet, so nothing may go
		if err := store.Maintain(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := scan[int](t, pool, `SELECT count(*) FROM outbox_message`); n != 1 {
		t.Fatalf("%d messages after maintenance, want 1", n)
	}
	if err := slow.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if msgs := drain(t, pool, 2); msgs[0].ID != "slow" {
		t.Errorf("delivered %s first, want slow", msgs[0].ID)
	}
}

// sizes remembers how many payload bytes it was given at once.
type sizes struct{ most, total, count atomic.Int64 }

func (s *sizes) Publish(_ context.Context, msgs []outbox.Message) error {
	n := int64(0)
	for _, m := range msgs {
		n += int64(len(m.Payload))
	}
	s.total.Add(n)
	s.count.Add(int64(len(msgs)))
	if n > s.most.Load() {
		s.most.Store(n)
	}
	return nil
}

// A backlog of large messages is delivered in batches that fit in memory.
func TestLargePayloadsAreBounded(t *testing.T) {
	pool := migrated(t)
	const n, size = 40, 1 << 20
	for i := range n {
		commit(t, pool, outbox.Message{Topic: "t", Key: fmt.Sprint(i % 3), Payload: bytes.Repeat([]byte{byte(i)}, size)})
	}
	var s sizes
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	store := outboxpg.New(pool, &outboxpg.Options{BatchBytes: 4 * size})
	go func() { done <- outbox.NewRelay(store, &s, nil).Run(ctx) }()
	eventually(t, "all deliveries", func() bool { return s.count.Load() >= n })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s.total.Load() != n*size || s.most.Load() > 4*size {
		t.Errorf("%d bytes delivered, at most %d at once; want %d and at most %d", s.total.Load(), s.most.Load(), n*size, 4*size)
	}
}

func TestNotifierWakesListeners(t *testing.T) {
	pool := migrated(t)
	ctx, cancel := context.WithCancel(t.Context())
	woken := make(chan struct{}, 100)
	n := outboxpg.NewNotifier(pool, &outboxpg.WakeOptions{Interval: time.Millisecond})
	results := make(chan error, 2)
	var conns atomic.Pointer[pgx.Conn]
	go func() {
		results <- outboxpg.Listen(ctx, func(ctx context.Context) (*pgx.Conn, error) {
			c, err := pgx.Connect(ctx, pool.Config().ConnString())
			conns.Store(c)
			return c, err
		}, func() { woken <- struct{}{} }, nil)
	}()
	go func() { results <- n.Run(ctx) }()
	<-woken // connected
	n.Notify()
	<-woken
	// The connection is lost without a word; the listener comes back.
	if _, err := pool.Exec(ctx, `SELECT pg_terminate_backend($1)`, int32(conns.Load().PgConn().PID())); err != nil {
		t.Fatal(err)
	}
	<-woken
	for len(woken) > 0 {
		<-woken
	}
	n.Notify()
	<-woken
	cancel()
	for range 2 {
		if err := <-results; err != nil {
			t.Errorf("Run = %v, want nil", err)
		}
	}
}
