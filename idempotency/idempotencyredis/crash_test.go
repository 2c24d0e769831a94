package idempotencyredis_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencyredis"
	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/internal/redistest"
)

// Longer than a machine stalls: work that runs into its lease is repeated too.
const crashLease = time.Second

func storm(mode, prefix string, points ...string) crashtest.Storm {
	s := crashtest.Storm{
		Test: "TestCrashChild", Points: points, Kills: 21, Processes: 3, Window: 12,
		Plan: crashtest.Plan{Mode: mode, Backend: prefix, Duplicates: 4},
	}
	if os.Getenv("IDEMPOTENCY_CRASH_FULL") != "" {
		s.Kills, s.Processes, s.Window, s.Plan.Duplicates = 200, 8, 800, 8
	}
	return s
}

// The effect is not in the record's transaction, so what Redis can promise is
// this: a kill between the effect and its record, and nothing else, repeats the
// effect, once for each such kill; with AtMostOnce not even that does.
func TestCrash(t *testing.T) {
	for _, mode := range []string{"retried", "at most once"} {
		t.Run(mode, func(t *testing.T) {
			client := redistest.Client(t)
			prefix := redistest.Prefix(t, client)
			points := []string{"claimed", "worked", "recorded"}
			storm := storm(mode, prefix, points...)
			keys, landed, at := storm.Run(t)
			t.Logf("kills: %v, keys: %d", landed, keys)
			if t.Failed() {
				return
			}
			storm.Sweep(t, keys)
			repeats := make(map[string]int64)
			for _, id := range at["worked"] {
				repeats[id]++
			}
			for i := range keys {
				id := fmt.Sprintf("key %d", i)
				n, err := client.Get(t.Context(), prefix+"effect:"+id).Int64()
				if err != nil && !errors.Is(err, redis.Nil) {
					t.Fatal(err)
				}
				low, high := int64(1), 1+repeats[id]
				if mode == "at most once" {
					low, high = 0, 1
				}
				if n < low || n > high {
					t.Errorf("%d effects of %s, want %d to %d", n, id, low, high)
				}
				if mode == "retried" && n < high && repeats[id] > 0 {
					t.Errorf("%d effects of %s, which was killed %d times after its effect: the kill did not land there", n, id, repeats[id])
				}
			}
		})
	}
}

// TestCrashChild runs its keys one after the other, each by several duplicates
// at once that do not give up.
func TestCrashChild(t *testing.T) {
	c := crashtest.Current(t)
	client := redistest.Client(t)
	store := idempotencyredis.New(client, &idempotencyredis.Options{Prefix: c.Backend})
	opts := &idempotency.Options{Lease: crashLease, Wait: time.Minute, AtMostOnce: c.Mode == "at most once"}
	for i := c.From; i < c.To; i++ {
		id := fmt.Sprintf("key %d", i)
		var wg sync.WaitGroup
		for range c.Duplicates {
			wg.Go(func() {
				_, _, err := idempotency.Do(t.Context(), store, idempotency.Key{Scope: "crash", ID: id}, opts, func(ctx context.Context) (int64, error) {
					c.At("claimed", id)
					n, err := client.Incr(ctx, c.Backend+"effect:"+id).Result()
					c.At("worked", id)
					return n, err
				})
				if err != nil && (!opts.AtMostOnce || !errors.Is(err, idempotency.ErrUnknown)) {
					t.Errorf("%s: %v", id, err)
				}
				c.At("recorded", id)
			})
		}
		wg.Wait()
	}
}
