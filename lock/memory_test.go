package lock_test

import (
	"testing"

	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/locktest"
)

func TestMemoryStore(t *testing.T) {
	locktest.TestStore(t, func(*testing.T) lock.Store { return new(lock.MemoryStore) })
}
