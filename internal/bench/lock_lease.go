package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/bsm/redislock"
	"github.com/go-redsync/redsync/v4"
	redsyncredis "github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"github.com/redis/rueidis/rueidislock"

	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockredis"
)

// Acquire and release in Redis by one caller, beside the floor of two round trips
// without a fence.
var lockLeaseExperiment = experiment{
	ids:  []string{"LK6"},
	what: "acquire and release of a lease in Redis by one caller",
	round: func(ctx context.Context, e *env, r *results) error {
		opts, err := redis.ParseURL(os.Getenv("TEST_REDIS_URL"))
		if err != nil {
			return err
		}
		client := redis.NewClient(opts)
		defer func() { _ = client.Close() }()
		prefix := fmt.Sprintf("bench:%d:%d:", os.Getpid(), time.Now().UnixNano())
		locker := lock.New(lockredis.New(client, &lockredis.Options{Prefix: prefix}), nil)
		peer := redislock.New(client)
		sync := redsync.New(redsyncredis.NewPool(client))
		push, err := rueidislock.NewLocker(rueidislock.LockerOption{
			KeyPrefix: prefix + "rueidis", KeyMajority: 1, // with NoLoopTracking it stalls now and then
			ClientOption: rueidis.ClientOption{InitAddress: []string{opts.Addr}},
		})
		if err != nil {
			return err
		}
		defer push.Close()
		compareAndDelete := redis.NewScript(`if redis.call("get", KEYS[1]) == ARGV[1] then return redis.call("del", KEYS[1]) end return 0`)
		subjects := []subject{
			{"floor", func() error {
				if err := client.SetNX(ctx, prefix+"floor", "owner", 10*time.Second).Err(); err != nil {
					return err
				}
				return compareAndDelete.Run(ctx, client, []string{prefix + "floor"}, "owner").Err()
			}},
			{"ours", func() error {
				lease, err := locker.Lock(ctx, "k")
				if err != nil {
					return err
				}
				return lease.Release(ctx)
			}},
			{"redislock", func() error {
				l, err := peer.Obtain(ctx, prefix+"redislock", 10*time.Second, nil)
				if err != nil {
					return err
				}
				return l.Release(ctx)
			}},
			{"redsync", func() error {
				m := sync.NewMutex(prefix + "redsync")
				if err := m.TryLockContext(ctx); err != nil {
					return err
				}
				_, err := m.UnlockContext(ctx)
				return err
			}},
			{"rueidislock", func() error {
				_, cancel, err := push.WithContext(ctx, "k")
				if err == nil {
					cancel()
				}
				return err
			}},
		}
		return inTurn(subjects, e.n(400), 20, r)
	},
	bars: []bar{
		{id: "LK6", what: "acquire and release, fenced/two round trips without a fence", atMost: 1.05, ratio: func(r *results) float64 { return r.of("ours", "floor") }},
		{id: "LK6", what: "allocations of acquire and release", atMost: 20, unit: " ", ratio: func(r *results) float64 { return math.Round(r.values["ours allocs"]) }},
		{id: "LK6", what: "client CPU/redislock's", atMost: 0.8, ratio: func(r *results) float64 { return r.of("ours cpu", "redislock cpu") }},
		{id: "LK6", what: "client CPU/redsync's", atMost: 0.8, ratio: func(r *results) float64 { return r.of("ours cpu", "redsync cpu") }},
		{id: "LK6", what: "client CPU/rueidislock's, which has no fence", atMost: 1.05, ratio: func(r *results) float64 { return r.of("ours cpu", "rueidislock cpu") }},
	},
}

// A subject is one of those that are measured side by side.
type subject struct {
	name string
	call func() error
}

// inTurn calls each subject n times in each of the turns, and sets the fastest
// turn's ns, ns of CPU and allocations for each call.
func inTurn(subjects []subject, n, turns int, r *results) error {
	for turn := range turns {
		for i := range subjects {
			s := subjects[(i+turn)%len(subjects)]
			if turn == 0 { // connections, scripts
				for range 10 {
					if err := s.call(); err != nil {
						return fmt.Errorf("%s: %w", s.name, err)
					}
				}
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			cpu, start := processCPU(), time.Now()
			for range n {
				if err := s.call(); err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
			}
			wall, used := time.Since(start), processCPU()-cpu
			runtime.ReadMemStats(&after)
			for name, v := range map[string]float64{
				"": float64(wall), " cpu": float64(used), " allocs": float64(after.Mallocs - before.Mallocs),
			} {
				v /= float64(n)
				if old, ok := r.values[s.name+name]; !ok || v < old {
					r.set(s.name+name, v)
				}
			}
		}
	}
	return nil
}

// processCPU is how much CPU this process has used.
func processCPU() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err) // it does not fail for oneself
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
