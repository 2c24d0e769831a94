package saga_test

import (
	"testing"

	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagatest"
)

func TestMemoryStore(t *testing.T) {
	sagatest.TestStore(t, func(*testing.T) saga.Store { return &saga.MemoryStore{} })
}
