package main

import (
	"context"
	"database/sql"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	wsql "github.com/ThreeDotsLabs/watermill-sql/v3/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/components/forwarder"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxkafka"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

var relayExperiment = experiment{
	ids:  []string{"O1", "O2", "O3"},
	what: "draining a backlog of 200-byte messages from Postgres to Kafka",
	round: func(ctx context.Context, e *env, r *results) error {
		// The two fast ones take turns, for they are over in half a second.
		for name, f := range map[string]func(context.Context, *env) (float64, error){
			"watermill": watermillRate, "river": riverRate,
		} {
			rate, err := f(ctx, e)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			r.set(name, rate)
		}
		const turns = 3
		var ours, bare float64 // seconds for a message
		for range turns {
			rate, err := oursRate(ctx, e)
			if err != nil {
				return fmt.Errorf("ours: %w", err)
			}
			ours += 1 / rate / turns
			if rate, err = bareRate(ctx, e); err != nil {
				return fmt.Errorf("bare: %w", err)
			}
			bare += 1 / rate / turns
		}
		r.set("ours", 1/ours)
		r.set("bare", 1/bare)
		return nil
	},
	bars: []bar{
		{id: "O1", what: "relay/watermill", atLeast: 15, ratio: func(r *results) float64 { return r.of("ours", "watermill") }},
		{id: "O2", what: "relay/bare loop", atLeast: 0.90, ratio: func(r *results) float64 { return r.of("ours", "bare") }},
		{id: "O3", what: "relay/river", atLeast: 10, ratio: func(r *results) float64 { return r.of("ours", "river") }},
	},
}

var payload = make([]byte, 200)

// counting tells when n messages were published.
type counting struct {
	outbox.Publisher
	left atomic.Int64
	done chan struct{}
}

func newCounting(p outbox.Publisher, n int) *counting {
	c := &counting{Publisher: p, done: make(chan struct{})}
	c.left.Store(int64(n))
	return c
}

func (c *counting) Publish(ctx context.Context, msgs []outbox.Message) error {
	err := c.Publisher.Publish(ctx, msgs)
	if err == nil {
		c.count(len(msgs))
	}
	return err
}

func (c *counting) count(n int) {
	if before := c.left.Add(int64(-n)) + int64(n); before > 0 && before <= int64(n) {
		close(c.done)
	}
}

// backlog is how many messages the fast ones drain: enough that their start does
// not show, in the quick form too.
func (e *env) backlog() int {
	if e.quick {
		return 100_000
	}
	return 200_000
}

func fill(ctx context.Context, pool *pgxpool.Pool, n int) error {
	for i := 0; i < n; i += 1000 {
		var msgs []outbox.Message
		for j := range min(1000, n-i) {
			msgs = append(msgs, outbox.Message{Topic: topic, Key: fmt.Sprint("key-", (i+j)%1000), Payload: payload})
		}
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error { return outboxpg.Append(ctx, tx, msgs...) })
		if err != nil {
			return err
		}
	}
	return nil
}

func oursRate(ctx context.Context, e *env) (float64, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return 0, err
	}
	defer drop()
	if err := outboxpg.Migrate(ctx, pool); err != nil {
		return 0, err
	}
	n := e.backlog()
	if err := fill(ctx, pool, n); err != nil {
		return 0, err
	}
	pub := newCounting(outboxkafka.New(e.client), n)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	finished := make(chan error, 1)
	start := time.Now()
	go func() { finished <- outbox.NewRelay(outboxpg.New(pool, nil), pub, nil).Run(ctx) }()
	<-pub.done
	cancel()
	err = <-finished // after the last outcome is stored
	return float64(n) / time.Since(start).Seconds(), err
}

// bareRate is the floor: a loop that reads, produces and moves a cursor, and
// nothing else.
func bareRate(ctx context.Context, e *env) (float64, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return 0, err
	}
	defer drop()
	n := e.backlog()
	_, err = pool.Exec(ctx, `CREATE TABLE bare (n bigserial PRIMARY KEY, id text, topic text, key text, payload bytea, headers jsonb, created_at timestamptz DEFAULT now());
		CREATE TABLE bare_cursor (n bigint); INSERT INTO bare_cursor VALUES (0)`)
	if err != nil {
		return 0, err
	}
	_, err = pool.Exec(ctx, `INSERT INTO bare (id, topic, key, payload) SELECT gen_random_uuid()::text, $1, 'key-' || i % 1000, $2 FROM generate_series(1, $3) i`, topic, payload, n)
	if err != nil {
		return 0, err
	}
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Release()
	start := time.Now()
	var cursor int64
	for sent := 0; sent < n; {
		rows, err := conn.Query(ctx, `SELECT n, id, topic, key, payload, headers, created_at FROM bare WHERE n > $1 ORDER BY n LIMIT 2048`, cursor)
		if err != nil {
			return 0, err
		}
		var recs []*kgo.Record
		for rows.Next() {
			rec := &kgo.Record{}
			var id string
			var headers []byte
			var created time.Time
			if err := rows.Scan(&cursor, &id, &rec.Topic, &rec.Key, &rec.Value, &headers, &created); err != nil {
				return 0, err
			}
			rec.Headers = []kgo.RecordHeader{{Key: "message-id", Value: []byte(id)}}
			recs = append(recs, rec)
		}
		if rows.Err() != nil {
			return 0, rows.Err()
		}
		if err := e.client.ProduceSync(ctx, recs...).FirstErr(); err != nil {
			return 0, err
		}
		if _, err := conn.Exec(ctx, `UPDATE bare_cursor SET n = $1`, cursor); err != nil {
			return 0, err
		}
		sent += len(recs)
	}
	return float64(n) / time.Since(start).Seconds(), nil
}

// kafkaPublisher is watermill's publisher on the same client.
type kafkaPublisher struct {
	client *kgo.Client
	sent   func(n int, uuids []string)
}

func (p kafkaPublisher) Publish(topic string, msgs ...*message.Message) error {
	recs := make([]*kgo.Record, len(msgs))
	uuids := make([]string, len(msgs))
	for i, m := range msgs {
		recs[i] = &kgo.Record{Topic: topic, Key: []byte(m.Metadata["key"]), Value: m.Payload}
		uuids[i] = m.UUID
	}
	err := p.client.ProduceSync(context.Background(), recs...).FirstErr()
	if err == nil {
		p.sent(len(msgs), uuids)
	}
	return err
}

func (kafkaPublisher) Close() error { return nil }

// A watermillOutbox is watermill's forwarder on watermill-sql.
type watermillOutbox struct {
	db  *sql.DB
	fwd *forwarder.Forwarder
}

func newWatermill(pool *pgxpool.Pool, poll time.Duration, pub message.Publisher) (*watermillOutbox, error) {
	log := watermill.NopLogger{}
	db := stdlib.OpenDBFromPool(pool)
	sub, err := wsql.NewSubscriber(db, wsql.SubscriberConfig{
		ConsumerGroup: "bench", SchemaAdapter: wsql.DefaultPostgreSQLSchema{}, OffsetsAdapter: wsql.DefaultPostgreSQLOffsetsAdapter{},
		PollInterval: poll, InitializeSchema: true,
	}, log)
	if err != nil {
		return nil, err
	}
	if err := sub.SubscribeInitialize("forwarder_topic"); err != nil {
		return nil, err
	}
	fwd, err := forwarder.NewForwarder(sub, pub, log, forwarder.Config{CloseTimeout: time.Second})
	return &watermillOutbox{db: db, fwd: fwd}, err
}

// publish writes messages as a service would, in one transaction.
func (w *watermillOutbox) publish(ctx context.Context, msgs ...*message.Message) error {
	tx, err := w.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // nothing after Commit
	pub, err := wsql.NewPublisher(tx, wsql.PublisherConfig{SchemaAdapter: wsql.DefaultPostgreSQLSchema{}}, watermill.NopLogger{})
	if err != nil {
		return err
	}
	if err := forwarder.NewPublisher(pub, forwarder.PublisherConfig{}).Publish(topic, msgs...); err != nil {
		return err
	}
	return tx.Commit()
}

func watermillMessage(i int) *message.Message {
	m := message.NewMessage(watermill.NewUUID(), payload)
	m.Metadata["key"] = fmt.Sprint("key-", i%1000)
	return m
}

func watermillRate(ctx context.Context, e *env) (float64, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return 0, err
	}
	defer drop()
	n := e.n(10_000)
	count := newCounting(nil, n)
	w, err := newWatermill(pool, 10*time.Millisecond, kafkaPublisher{e.client, func(n int, _ []string) { count.count(n) }})
	if err != nil {
		return 0, err
	}
	defer w.db.Close()
	for i := 0; i < n; i += 500 {
		var msgs []*message.Message
		for j := range min(500, n-i) {
			msgs = append(msgs, watermillMessage(i+j))
		}
		if err := w.publish(ctx, msgs...); err != nil {
			return 0, err
		}
	}
	start := time.Now()
	go func() { _ = w.fwd.Run(ctx) }() // ends with Close
	<-count.done
	rate := float64(n) / time.Since(start).Seconds()
	return rate, w.fwd.Close()
}

type riverArgs struct {
	Key     string `json:"key"`
	Payload []byte `json:"payload"`
}

func (riverArgs) Kind() string { return "publish" }

type riverWorker struct {
	river.WorkerDefaults[riverArgs]
	client *kgo.Client
	count  *counting
}

func (w *riverWorker) Work(ctx context.Context, job *river.Job[riverArgs]) error {
	err := w.client.ProduceSync(ctx, &kgo.Record{Topic: topic, Key: []byte(job.Args.Key), Value: job.Args.Payload}).FirstErr()
	if err == nil {
		w.count.count(1)
	}
	return err
}

func riverRate(ctx context.Context, e *env) (float64, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return 0, err
	}
	defer drop()
	driver := riverpgxv5.New(pool)
	migrator, err := rivermigrate.New(driver, nil)
	if err != nil {
		return 0, err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return 0, err
	}
	n := e.n(10_000)
	count := newCounting(nil, n)
	workers := river.NewWorkers()
	river.AddWorker(workers, &riverWorker{client: e.client, count: count})
	client, err := river.NewClient(driver, &river.Config{
		Queues:  map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 1000}},
		Workers: workers, FetchCooldown: 2 * time.Millisecond,
	})
	if err != nil {
		return 0, err
	}
	for i := 0; i < n; i += 1000 {
		var params []river.InsertManyParams
		for j := range min(1000, n-i) {
			params = append(params, river.InsertManyParams{Args: riverArgs{Key: fmt.Sprint("key-", (i+j)%1000), Payload: payload}})
		}
		if _, err := client.InsertManyFast(ctx, params); err != nil {
			return 0, err
		}
	}
	start := time.Now()
	if err := client.Start(ctx); err != nil {
		return 0, err
	}
	<-count.done
	rate := float64(n) / time.Since(start).Seconds()
	return rate, client.Stop(ctx)
}
