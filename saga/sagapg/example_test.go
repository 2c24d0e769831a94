package sagapg_test //nolint:testableexamples // it needs a server

import (
	"context"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/sagapg"
)

type Checkout struct{ Order, Charge string }

// Payments is a service elsewhere that takes idempotency keys.
type Payments interface {
	Charge(ctx context.Context, key, order string) (charge string, err error)
}

// checkout makes an order, charges it, and confirms it, with the message that
// tells of it in the same transaction.
func checkout(pool *pgxpool.Pool, payments Payments) *saga.Saga[Checkout] {
	createOrder := func(ctx context.Context, tx pgx.Tx, c *Checkout) error {
		_, err := tx.Exec(ctx, `INSERT INTO orders (id, status) VALUES ($1, 'pending')`, c.Order)
		return err
	}
	cancelOrder := func(ctx context.Context, tx pgx.Tx, c *Checkout) error {
		_, err := tx.Exec(ctx, `UPDATE orders SET status = 'cancelled' WHERE id = $1`, c.Order)
		return err
	}
	charge := func(ctx context.Context, c *Checkout) (err error) {
		c.Charge, err = payments.Charge(ctx, saga.CurrentCall(ctx).Key(), c.Order)
		return err
	}
	confirm := func(ctx context.Context, tx pgx.Tx, c *Checkout) error {
		if _, err := tx.Exec(ctx, `UPDATE orders SET status = 'confirmed' WHERE id = $1`, c.Order); err != nil {
			return err
		}
		return outboxpg.Append(ctx, tx, outbox.Message{Topic: "orders", Key: c.Order, Payload: []byte(`{"event":"confirmed"}`)})
	}
	return saga.New[Checkout]("checkout", 1).
		Step("order", sagapg.Tx(pool, createOrder), sagapg.Tx(pool, cancelOrder), nil).
		Pivot("charge", charge, nil).
		Step("confirm", sagapg.Tx(pool, confirm), nil).
		Build()
}

// serve runs checkouts until the process is told to stop. It may run in every
// instance of the service.
func serve(pool *pgxpool.Pool, payments Payments) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := sagapg.Migrate(ctx, pool); err != nil {
		return err
	}
	sagas := []saga.Definition{checkout(pool, payments)}
	return saga.NewRunner(sagapg.New(pool, nil), sagas, nil).Run(ctx)
}

// A checkout whose own steps are transactions, and the process that runs it.
func Example() {
	_, _ = checkout, serve
}
