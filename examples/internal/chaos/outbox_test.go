// Package chaos holds tests that stop and restart the servers that a pattern
// rests on, while it works.
package chaos

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/examples/internal/stack"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxkafka"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

const (
	topic = "chaos"
	keys  = 16
)

// A system is an outbox between a Postgres and a Kafka of its own.
type system struct {
	t        *testing.T
	stack    *stack.Stack
	pool     *pgxpool.Pool
	producer *kgo.Client

	mu        sync.Mutex
	locks     [keys]sync.Mutex
	numbers   [keys]int
	committed map[string][]string // by key: certain to be committed, in order
	possible  map[string]bool     // whose COMMIT got no answer
}

func open(t *testing.T, proxied func(address string) string) *system {
	t.Helper()
	s := &system{t: t, committed: make(map[string][]string), possible: make(map[string]bool)}
	var err error
	s.stack, err = stack.Start(t.Context(), &stack.Options{
		Backends: []string{stack.Postgres, stack.Kafka}, Private: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.stack.Close(); err != nil {
			t.Error(err)
		}
	})
	dsn := s.stack.Service(stack.Postgres).Address
	direct := pool(t, dsn)
	if err := outboxpg.Migrate(t.Context(), direct); err != nil {
		t.Fatal(err)
	}
	s.pool = direct
	if proxied != nil {
		s.pool = pool(t, proxied(dsn))
	}
	s.producer, err = kgo.NewClient(kgo.SeedBrokers(s.stack.Service(stack.Kafka).Address), kgo.AllowAutoTopicCreation())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.producer.Close)
	return s
}

func pool(t *testing.T, dsn string) *pgxpool.Pool {
	t.Helper()
	p, err := pgxpool.New(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// run lets writers and two relays work while disturb does its work, and then
// checks what reached the broker.
func (s *system) run(disturb func(ctx context.Context)) {
	s.t.Helper()
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	relays, stopRelays := context.WithCancel(s.t.Context())
	var relaying sync.WaitGroup
	for range 2 {
		relaying.Go(func() {
			opts := &outbox.RelayOptions{LeaseTTL: 2 * time.Second, PublishTimeout: time.Second, Logger: quiet}
			if err := outbox.NewRelay(outboxpg.New(s.pool, nil), outboxkafka.New(s.producer), opts).Run(relays); err != nil {
				s.t.Error(err)
			}
		})
	}
	writers, stopWriters := context.WithCancel(s.t.Context())
	var writing sync.WaitGroup
	for range 4 {
		writing.Go(func() {
			for writers.Err() == nil {
				s.write(writers)
			}
		})
	}
	disturb(s.t.Context())
	stopWriters()
	writing.Wait()
	s.check()
	stopRelays()
	relaying.Wait()
}

// write appends one message under the lock of its key.
func (s *system) write(ctx context.Context) {
	k := rand.IntN(keys)
	s.locks[k].Lock()
	defer s.locks[k].Unlock()
	key := fmt.Sprint("k", k)
	s.numbers[k]++
	id := fmt.Sprintf("%s-%06d", key, s.numbers[k])
	callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	committing := false
	err := func() error {
		tx, err := s.pool.Begin(callCtx)
		if err != nil {
			return err
		}
		defer func() { _ = tx.Rollback(context.WithoutCancel(callCtx)) }() // nothing after Commit
		if err := outboxpg.Append(callCtx, tx, outbox.Message{ID: id, Topic: topic, Key: key}); err != nil {
			return err
		}
		committing = true
		return tx.Commit(callCtx)
	}()
	s.mu.Lock()
	switch {
	case err == nil:
		s.committed[key] = append(s.committed[key], id)
	case committing:
		s.possible[id] = true
	}
	s.mu.Unlock()
	if err != nil {
		time.Sleep(5 * time.Millisecond) // the server is away
	}
}

// check reads the topic until all that was surely committed has arrived, and
// compares first deliveries with the order of the commits.
func (s *system) check() {
	s.t.Helper()
	consumer, err := kgo.NewClient(kgo.SeedBrokers(s.stack.Service(stack.Kafka).Address),
		kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		s.t.Fatal(err)
	}
	defer consumer.Close()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	missing := make(map[string]bool)
	total := 0
	for _, ids := range s.committed {
		for _, id := range ids {
			missing[id] = true
			total++
		}
	}
	if total == 0 {
		s.t.Fatal("nothing was committed")
	}
	firsts, seen := make(map[string][]string), make(map[string]bool)
	received := 0
	for len(missing) > 0 {
		fetches := consumer.PollFetches(ctx)
		if ctx.Err() != nil {
			s.t.Fatalf("%d of %d committed messages have not arrived", len(missing), total)
		}
		fetches.EachRecord(func(r *kgo.Record) {
			received++
			id := outboxkafka.MessageID(r)
			delete(missing, id)
			if !seen[id] {
				seen[id] = true
				firsts[string(r.Key)] = append(firsts[string(r.Key)], id)
			}
		})
	}
	for key, got := range firsts {
		if !slices.IsSorted(got) { // the numbers of a key rise with its commits
			s.t.Errorf("key %s: delivered out of order", key)
		}
		for _, id := range got {
			if !slices.Contains(s.committed[key], id) && !s.possible[id] {
				s.t.Errorf("%s was delivered and never committed", id)
			}
		}
	}
	s.t.Logf("%d messages committed, %d unanswered commits, %d deliveries", total, len(s.possible), received)
}

// The database crashes and recovers, three times.
func TestOutboxThroughPostgresCrashes(t *testing.T) {
	s := open(t, nil)
	s.run(func(ctx context.Context) {
		for range 3 {
			time.Sleep(500 * time.Millisecond)
			if err := s.stack.Service(stack.Postgres).Restart(ctx, true); err != nil {
				t.Error(err)
				return
			}
		}
		time.Sleep(500 * time.Millisecond)
	})
}

// The broker is away, twice, and messages are written meanwhile.
func TestOutboxThroughBrokerRestarts(t *testing.T) {
	s := open(t, nil)
	broker := s.stack.Service(stack.Kafka)
	s.run(func(ctx context.Context) {
		for i := range 2 {
			time.Sleep(500 * time.Millisecond)
			if err := broker.Stop(ctx, i == 0); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(2 * time.Second)
			if err := broker.Start(ctx); err != nil {
				t.Error(err)
				return
			}
		}
		time.Sleep(500 * time.Millisecond)
	})
}
