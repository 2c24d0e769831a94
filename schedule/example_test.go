package schedule_test

import (
	"context"
	"fmt"
	"time"

	"github.com/ashlar-go/ashlar/schedule"
)

// A schedule is defined, triggered by hand, and run by an instance that has its
// handler.
func Example() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	store := new(schedule.MemoryStore) // schedulepg.New(pool) in a service

	report := schedule.Definition{
		Name: "daily report", Spec: "30 4 * * MON-FRI", Zone: "Europe/Berlin",
		Overlap: schedule.OverlapQueue, Attempts: 3, Timeout: time.Hour,
	}
	for range 2 { // each instance does so when it starts
		changed, err := store.Define(ctx, report)
		fmt.Println("defined:", changed, err)
	}

	runner := schedule.New(store, nil)
	runner.Handle("daily report", func(_ context.Context, run schedule.Run) error {
		fmt.Printf("report for %s, attempt %d\n", run.Payload, run.Attempt)
		stop() // a service runs until it is told to stop
		return nil
	})
	if _, err := store.Trigger(ctx, schedule.Trigger{Name: "daily report", Key: "ticket 7", Payload: []byte("last week")}); err != nil {
		fmt.Println(err)
	}
	fmt.Println(runner.Run(ctx))
	// Output:
	// defined: true <nil>
	// defined: false <nil>
	// report for last week, attempt 1
	// <nil>
}

// The times of a cron expression are those of its zone, also when clocks change.
func ExampleParse() {
	timing, err := schedule.Parse("30 2 * * *", "Europe/Berlin")
	if err != nil {
		fmt.Println(err)
		return
	}
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		fmt.Println(err)
		return
	}
	tick := time.Date(2026, 3, 28, 0, 0, 0, 0, time.UTC)
	for range 3 {
		tick = timing.Next(tick)
		fmt.Println(tick.In(berlin).Format("2 Jan 15:04 MST"))
	}
	_, err = schedule.Parse("30 2 30 2 *", "")
	fmt.Println(err)
	// Output:
	// 28 Mar 02:30 CET
	// 29 Mar 03:00 CEST
	// 30 Mar 02:30 CEST
	// schedule: invalid: spec "30 2 30 2 *" has no tick in 41 years
}
