package outboxpg_test //nolint:testableexamples // it needs a server

import (
	"context"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// confirm changes an order and appends the message that tells of it: both
// happen, or neither does.
func confirm(ctx context.Context, pool *pgxpool.Pool, order string) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `UPDATE orders SET status = 'confirmed' WHERE id = $1`, order); err != nil {
			return err
		}
		return outboxpg.Append(ctx, tx, outbox.Message{Topic: "orders", Key: order, Payload: []byte(`{"event":"confirmed"}`)})
	})
}

// relay delivers messages until the process is told to stop. It may run in every
// instance of the service, or in a process of its own.
func relay(pool *pgxpool.Pool, publisher outbox.Publisher) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := outboxpg.Migrate(ctx, pool); err != nil {
		return err
	}
	return outbox.NewRelay(outboxpg.New(pool, nil), publisher, nil).Run(ctx)
}

// The two halves of a service with an outbox: its transactions, and its relay.
// The publisher is outboxkafka.New(client), or anything else with a Publish
// method.
func Example() {
	_, _ = confirm, relay
}
