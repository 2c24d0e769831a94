package order_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/examples/payments/migrations"
	"github.com/ashlar-go/ashlar/examples/payments/order"
	"github.com/ashlar-go/ashlar/internal/ids"
	"github.com/ashlar-go/ashlar/internal/kafkatest"
	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/outbox/outboxkafka"
)

type world struct {
	t     *testing.T
	pool  *pgxpool.Pool
	topic string

	failures chan struct{} // one for each line that a consumer logs
}

// Write takes the consumers' log.
func (w *world) Write(line []byte) (int, error) {
	select {
	case w.failures <- struct{}{}:
	default:
	}
	return len(line), nil
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t, pgtest.Pool(t), kafkatest.Topic(t, 1), make(chan struct{}, 2)}
	if err := migrations.Up(t.Context(), w.pool); err != nil {
		t.Fatal(err)
	}
	return w
}

// consume runs a consumer until the returned function is called.
func (w *world) consume() (stop func()) {
	w.t.Helper()
	c, err := kgo.NewClient(kgo.SeedBrokers(kafkatest.Seeds(w.t)...), kgo.ConsumerGroup(w.topic), kgo.ConsumeTopics(w.topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.DisableAutoCommit(), kgo.BlockRebalanceOnPoll())
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- order.New(w.pool, c, &order.Options{Logger: slog.New(slog.NewTextHandler(w, nil))}).Run(ctx)
	}()
	return func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
		c.CloseAllowingRebalance()
	}
}

func (w *world) produce(id string, value []byte) {
	w.t.Helper()
	r := &kgo.Record{Topic: w.topic, Key: []byte("k"), Value: value}
	if id != "" {
		r.Headers = []kgo.RecordHeader{{Key: outboxkafka.HeaderID, Value: []byte(id)}}
	}
	if err := kafkatest.Client(w.t).ProduceSync(w.t.Context(), r).FirstErr(); err != nil {
		w.t.Fatal(err)
	}
}

func event(payment, orderID, state string) []byte {
	b, err := json.Marshal(map[string]any{"payment_id": payment, "order_id": orderID, "state": state, "amount": 100, "currency": "EUR"})
	if err != nil {
		panic(err)
	}
	return b
}

func (w *world) wait(query, want string) {
	w.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		var got string
		err := w.pool.QueryRow(w.t.Context(), query).Scan(&got)
		if err == nil && got == want {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s is %q, want %q (%v)", query, got, want, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

const stateOf = `SELECT coalesce((SELECT state FROM orders WHERE id = '%s'), 'NONE') || ' ' || (SELECT count(*) FROM outbox_inbox)`

// The order's state after sequences of events, among them repetitions.
func TestConsumer(t *testing.T) {
	w := newWorld(t)
	defer w.consume()()
	first, second := ids.New(), "ffffffff-0000-7000-8000-000000000000" // begun later
	inbox := 0
	for i, tt := range []struct {
		events []string // payment and state
		want   string
	}{
		{[]string{"1 AUTHORIZED"}, "CONFIRMED"},
		{[]string{"1 DECLINED"}, "PAYMENT_FAILED"},
		{[]string{"1 PENDING_VERIFICATION"}, "AWAITING_PAYMENT"},
		{[]string{"1 PENDING_VERIFICATION", "1 AUTHORIZED"}, "CONFIRMED"},
		{[]string{"1 PENDING_VERIFICATION", "1 DECLINED", "1 PENDING_VERIFICATION"}, "PAYMENT_FAILED"}, // a repetition
		{[]string{"1 DECLINED", "2 AUTHORIZED"}, "CONFIRMED"},
		{[]string{"2 AUTHORIZED", "1 DECLINED"}, "CONFIRMED"},
		{[]string{"2 PENDING_VERIFICATION", "1 DECLINED"}, "AWAITING_PAYMENT"},
		{[]string{"2 DECLINED", "1 AUTHORIZED"}, "CONFIRMED"},
	} {
		orderID := fmt.Sprintf("order-%d", i)
		fresh := make(map[string]bool)
		for _, e := range tt.events {
			payment := first
			if e[0] == '2' {
				payment = second
			}
			fresh[e] = true
			w.produce(orderID+e, event(payment, orderID, e[2:]))
		}
		inbox += len(fresh)
		w.wait(fmt.Sprintf(stateOf, orderID), fmt.Sprintf("%s %d", tt.want, inbox))
	}
}

// Records that make no sense are set aside; those behind them are handled.
func TestRejected(t *testing.T) {
	w := newWorld(t)
	defer w.consume()()
	for _, value := range []string{"", "{", "null", `{"payment_id":"x"}`, string(event(ids.New(), "o", "UNHEARD_OF"))} {
		w.produce(ids.New(), []byte(value))
	}
	w.produce("", event(ids.New(), "o", "AUTHORIZED"))
	w.produce(ids.New(), event(ids.New(), "good", "AUTHORIZED"))
	w.wait(fmt.Sprintf(stateOf, "good"), "CONFIRMED 1")
	w.wait(`SELECT count(*)::text FROM order_rejected`, "6")
	w.wait(`SELECT count(*)::text FROM orders`, "1")
}

// An event whose effect could not be stored is not passed over: the next
// consumer of the group gets it again.
func TestOffsetAfterEffect(t *testing.T) {
	w := newWorld(t)
	if _, err := w.pool.Exec(t.Context(), `ALTER TABLE orders RENAME TO elsewhere`); err != nil {
		t.Fatal(err)
	}
	stop := w.consume()
	w.produce("1", event(ids.New(), "o", "AUTHORIZED"))
	for range 2 { // it has tried, and tries again
		select {
		case <-w.failures:
		case <-time.After(60 * time.Second):
			t.Fatal("the consumer did not try")
		}
	}
	stop()
	if _, err := w.pool.Exec(t.Context(), `ALTER TABLE elsewhere RENAME TO orders`); err != nil {
		t.Fatal(err)
	}
	stop = w.consume()
	w.wait(fmt.Sprintf(stateOf, "o"), "CONFIRMED 1")
	stop()
}
