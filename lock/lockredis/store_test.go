package lockredis_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/internal/redistest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockredis"
	"github.com/ashlar-go/ashlar/lock/locktest"
)

func open(t testing.TB) (*lockredis.Store, *redis.Client, string) {
	client := redistest.Client(t)
	prefix := redistest.Prefix(t, client)
	return lockredis.New(client, &lockredis.Options{Prefix: prefix}), client, prefix
}

func TestStore(t *testing.T) {
	locktest.TestStore(t, func(t *testing.T) lock.Store {
		store, client, _ := open(t)
		redistest.Real(t, client, "leases that do not end early")
		return store
	})
}

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

func take(t *testing.T, l *lock.Locker, keys ...string) *lock.Lease {
	t.Helper()
	lease, err := l.Lock(t.Context(), keys...)
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

func give(t *testing.T, lease *lock.Lease) {
	t.Helper()
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrips(t *testing.T) {
	store, client, _ := open(t)
	locker := lock.New(store, nil)
	trips := &counter{}
	client.AddHook(trips)
	least := int64(100) // for another test may make the server forget the scripts
	for range 10 {
		before := trips.n.Load()
		give(t, take(t, locker, "{t}a", "{t}b"))
		least = min(least, trips.n.Load()-before)
	}
	if least != 2 {
		t.Errorf("%d round trips of acquire and release, want 2", least)
	}
}

func TestAllocations(t *testing.T) {
	store, _, _ := open(t)
	locker := lock.New(store, nil)
	n := testing.AllocsPerRun(200, func() { give(t, take(t, locker, "k")) })
	t.Logf("%v allocations of acquire and release", n)
	if n > 40 { // the bench has the bar; this notices a leap, also under the race detector
		t.Errorf("%v allocations of acquire and release", n)
	}
}

// SCRIPT FLUSH at any moment changes nothing.
func TestScriptFlush(t *testing.T) {
	store, client, _ := open(t)
	ctx, stop := context.WithCancel(t.Context())
	var flusher, wg sync.WaitGroup
	flusher.Go(func() {
		for ctx.Err() == nil {
			client.ScriptFlush(ctx)
			time.Sleep(time.Millisecond)
		}
	})
	done := 0
	for range 3 {
		locker := lock.New(store, nil)
		wg.Go(func() {
			for range 50 {
				lease := take(t, locker, "k")
				done++
				give(t, lease)
			}
		})
	}
	wg.Wait()
	stop()
	flusher.Wait()
	if done != 150 {
		t.Errorf("%d of 150", done)
	}
}

// The client repeats a command whose reply was lost: each is safe to repeat, and
// no token is drawn twice.
func TestLostReplies(t *testing.T) {
	_, client, prefix := open(t)
	drop := &dropper{}
	opts := *client.Options()
	opts.Dialer = drop.dial
	opts.MaxRetries = 5
	lossy := redis.NewClient(&opts)
	defer lossy.Close()
	store := lockredis.New(lossy, &lockredis.Options{Prefix: prefix})
	locker := lock.New(store, nil)
	last := take(t, locker, "k")
	give(t, last)
	for i := range 30 {
		drop.next.Store(int64(i%2) + 1) // the acquisition or the release
		lease := take(t, locker, "k")
		if lease.Token() != last.Token()+1 {
			t.Fatalf("token %d after %d", lease.Token(), last.Token())
		}
		if err := store.Extend(t.Context(), lock.Request{Keys: lease.Keys(), Owner: lease.Owner(), TTL: time.Minute}); err != nil {
			t.Fatal(err)
		}
		give(t, lease)
		last = lease
	}
	if drop.dropped.Load() < 25 {
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

// Several keys must be in one slot, also where there is no cluster yet.
func TestSlots(t *testing.T) {
	store, _, _ := open(t)
	locker := lock.New(store, nil)
	for _, keys := range [][]string{{"a", "b"}, {"{a}x", "{b}x"}, {"a", "{a}"}, {"{}a", "{}b"}, {"{a", "{a}"}} {
		lease, err := locker.TryLock(t.Context(), keys...)
		if err == nil {
			give(t, lease)
		}
		ok := fmt.Sprint(keys) == "[a {a}]" // "a" has itself for a tag
		if errors.Is(err, lock.ErrInvalid) == ok {
			t.Errorf("TryLock(%q) = %v", keys, err)
		}
	}
	give(t, take(t, locker, "{a}x", "y{a}", "{a}{b}"))
}

// Everything that stays has a TTL, and there is not much of it.
func TestWhatStays(t *testing.T) {
	store, client, prefix := open(t)
	locker := lock.New(store, nil)
	for i := range 2000 {
		give(t, take(t, locker, fmt.Sprint("key ", i)))
	}
	held := take(t, locker, "held")
	defer give(t, held)
	keys, err := client.Keys(t.Context(), prefix+"*").Result()
	if err != nil {
		t.Fatal(err)
	}
	if len(keys) > 257 {
		t.Errorf("%d keys after 2000 locks", len(keys))
	}
	for _, key := range keys {
		if ttl, err := client.PTTL(t.Context(), key).Result(); err != nil || ttl <= 0 {
			t.Errorf("%s has the TTL %v, %v", key, ttl, err)
		}
	}
}

// A counter that was lost, as by eviction, does not make tokens come back.
func TestLostCounter(t *testing.T) {
	store, client, prefix := open(t)
	locker := lock.New(store, nil)
	last := int64(0)
	for range 5 {
		lease := take(t, locker, "k")
		if lease.Token() <= last {
			t.Fatalf("token %d after %d", lease.Token(), last)
		}
		last = lease.Token()
		give(t, lease)
		for _, key := range client.Keys(t.Context(), prefix+"{*}").Val() {
			if err := client.Del(t.Context(), key).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Nothing is published unless somebody waits, for in a cluster that goes to every
// node.
func TestPublishesOnlyForWaiters(t *testing.T) {
	store, client, prefix := open(t)
	sub := client.PSubscribe(t.Context(), prefix+"*")
	defer sub.Close()
	if _, err := sub.Receive(t.Context()); err != nil {
		t.Fatal(err)
	}
	a, b := lock.New(store, nil), lock.New(store, nil)
	for range 10 {
		lease := take(t, a, "k")
		if _, err := b.TryLock(t.Context(), "k"); !errors.Is(err, lock.ErrHeld) {
			t.Fatal(err)
		}
		give(t, lease)
	}
	lease := take(t, a, "waited for")
	waiting := lock.Request{Keys: lease.Keys(), Owner: "waiting", TTL: time.Minute, Waiting: true}
	if _, err := store.Acquire(t.Context(), waiting); !errors.Is(err, lock.ErrHeld) {
		t.Fatal(err)
	}
	give(t, lease)
	msg, err := sub.ReceiveMessage(t.Context())
	if err != nil || !strings.HasSuffix(msg.Channel, "waited for") {
		t.Fatalf("the first publication is %v, %v", msg, err)
	}
}

// A waiter is told again after its connection was cut.
func TestSubscriptionIsRenewed(t *testing.T) {
	store, client, prefix := open(t)
	redistest.Real(t, client, "CLIENT KILL")
	holder, waiter := lock.New(store, nil), lock.New(store, &lock.Options{Poll: time.Hour})
	for range 3 {
		lease := take(t, holder, "k")
		got := make(chan struct{})
		go func() {
			defer close(got)
			give(t, take(t, waiter, "k"))
		}()
		for attempt := 0; len(client.PubSubChannels(t.Context(), prefix+"*").Val()) == 0; attempt++ {
			if attempt == 10_000 {
				t.Fatal("nobody has subscribed")
			}
			time.Sleep(time.Millisecond)
		}
		if err := client.Do(t.Context(), "CLIENT", "KILL", "TYPE", "pubsub").Err(); err != nil {
			t.Fatal(err)
		}
		give(t, lease)
		<-got
	}
}

func TestOtherValues(t *testing.T) {
	store, client, _ := open(t)
	client.Close()
	_, err := lock.New(store, nil).TryLock(t.Context(), "k")
	if !errors.Is(err, redis.ErrClosed) || errors.Is(err, lock.ErrHeld) {
		t.Fatalf("TryLock on a closed client = %v", err)
	}
	defer func() {
		if recover() == nil {
			t.Error("a prefix with braces was accepted")
		}
	}()
	lockredis.New(client, &lockredis.Options{Prefix: "{a}"})
}
