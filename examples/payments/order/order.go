// Package order confirms orders from payment.events, each event once.
package order

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/outbox/outboxkafka"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// The states of an order.
const (
	AwaitingPayment = "AWAITING_PAYMENT" // its payment is being verified
	PaymentFailed   = "PAYMENT_FAILED"   // it was declined; another may follow
	Confirmed       = "CONFIRMED"        // it is paid
)

// An event is the part of a payment's event that orders depend on.
type event struct {
	PaymentID string `json:"payment_id"`
	OrderID   string `json:"order_id"`
	State     string `json:"state"`
	Amount    int64  `json:"amount"`
	Currency  string `json:"currency"`
}

var stateOf = map[string]string{
	"AUTHORIZED":           Confirmed,
	"DECLINED":             PaymentFailed,
	"PENDING_VERIFICATION": AwaitingPayment,
}

// Options tunes a [Consumer]. The zero value of each field means its default.
type Options struct {
	// Logger reports failures. Default slog.Default().
	Logger *slog.Logger
}

// A Consumer keeps the table orders. Any number may run in one group.
type Consumer struct {
	pool  *pgxpool.Pool
	kafka *kgo.Client
	inbox *outboxpg.Inbox
	log   *slog.Logger
}

// New returns a consumer on pool of the topic that kafka consumes. The client
// must be in a group, with kgo.DisableAutoCommit and kgo.BlockRebalanceOnPoll;
// both stay the caller's.
func New(pool *pgxpool.Pool, kafka *kgo.Client, opts *Options) *Consumer {
	if pool == nil || kafka == nil {
		panic("order: New needs a pool and a Kafka client")
	}
	c := &Consumer{pool: pool, kafka: kafka, inbox: outboxpg.NewInbox("orders"), log: slog.Default()}
	if opts != nil && opts.Logger != nil {
		c.log = opts.Logger
	}
	return c
}

// Run consumes until ctx ends, and then returns nil.
//
// An offset is committed after the transaction of the event's effect, which also
// holds the event's id: a crash between the two repeats the event, and the
// repetition changes nothing.
func (c *Consumer) Run(ctx context.Context) error {
	for {
		fetches := c.kafka.PollRecords(ctx, 500)
		if ctx.Err() != nil || fetches.IsClientClosed() {
			c.kafka.AllowRebalance()
			return nil //nolint:nilerr // ctx has ended, which is how Run is stopped
		}
		fetches.EachError(func(topic string, partition int32, err error) {
			c.log.WarnContext(ctx, "orders: fetch failed", "topic", topic, "partition", partition, "error", err)
		})
		var done []*kgo.Record
		for rec := range fetches.RecordsAll() {
			if err := c.persist(ctx, rec); err != nil {
				break // ctx has ended
			}
			done = append(done, rec)
		}
		c.commit(ctx, done)
		c.kafka.AllowRebalance()
	}
}

// commit goes on when ctx has ended: what is committed is not repeated.
func (c *Consumer) commit(ctx context.Context, done []*kgo.Record) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := c.kafka.CommitRecords(ctx, done...); err != nil {
		c.log.WarnContext(ctx, "orders: offsets not committed, events will be repeated", "error", err)
	}
}

// persist repeats handle until it succeeds or ctx ends.
func (c *Consumer) persist(ctx context.Context, rec *kgo.Record) error {
	for attempt := 0; ; attempt++ {
		err := c.handle(ctx, rec)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			c.log.WarnContext(ctx, "orders: event not handled yet", "partition", rec.Partition, "offset", rec.Offset, "error", err)
		}
		if err := backoff.Sleep(ctx, backoff.Policy{Base: 50 * time.Millisecond}.Next(attempt)); err != nil {
			return err
		}
	}
}

func (c *Consumer) handle(ctx context.Context, rec *kgo.Record) error {
	id := outboxkafka.MessageID(rec)
	e, err := parse(rec.Value)
	if id == "" {
		err = errors.New("no message id")
	}
	if err != nil {
		c.log.ErrorContext(ctx, "orders: event rejected", "partition", rec.Partition, "offset", rec.Offset, "error", err)
		_, err = c.pool.Exec(ctx, `INSERT INTO order_rejected (topic, partition, "offset", reason) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING`,
			rec.Topic, rec.Partition, rec.Offset, err.Error())
		return err
	}
	_, err = c.inbox.Handle(ctx, c.pool, id, func(tx pgx.Tx) error { return apply(ctx, tx, e) })
	return err
}

func parse(value []byte) (e event, err error) {
	if err := json.Unmarshal(value, &e); err != nil {
		return e, errors.New("not a JSON event") // the error's text may repeat the input
	}
	if e.PaymentID == "" || e.OrderID == "" || e.Amount <= 0 || stateOf[e.State] == "" {
		return e, errors.New("an event without what orders need")
	}
	return e, nil
}

// apply stores what e says of its order. A confirmed order stays so; otherwise
// the latest payment decides, and of two payments the one with the higher id was
// begun later (UUIDv7). The events of one payment come in their order.
func apply(ctx context.Context, tx pgx.Tx, e event) error {
	_, err := tx.Exec(ctx, `INSERT INTO orders (id, state, payment_id, amount, currency) VALUES ($1, $2, $3, $4, $5)
		ON CONFLICT (id) DO UPDATE SET state = excluded.state, payment_id = excluded.payment_id,
			amount = excluded.amount, currency = excluded.currency, updated_at = now()
		WHERE orders.state <> 'CONFIRMED' AND (excluded.state = 'CONFIRMED' OR excluded.payment_id >= orders.payment_id)`,
		e.OrderID, stateOf[e.State], e.PaymentID, e.Amount, e.Currency)
	if err != nil {
		return fmt.Errorf("order: %w", err)
	}
	return nil
}
