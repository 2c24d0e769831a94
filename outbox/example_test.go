package outbox_test

import (
	"context"
	"fmt"
	"sync"

	"github.com/ashlar-go/ashlar/outbox"
)

// printer is a broker of the simplest kind.
type printer struct{ delivered *sync.WaitGroup }

func (p printer) Publish(_ context.Context, msgs []outbox.Message) error {
	for _, m := range msgs {
		fmt.Printf("%s %s: %s\n", m.Topic, m.Key, m.Payload)
		p.delivered.Done()
	}
	return nil
}

// A service changes its data and appends the messages that tell of it in one
// transaction; a relay delivers them. With Postgres the transaction is a pgx.Tx
// and the call is outboxpg.Append(ctx, tx, ...); here it is one in memory.
func Example() {
	store := outbox.NewMemoryStore()
	var delivered sync.WaitGroup
	delivered.Add(2)
	relay := outbox.NewRelay(store, printer{&delivered}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan error)
	go func() { stopped <- relay.Run(ctx) }()

	tx := store.Begin()
	_ = tx.Append(
		outbox.Message{Topic: "orders", Key: "order-7", Payload: []byte("placed")},
		outbox.Message{Topic: "orders", Key: "order-7", Payload: []byte("paid")},
	)
	_ = tx.Commit() // from here on both will be delivered, in this order

	abandoned := store.Begin()
	_ = abandoned.Append(outbox.Message{Topic: "orders", Key: "order-8", Payload: []byte("placed")})
	abandoned.Rollback() // this one never will

	delivered.Wait()
	cancel()
	fmt.Println("drained:", <-stopped)
	// Output:
	// orders order-7: placed
	// orders order-7: paid
	// drained: <nil>
}
