package lock_test

import (
	"testing"

	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/locktest"
)

func TestMemoryStore(t *testing.T) {
	locktest.TestStore(t, func(*testing.T) lock.Store { return new(lock.MemoryStore) })
}

func TestMemoryRegister(t *testing.T) {
	locktest.TestRegister(t, func(*testing.T) lock.Register[int64] { return new(lock.MemoryRegister[int64]) })
}
