package outbox_test

import (
	"context"
	"testing"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxtest"
)

type memTx struct{ *outbox.MemoryTx }

func (tx memTx) Append(_ context.Context, msgs ...outbox.Message) error {
	return tx.MemoryTx.Append(msgs...)
}
func (tx memTx) Commit(context.Context) error   { return tx.MemoryTx.Commit() }
func (tx memTx) Rollback(context.Context) error { tx.MemoryTx.Rollback(); return nil }

func memory(*testing.T) outboxtest.Backend {
	s := outbox.NewMemoryStore()
	return outboxtest.Backend{
		Store:       func() outbox.Store { return s },
		Begin:       func(context.Context) (outboxtest.Tx, error) { return memTx{s.Begin()}, nil },
		DeadLetters: s.DeadLetters, Replay: s.Replay, Sample: s.Sample,
	}
}

func TestMemoryStore(t *testing.T) { outboxtest.TestStore(t, memory) }

func TestMemoryRelay(t *testing.T) { outboxtest.TestRelay(t, memory) }
