package saga_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/ashlar-go/ashlar/saga"
)

type Trip struct{ Hotel, Flight, Charge string }

func book(what string, ref func(*Trip) *string) saga.Func[Trip] {
	return func(ctx context.Context, t *Trip) error {
		*ref(t) = saga.CurrentCall(ctx).Key()
		fmt.Println("book", what)
		return nil
	}
}

func cancel(what string) saga.Func[Trip] {
	return func(context.Context, *Trip) error {
		fmt.Println("cancel", what)
		return nil
	}
}

// A trip is booked, the card is declined, and what was booked is cancelled,
// the last first.
func Example() {
	trip := saga.New[Trip]("trip", 1).
		Step("hotel", book("hotel", func(t *Trip) *string { return &t.Hotel }), cancel("hotel"), nil).
		Step("flight", book("flight", func(t *Trip) *string { return &t.Flight }), cancel("flight"), nil).
		Pivot("charge", func(context.Context, *Trip) error {
			fmt.Println("charge: declined")
			return saga.Abort(errors.New("card declined"))
		}, nil).
		Step("tickets", book("tickets", func(t *Trip) *string { return &t.Charge }), nil).
		Build()

	ctx, stop := context.WithCancel(context.Background())
	runner := saga.NewRunner(&saga.MemoryStore{}, []saga.Definition{trip}, nil)
	done := make(chan error)
	go func() { done <- runner.Run(ctx) }()

	if _, err := trip.Start(ctx, runner, "trip-7", Trip{}); err != nil {
		fmt.Println(err)
	}
	in, err := runner.Wait(ctx, "trip-7")
	fmt.Println(in.Status, "-", in.Cause, err)
	stop()
	fmt.Println(<-done)
	// Output:
	// book hotel
	// book flight
	// charge: declined
	// cancel flight
	// cancel hotel
	// compensated - step "charge": card declined <nil>
	// <nil>
}
