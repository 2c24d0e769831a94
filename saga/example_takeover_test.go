package saga_test

import (
	"context"
	"fmt"
	"time"

	"github.com/ashlar-go/ashlar/saga"
)

// A partitioned store is cut off from the first runner when its process dies.
type partitioned struct {
	saga.Store
	dead chan struct{}
}

func (p partitioned) Save(ctx context.Context, runner string, cs []saga.Checkpoint) ([]saga.Ack, error) {
	select {
	case <-p.dead:
		return nil, context.DeadlineExceeded
	default:
		return p.Store.Save(ctx, runner, cs)
	}
}

func (p partitioned) Lease(ctx context.Context, req saga.LeaseRequest) (saga.Grant, error) {
	select {
	case <-p.dead:
		return saga.Grant{}, context.DeadlineExceeded
	default:
		return p.Store.Lease(ctx, req)
	}
}

// A runner dies in the middle of a trip, and another finishes it: what was done
// is not repeated, what was under way is run again with the same key.
func Example_takeover() {
	dead, died := make(chan struct{}), false
	trip := saga.New[Trip]("trip", 1).
		Step("hotel", book("hotel", func(t *Trip) *string { return &t.Hotel }), cancel("hotel"), nil).
		Step("flight", func(ctx context.Context, t *Trip) error {
			fmt.Println("book flight with key", saga.CurrentCall(ctx).Key())
			if !died {
				died = true
				close(dead)
				<-ctx.Done() // the process is gone
				return ctx.Err()
			}
			t.Flight = "AB 123"
			return nil
		}, cancel("flight"), nil).
		Build()

	store := &saga.MemoryStore{}
	run := func(s saga.Store) (r *saga.Runner, stop func()) {
		ctx, cancel := context.WithCancel(context.Background())
		r = saga.NewRunner(s, []saga.Definition{trip}, &saga.Options{Lease: 200 * time.Millisecond, Logger: quiet})
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		return r, func() { cancel(); <-done }
	}
	first, stop := run(partitioned{store, dead})
	defer stop()
	if _, err := trip.Start(context.Background(), first, "trip-8", Trip{}); err != nil {
		fmt.Println(err)
	}
	<-dead
	second, stop := run(store)
	defer stop()
	in, err := second.Wait(context.Background(), "trip-8")
	fmt.Println(in.Status, err)
	// Output:
	// book hotel
	// book flight with key trip-8/flight
	// book flight with key trip-8/flight
	// done <nil>
}
