package idempotency_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/ashlar-go/ashlar/idempotency"
)

// A message is a record of a Kafka topic, which may be delivered more than once.
type message struct{ Topic, ID, Body string }

// A consumer of messages: the ID that the producer gave a message is the key,
// its consumer group and topic the scope, for other groups process it too.
func Example_consumer() {
	ctx := context.Background()
	store := new(idempotency.MemoryStore)
	consume := func(m message) error {
		k := idempotency.Key{Scope: "mailer/" + m.Topic, ID: m.ID}
		_, replayed, err := idempotency.Do(ctx, store, k, nil, func(context.Context) (struct{}, error) {
			fmt.Println("sending mail for", m.Body)
			return struct{}{}, nil
		})
		if replayed {
			fmt.Println("skipping", m.ID)
		}
		return err
	}
	for _, m := range []message{
		{"orders", "e1", "order 42"},
		{"orders", "e1", "order 42"}, // delivered again after a rebalance
		{"orders", "e2", "order 43"},
	} {
		err := consume(m)
		if errors.Is(err, idempotency.ErrInProgress) {
			continue // another consumer has it: do not commit the offset, fetch it again
		}
		if err != nil {
			fmt.Println(err)
		}
	}
	// Output:
	// sending mail for order 42
	// skipping e1
	// sending mail for order 43
}
