package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-redsync/redsync/v4"
	redsyncredis "github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockredis"
)

// stallFor is for how long LK7 looks for stalls; zero means its default.
var stallFor time.Duration

// A lease that 32 wait for, as in four processes of eight each: how long until the
// next has it, how many commands that takes, and whether it ever stalls.
var lockHandoffExperiment = experiment{
	ids:  []string{"LK7"},
	what: "handing a lease in Redis over to one of 32 waiters (see -stall)",
	round: func(ctx context.Context, e *env, r *results) error {
		opts, err := redis.ParseURL(os.Getenv("TEST_REDIS_URL"))
		if err != nil {
			return err
		}
		prefix := fmt.Sprintf("bench:%d:%d:", os.Getpid(), time.Now().UnixNano())
		between, err := handoffs(ctx, opts, prefix+"a", 2, 1, e.n(1000))
		if err != nil {
			return err
		}
		within, err := handoffs(ctx, opts, prefix+"b", 1, 8, e.n(1000))
		if err != nil {
			return err
		}
		r.set("between", between.took/between.trip)
		r.set("within", within.took/within.trip)
		r.set("order", float64(within.overtaken))

		d := 6 * time.Second
		if e.quick {
			d = 3 * time.Second
		}
		if err := commandsWhileHeld(ctx, opts, prefix, d, r); err != nil {
			return err
		}
		d = 10 * time.Second
		if e.quick {
			d = 2 * time.Second
		}
		if stallFor > 0 {
			d = stallFor
		}
		longest, err := longestGap(ctx, opts, prefix+"stall", d)
		r.set("gap", longest.Seconds())
		return err
	},
	bars: []bar{
		{id: "LK7", what: "hand-over to another process, from Release to Lock/round trip", atMost: 2, ratio: func(r *results) float64 { return r.values["between"] }},
		{id: "LK7", what: "hand-over within a process, from Release to Lock/round trip", atMost: 2, ratio: func(r *results) float64 { return r.values["within"] }},
		{id: "LK7", what: "waiters of a process that were overtaken", atMost: 0.5, unit: " ", ratio: func(r *results) float64 { return r.values["order"] }},
		{id: "LK7", what: "commands of redsync's 32 waiters/ours, in four processes, each holding for 500 ms", atLeast: 20, ratio: func(r *results) float64 { return r.of("redsync commands", "ours commands") }},
		{id: "LK7", what: "longest time without a holder among 8 waiters", atMost: 1, unit: "s", ratio: func(r *results) float64 { return r.values["gap"] }},
	},
}

type handoff struct {
	trip, took float64 // medians, in ns
	overtaken  int
}

// handoffs has waiters in several lockers with a client of their own take turns.
func handoffs(ctx context.Context, opts *redis.Options, prefix string, lockers, each, n int) (h handoff, err error) {
	var mu sync.Mutex
	var called time.Time // the last Release
	var waits, trips []float64
	var queue []int // those who wait, where there is one locker, and since when
	since := make(map[int]time.Time)
	done := 0
	var wg sync.WaitGroup
	for range lockers {
		own := *opts
		client := redis.NewClient(&own)
		defer func() { _ = client.Close() }()
		locker := lock.New(lockredis.New(client, &lockredis.Options{Prefix: prefix}), nil)
		for w := range each {
			wg.Go(func() {
				for {
					mu.Lock()
					if done >= n || err != nil {
						mu.Unlock()
						return
					}
					queue = append(queue, w)
					asked := time.Now()
					since[w] = asked
					mu.Unlock()
					lease, failed := locker.Lock(ctx, "k")
					got := time.Now()
					mu.Lock()
					if failed != nil {
						err = failed
						mu.Unlock()
						return
					}
					if lockers == 1 && asked.Sub(since[queue[0]]) > time.Millisecond { // not at the same moment
						h.overtaken++
					}
					at := slices.Index(queue, w)
					queue = slices.Delete(queue, at, at+1)
					if asked.Before(called) {
						waits = append(waits, float64(got.Sub(called)))
					}
					done++
					mu.Unlock()
					// The other is waiting by now, and what a round trip takes is measured in
					// the same moment.
					time.Sleep(time.Millisecond)
					start := time.Now()
					failed = client.Ping(ctx).Err()
					trip := time.Since(start)
					mu.Lock()
					called = time.Now()
					mu.Unlock()
					failed = errors.Join(failed, lease.Release(ctx))
					mu.Lock()
					trips = append(trips, float64(trip))
					if failed != nil {
						err = failed
					}
					mu.Unlock()
					if lockers > 1 {
						time.Sleep(500 * time.Microsecond) // so that it is the other's turn
					}
				}
			})
		}
	}
	wg.Wait()
	if err != nil {
		return h, err
	}
	h.trip, h.took = medianOf(trips), medianOf(waits)
	return h, nil
}

func medianOf(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// commandsWhileHeld counts what 32 waiters send while each holder works for half a second.
func commandsWhileHeld(ctx context.Context, opts *redis.Options, prefix string, d time.Duration, r *results) error {
	admin := redis.NewClient(opts)
	defer func() { _ = admin.Close() }()
	const hold = 500 * time.Millisecond
	for _, name := range []string{"ours", "redsync"} {
		rctx, stop := context.WithTimeout(ctx, d)
		var held atomic.Int64
		var wg sync.WaitGroup
		sent := &tripHook{}
		before, err := subscriptions(ctx, admin)
		if err != nil {
			stop()
			return err
		}
		for range 4 {
			own := *opts
			client := redis.NewClient(&own)
			client.AddHook(sent)
			defer func() { _ = client.Close() }()
			locker := lock.New(lockredis.New(client, &lockredis.Options{Prefix: prefix}), nil)
			peer := redsync.New(redsyncredis.NewPool(client))
			for range 8 {
				wg.Go(func() {
					for rctx.Err() == nil {
						if name == "ours" {
							lease, err := locker.Lock(rctx, "commands")
							if err != nil {
								continue
							}
							held.Add(1)
							time.Sleep(hold)
							_ = lease.Release(context.WithoutCancel(rctx)) // it ends by itself
							continue
						}
						m := peer.NewMutex(prefix+"redsync", redsync.WithTries(1<<30))
						if m.LockContext(rctx) != nil {
							continue
						}
						held.Add(1)
						time.Sleep(hold)
						_, _ = m.UnlockContext(context.WithoutCancel(rctx)) // it ends by itself
					}
				})
			}
		}
		wg.Wait()
		stop()
		after, err := subscriptions(ctx, admin)
		if err != nil {
			return err
		}
		r.set(name+" commands", float64(sent.n.Load()+after-before)/float64(max(held.Load(), 1)))
	}
	return nil
}

// subscriptions is how many commands were sent on connections that hear messages,
// which no hook sees.
func subscriptions(ctx context.Context, client *redis.Client) (n int64, err error) {
	text, err := client.Info(ctx, "commandstats").Result()
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		name, rest, _ := strings.Cut(strings.TrimPrefix(line, "cmdstat_"), ":calls=")
		if name == "subscribe" || name == "unsubscribe" || name == "ping" {
			calls, _, _ := strings.Cut(rest, ",")
			c, err := strconv.ParseInt(calls, 10, 64)
			if err != nil {
				return 0, err
			}
			n += c
		}
	}
	return n, nil
}

// longestGap has 8 waiters in four lockers hold for no time at all, and returns
// the longest time between two holders.
func longestGap(ctx context.Context, opts *redis.Options, prefix string, d time.Duration) (time.Duration, error) {
	rctx, stop := context.WithTimeout(ctx, d)
	defer stop()
	var mu sync.Mutex
	var failed error
	last, longest := time.Now(), time.Duration(0)
	var wg sync.WaitGroup
	for range 4 {
		own := *opts
		client := redis.NewClient(&own)
		defer func() { _ = client.Close() }()
		locker := lock.New(lockredis.New(client, &lockredis.Options{Prefix: prefix}), nil)
		for range 2 {
			wg.Go(func() {
				for rctx.Err() == nil {
					err := locker.Do(rctx, "k", func(context.Context, *lock.Lease) error {
						mu.Lock()
						defer mu.Unlock()
						now := time.Now()
						longest, last = max(longest, now.Sub(last)), now
						return nil
					})
					if err != nil && rctx.Err() == nil {
						mu.Lock()
						failed = err
						mu.Unlock()
						return
					}
				}
			})
		}
	}
	wg.Wait()
	return max(longest, time.Since(last)), failed
}
