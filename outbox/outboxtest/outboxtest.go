// Package outboxtest is the conformance suite of the outbox package: what every
// [outbox.Store] and every [outbox.Publisher] must keep.
package outboxtest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/outbox"
)

// A Backend is a store under test and the writers' side of it.
type Backend struct {
	// Store returns another store on the same data, as another process would.
	Store func() outbox.Store
	// Begin starts a transaction.
	Begin func(ctx context.Context) (Tx, error)
	// DeadLetters and Replay are the store's.
	DeadLetters func(ctx context.Context, limit int) ([]outbox.DeadLetter, error)
	Replay      func(ctx context.Context, ids ...string) (int, error)
	// Sample is the store's.
	Sample func(ctx context.Context) (outbox.Sample, error)
}

// A Tx is a transaction that can append messages.
type Tx interface {
	Append(ctx context.Context, msgs ...outbox.Message) error
	Commit(ctx context.Context) error
	Rollback(ctx context.Context) error
}

// append commits msgs in a transaction of their own.
func (b Backend) append(t *testing.T, msgs ...outbox.Message) {
	t.Helper()
	tx := b.begin(t)
	must(t, tx.Append(t.Context(), msgs...))
	must(t, tx.Commit(t.Context()))
}

func (b Backend) begin(t *testing.T) Tx {
	t.Helper()
	tx, err := b.Begin(t.Context())
	must(t, err)
	// A test that fails must not leave it open. Otherwise it has ended.
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	return tx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A Recorder is a [outbox.Publisher] that remembers what it delivered. Its
// fields are set before use.
type Recorder struct {
	// Fail returns the failure of a message, or nil. After a failure the rest of
	// its key fails too, as the contract asks.
	Fail func(m outbox.Message) error

	mu   sync.Mutex
	msgs []outbox.Message
	down error
}

// Publish implements [outbox.Publisher].
func (r *Recorder) Publish(ctx context.Context, msgs []outbox.Message) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if r.down != nil {
		return r.down
	}
	errs, failed := make([]error, len(msgs)), false
	stopped := make(map[string]error)
	for i, m := range msgs {
		if err := stopped[m.Key]; m.Key != "" && err != nil {
			errs[i], failed = fmt.Errorf("after a failure of its key: %w", err), true
			continue
		}
		if r.Fail != nil {
			if err := r.Fail(m); err != nil {
				errs[i], failed, stopped[m.Key] = err, true, err
				continue
			}
		}
		r.msgs = append(r.msgs, m)
	}
	if failed {
		return &outbox.PublishError{Errs: errs}
	}
	return nil
}

// Down makes every Publish fail with err, until it is nil again.
func (r *Recorder) Down(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = err
}

// Messages returns what was delivered so far, in order.
func (r *Recorder) Messages() []outbox.Message {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.msgs)
}

// Firsts returns the IDs delivered so far, by key, each at its first delivery.
func (r *Recorder) Firsts() map[string][]string {
	firsts, seen := make(map[string][]string), make(map[string]bool)
	for _, m := range r.Messages() {
		if !seen[m.ID] {
			seen[m.ID] = true
			firsts[m.Key] = append(firsts[m.Key], m.ID)
		}
	}
	return firsts
}

// wait polls until ok or the test's patience ends.
func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("still waiting for %s after 30 s", what)
}

// run runs a relay until the returned function is called, which waits for it.
func run(t *testing.T, s outbox.Store, p outbox.Publisher, opts *outbox.RelayOptions) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- outbox.NewRelay(s, p, opts).Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run after a clean drain = %v, want nil", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func msg(id, key string) outbox.Message {
	return outbox.Message{ID: id, Topic: "topic", Key: key, Payload: []byte(id)}
}
