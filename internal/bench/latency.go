package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxkafka"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

const perSecond = 500

// The time from a commit to the broker's acknowledgement, at a steady pace.
var latencyExperiment = experiment{
	ids:  []string{"O5", "O6"},
	what: "p99 from commit to acknowledgement at 500 messages a second",
	round: func(ctx context.Context, e *env, r *results) error {
		d := 6 * time.Second
		if e.quick {
			d = 2 * time.Second
		}
		p99, _, err := oursLatency(ctx, e, d, false)
		if err != nil {
			return err
		}
		r.set("ours", p99)
		held, inversions, err := oursLatency(ctx, e, d, true)
		if err != nil {
			return err
		}
		if inversions > 0 {
			held = math.Inf(1)
		}
		r.set("held", held)
		floor, err := floorLatency(ctx, e, d)
		if err != nil {
			return err
		}
		r.set("floor", floor)
		p99, _, err = watermillLatency(ctx, e, d, false)
		if err != nil {
			return err
		}
		r.set("watermill", p99)
		_, delivered, err := watermillLatency(ctx, e, d, true)
		r.set("watermill delivered", float64(delivered))
		return err
	},
	bars: []bar{
		{id: "O5", what: "p99/(select+produce+update p99)", atMost: 3, ratio: func(r *results) float64 { return r.of("ours", "floor") }},
		{id: "O5", what: "p99/watermill p99 at its default poll", atMost: 0.02, ratio: func(r *results) float64 { return r.of("ours", "watermill") }},
		{id: "O6", what: "p99 with an unrelated write transaction open/p99 without, order intact", atMost: 2, ratio: func(r *results) float64 { return r.of("held", "ours") }},
		{id: "O6", what: "messages watermill delivers meanwhile", atMost: 0.5, unit: " ", ratio: func(r *results) float64 { return r.values["watermill delivered"] }},
	},
}

// A clock matches commits with acknowledgements.
type clock struct {
	mu        sync.Mutex
	committed map[string]time.Time
	acked     map[string]time.Time
	last      map[string]int // by key: the last number acknowledged
	inverted  int
}

func newClock() *clock {
	return &clock{committed: make(map[string]time.Time), acked: make(map[string]time.Time), last: make(map[string]int)}
}

func (c *clock) commit(id string) {
	now := time.Now()
	c.mu.Lock()
	c.committed[id] = now
	c.mu.Unlock()
}

func (c *clock) ack(ids ...string) {
	now := time.Now()
	c.mu.Lock()
	for _, id := range ids {
		c.acked[id] = now
	}
	c.mu.Unlock()
}

func (c *clock) p99() float64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []float64
	for id, at := range c.acked {
		// The acknowledgement may be seen before Commit has returned.
		all = append(all, max(0, at.Sub(c.committed[id]).Seconds()))
	}
	if len(all) == 0 {
		return math.Inf(1)
	}
	slices.Sort(all)
	return all[len(all)*99/100]
}

func (c *clock) acks() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.acked)
}

// pace calls f at a steady rate, on as many goroutines as it takes.
func pace(ctx context.Context, d time.Duration, f func(i int)) {
	var wg sync.WaitGroup
	start := time.Now()
	for i := range int(d.Seconds() * perSecond) {
		if wait := time.Until(start.Add(time.Duration(i) * time.Second / perSecond)); wait > 0 {
			time.Sleep(wait)
		}
		if ctx.Err() != nil {
			break
		}
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// unrelated opens a write transaction in another table until it is ended.
func unrelated(ctx context.Context, pool *pgxpool.Pool) (end func(), err error) {
	if _, err := pool.Exec(ctx, `CREATE TABLE IF NOT EXISTS unrelated (n int)`); err != nil {
		return nil, err
	}
	tx, err := pool.Begin(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := tx.Exec(ctx, `INSERT INTO unrelated VALUES (1)`); err != nil {
		return nil, err
	}
	return func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }, nil
}

type acking struct {
	outbox.Publisher
	clock *clock
}

func (p acking) Publish(ctx context.Context, msgs []outbox.Message) error {
	err := p.Publisher.Publish(ctx, msgs)
	if err == nil {
		ids := make([]string, len(msgs))
		for i, m := range msgs {
			ids[i] = m.ID
			var key, n int
			_, _ = fmt.Sscanf(m.ID, "%d-%d", &key, &n) // made below
			if n < p.clock.last[m.Key] {
				p.clock.inverted++
			}
			p.clock.last[m.Key] = n
		}
		p.clock.ack(ids...)
	}
	return err
}

func oursLatency(ctx context.Context, e *env, d time.Duration, held bool) (p99 float64, inversions int, err error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer drop()
	if err := outboxpg.Migrate(ctx, pool); err != nil {
		return 0, 0, err
	}
	if held {
		end, err := unrelated(ctx, pool)
		if err != nil {
			return 0, 0, err
		}
		defer end()
	}
	c := newClock()
	rctx, cancel := context.WithCancel(ctx)
	finished := make(chan error, 1)
	go func() {
		finished <- outbox.NewRelay(outboxpg.New(pool, nil), acking{outboxkafka.New(e.client), c}, nil).Run(rctx)
	}()
	var failed atomic.Pointer[error]
	var keys [50]sync.Mutex // what a row lock would be
	var numbers [50]int
	pace(ctx, d, func(i int) {
		k := i % len(keys)
		keys[k].Lock()
		defer keys[k].Unlock()
		numbers[k]++
		id := fmt.Sprintf("%d-%d", k, numbers[k])
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			return outboxpg.Append(ctx, tx, outbox.Message{ID: id, Topic: topic, Key: fmt.Sprint("key-", k), Payload: payload})
		})
		c.commit(id)
		if err != nil {
			failed.Store(&err)
		}
	})
	for range 500 {
		if c.acks() >= int(d.Seconds()*perSecond) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	err = <-finished
	if f := failed.Load(); f != nil {
		err = *f
	}
	if missing := int(d.Seconds()*perSecond) - c.acks(); err == nil && missing > 0 {
		err = fmt.Errorf("%d messages were not delivered", missing)
	}
	return c.p99(), c.inverted, err
}

// floorLatency is one SELECT, one ProduceSync and one UPDATE, right after the
// commit, by the one who committed.
func floorLatency(ctx context.Context, e *env, d time.Duration) (float64, error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return 0, err
	}
	defer drop()
	if _, err := pool.Exec(ctx, `CREATE TABLE bare (n bigserial PRIMARY KEY, id text, topic text, key text, payload bytea, headers jsonb, created_at timestamptz NOT NULL DEFAULT now(), sent bool)`); err != nil {
		return 0, err
	}
	var failed atomic.Pointer[error]
	var mu sync.Mutex
	var took []float64
	pace(ctx, d, func(i int) {
		err := func() error {
			id := fmt.Sprint(i)
			err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, bareSQL, id, topic, fmt.Sprint("key-", i%50), payload)
				return err
			})
			if err != nil {
				return err
			}
			start := time.Now()
			rec := &kgo.Record{}
			var n int64
			if err := pool.QueryRow(ctx, `SELECT n, topic, key, payload FROM bare ORDER BY n DESC LIMIT 1`).Scan(&n, &rec.Topic, &rec.Key, &rec.Value); err != nil {
				return err
			}
			if err := e.client.ProduceSync(ctx, rec).FirstErr(); err != nil {
				return err
			}
			if _, err := pool.Exec(ctx, `UPDATE bare SET sent = true WHERE n = $1`, n); err != nil {
				return err
			}
			mu.Lock()
			took = append(took, time.Since(start).Seconds())
			mu.Unlock()
			return nil
		}()
		if err != nil {
			failed.Store(&err)
		}
	})
	if f := failed.Load(); f != nil {
		return 0, *f
	}
	slices.Sort(took)
	return took[len(took)*99/100], nil
}

func watermillLatency(ctx context.Context, e *env, d time.Duration, held bool) (p99 float64, delivered int, err error) {
	pool, drop, err := e.schema(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer drop()
	c := newClock()
	w, err := newWatermill(pool, time.Second, kafkaPublisher{e.client, func(_ int, uuids []string) { c.ack(uuids...) }})
	if err != nil {
		return 0, 0, err
	}
	defer w.db.Close()
	if held {
		end, err := unrelated(ctx, pool)
		if err != nil {
			return 0, 0, err
		}
		defer end()
	}
	rctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { _ = w.fwd.Run(rctx) }() // ends with Close
	<-w.fwd.Running()
	var failed atomic.Pointer[error]
	pace(ctx, d, func(i int) {
		m := watermillMessage(i)
		err := w.publish(ctx, []*message.Message{m}...)
		c.commit(m.UUID)
		if err != nil {
			failed.Store(&err)
		}
	})
	if !held {
		for range 1000 {
			if c.acks() >= int(d.Seconds()*perSecond) {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	delivered = c.acks()
	if f := failed.Load(); f != nil {
		return 0, 0, *f
	}
	return c.p99(), delivered, w.fwd.Close()
}
