package schedule_test

import (
	"testing"

	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/scheduletest"
)

func TestMemoryStore(t *testing.T) {
	scheduletest.TestStore(t, func(*testing.T) scheduletest.Store { return new(schedule.MemoryStore) })
}
