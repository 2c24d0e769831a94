package idempotencyredis_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencyredis"
	"github.com/ashlar-go/ashlar/idempotency/idempotencytest"
	"github.com/ashlar-go/ashlar/internal/redistest"
)

func open(t *testing.T) idempotency.Store {
	client := redistest.Client(t)
	return idempotencyredis.New(client, &idempotencyredis.Options{Prefix: redistest.Prefix(t, client)})
}

func TestStore(t *testing.T) { idempotencytest.TestStore(t, open) }

// A counter counts round trips: single commands and pipelines.
type counter struct{ n atomic.Int64 }

func (c *counter) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

func (c *counter) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { c.n.Add(1); return next(ctx, cmd) }
}

func (c *counter) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error { c.n.Add(1); return next(ctx, cmds) }
}

func TestRoundTrips(t *testing.T) {
	client := redistest.Client(t)
	store := idempotencyredis.New(client, &idempotencyredis.Options{Prefix: redistest.Prefix(t, client)})
	trips := &counter{}
	do := func(id string) (bool, int64) {
		before := trips.n.Load()
		got, replayed, err := idempotency.Do(t.Context(), store, idempotency.Key{Scope: "s", ID: id}, nil, func(context.Context) (int, error) {
			return 7, nil
		})
		if err != nil || got != 7 {
			t.Fatalf("Do = %v, %v", got, err)
		}
		return replayed, trips.n.Load() - before
	}
	client.AddHook(trips)
	// The fewest of several, for another test may make the server forget the scripts.
	first, replay := int64(100), int64(100)
	for i := range 10 {
		id := fmt.Sprint(i)
		if replayed, n := do(id); !replayed {
			first = min(first, n)
		}
		if replayed, n := do(id); replayed {
			replay = min(replay, n)
		}
	}
	if first != 2 || replay != 1 {
		t.Fatalf("%d round trips of a first execution and %d of a replay, want 2 and 1", first, replay)
	}
}

// SCRIPT FLUSH at any moment changes nothing.
func TestScriptFlush(t *testing.T) {
	client := redistest.Client(t)
	store := idempotencyredis.New(client, &idempotencyredis.Options{Prefix: redistest.Prefix(t, client)})
	ctx, stop := context.WithCancel(t.Context())
	var flusher sync.WaitGroup
	flusher.Go(func() {
		for ctx.Err() == nil {
			client.ScriptFlush(ctx)
			time.Sleep(time.Millisecond)
		}
	})
	var ran [50]atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range ran {
				_, _, err := idempotency.Do(t.Context(), store, idempotency.Key{Scope: "s", ID: fmt.Sprint(i)},
					&idempotency.Options{Wait: time.Minute}, func(context.Context) (int64, error) { return ran[i].Add(1), nil })
				if err != nil {
					t.Errorf("Do = %v", err)
				}
			}
		})
	}
	wg.Wait()
	stop()
	flusher.Wait()
	for i := range ran {
		if n := ran[i].Load(); n != 1 {
			t.Errorf("key %d ran %d times", i, n)
		}
	}
}

// The client repeats a command whose reply was lost: each is safe to repeat.
func TestLostReplies(t *testing.T) {
	client := redistest.Client(t)
	drop := &dropper{}
	opts := *client.Options()
	opts.Dialer = drop.dial
	opts.MaxRetries = 5
	lossy := redis.NewClient(&opts)
	defer lossy.Close()
	store := idempotencyredis.New(lossy, &idempotencyredis.Options{Prefix: redistest.Prefix(t, client)})
	ran := 0
	for i := range 30 {
		id := fmt.Sprint(i)
		for range 2 {
			drop.next.Store(int64(i%3) + 1) // the claim, the completion or nothing
			_, _, err := idempotency.Do(t.Context(), store, idempotency.Key{Scope: "s", ID: id}, nil, func(context.Context) (int, error) {
				ran++
				return ran, nil
			})
			if err != nil {
				t.Fatalf("Do with a lost reply = %v", err)
			}
		}
		if ran != i+1 {
			t.Fatalf("%d executions of %d keys", ran, i+1)
		}
	}
	if drop.dropped.Load() < 30 {
		t.Fatalf("only %d replies were lost", drop.dropped.Load())
	}
}

// A dropper breaks a connection in place of the next-th reply.
type dropper struct{ next, dropped atomic.Int64 }

type dropConn struct {
	net.Conn
	d *dropper
}

func (d *dropper) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	return dropConn{conn, d}, err
}

func (c dropConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == nil && c.d.next.Add(-1) == 0 {
		c.d.dropped.Add(1)
		c.Close()
		return 0, errors.New("the reply was lost")
	}
	return n, err
}
