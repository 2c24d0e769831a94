package idempotency_test

import (
	"testing"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencytest"
)

func TestMemoryStore(t *testing.T) {
	idempotencytest.TestStore(t, func(*testing.T) idempotency.Store { return new(idempotency.MemoryStore) })
}
