package idempotencypg_test

import (
	"context"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
)

// transfer moves money once, however often it is asked to, and returns the ID of
// the booking.
func transfer(ctx context.Context, pool *pgxpool.Pool, tenant, requestID string, from, to, cents int64) (int64, error) {
	key := idempotency.Key{Scope: tenant, ID: requestID}
	booking, _, err := idempotencypg.DoTx(ctx, pool, key, nil, func(ctx context.Context, tx pgx.Tx) (id int64, err error) {
		const book = `INSERT INTO booking (debit, credit, cents) VALUES ($1, $2, $3) RETURNING id`
		err = tx.QueryRow(ctx, book, from, to, cents).Scan(&id)
		return id, err
	})
	return booking, err
}

// The claim, the booking and its ID are committed together.
func ExampleDoTx() { //nolint:testableexamples // it needs a server
	var pool *pgxpool.Pool // of the service
	if pool == nil {
		return
	}
	_, _ = transfer(context.Background(), pool, "merchant-7", "order-42", 1, 2, 1000)
}

// Work that cannot be one transaction, such as a call to a payment gateway with
// a key of its own: the last transaction completes the key with its effect.
func ExampleCompleteTx() { //nolint:testableexamples // it needs a server
	var pool *pgxpool.Pool // of the service
	if pool == nil {
		return
	}
	authorize := func(context.Context) (string, error) { return "auth_1", nil } // the gateway
	ctx, store := context.Background(), idempotencypg.New(pool)
	key := idempotency.Key{Scope: "merchant-7", ID: "order-42"}
	_, _, _ = idempotency.Do(ctx, store, key, nil, func(ctx context.Context) (string, error) {
		auth, err := authorize(ctx)
		if err != nil {
			return "", err
		}
		return auth, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, `UPDATE payment SET state = 'authorized', auth = $1`, auth); err != nil {
				return err
			}
			return idempotencypg.CompleteTx(ctx, tx, auth)
		})
	})
}
