package idempotency_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencytest"
)

func TestCache(t *testing.T) {
	idempotencytest.TestStore(t, func(*testing.T) idempotency.Store {
		return idempotency.NewCache(new(idempotency.MemoryStore), nil)
	})
}

// A counting store counts the claims that reach it.
type counting struct {
	idempotency.Store
	claims int
}

func (c *counting) Claim(ctx context.Context, key idempotency.Key, req idempotency.ClaimRequest) (idempotency.Claim, error) {
	c.claims++
	return c.Store.Claim(ctx, key, req)
}

func do(t *testing.T, s idempotency.Store, id string, result []byte, ttl time.Duration) (got []byte, replayed bool) {
	t.Helper()
	got, replayed, err := idempotency.Do(t.Context(), s, idempotency.Key{Scope: "s", ID: id}, &idempotency.Options{TTL: ttl},
		func(context.Context) ([]byte, error) { return result, nil })
	if err != nil {
		t.Fatal(err)
	}
	return got, replayed
}

func TestCacheAnswersFromMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		behind := &counting{Store: new(idempotency.MemoryStore)}
		cache := idempotency.NewCache(behind, nil)
		result := bytes.Repeat([]byte{0, 1, 255}, 1000)
		do(t, cache, "k", result, time.Hour)
		for range 5 {
			got, replayed := do(t, cache, "k", nil, time.Hour)
			if !replayed || !bytes.Equal(got, result) {
				t.Fatalf("replayed %v, %d bytes", replayed, len(got))
			}
			clear(got) // what a caller does to its copy does not reach the others
		}
		if behind.claims != 2 { // the execution and the miss
			t.Fatalf("%d claims reached the store, want 2", behind.claims)
		}
		other := idempotency.Key{Scope: "s", ID: "k", Fingerprint: []byte("other")}
		if _, err := cache.Claim(t.Context(), other, idempotency.ClaimRequest{Token: "t", Lease: 1, TTL: 1}); !errors.Is(err, idempotency.ErrMismatch) {
			t.Fatalf("another fingerprint = %v", err)
		}
		time.Sleep(time.Hour)
		if _, replayed := do(t, cache, "k", nil, time.Hour); replayed {
			t.Fatal("replayed after the TTL")
		}
	})
}

// A key in progress is never answered from memory, nor remembered.
func TestCacheHoldsOnlyCompletedRecords(t *testing.T) {
	behind := &counting{Store: new(idempotency.MemoryStore)}
	cache := idempotency.NewCache(behind, nil)
	k := idempotency.Key{Scope: "s", ID: "k"}
	req := idempotency.ClaimRequest{Token: "a", Lease: time.Minute, TTL: time.Hour}
	if _, err := cache.Claim(t.Context(), k, req); err != nil {
		t.Fatal(err)
	}
	req.Token = "b"
	for range 3 {
		if _, err := cache.Claim(t.Context(), k, req); !errors.Is(err, idempotency.ErrInProgress) {
			t.Fatal(err)
		}
	}
	if behind.claims != 4 {
		t.Fatalf("%d claims reached the store, want 4", behind.claims)
	}
}

func TestCacheIsBounded(t *testing.T) {
	for _, test := range []struct {
		name string
		opts idempotency.CacheOptions
	}{
		{"records", idempotency.CacheOptions{MaxRecords: 10}},
		{"bytes", idempotency.CacheOptions{MaxBytes: 10 * (1000 + len("s") + len("00"))}},
	} {
		t.Run(test.name, func(t *testing.T) {
			behind := &counting{Store: new(idempotency.MemoryStore)}
			cache := idempotency.NewCache(behind, &test.opts)
			id := func(i int) string { return fmt.Sprintf("%02d", i) }
			for i := range 20 {
				do(t, cache, id(i), make([]byte, 1000), time.Hour)
				do(t, cache, id(i), nil, time.Hour)
				do(t, cache, id(0), nil, time.Hour) // used all the time
			}
			do(t, cache, "large", make([]byte, 20_000), time.Hour)
			do(t, cache, "large", nil, time.Hour)
			for _, want := range []struct {
				i    int
				held bool
			}{{0, true}, {19, true}, {15, true}, {1, false}, {5, false}} {
				before := behind.claims
				_, replayed := do(t, cache, id(want.i), nil, time.Hour)
				if held := behind.claims == before; !replayed || held != want.held {
					t.Errorf("record %d: replayed %v, held %v, want %v", want.i, replayed, held, want.held)
				}
			}
		})
	}
}

func TestCacheConcurrentUse(t *testing.T) {
	cache := idempotency.NewCache(new(idempotency.MemoryStore), &idempotency.CacheOptions{MaxRecords: 4})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 500 {
				want := fmt.Sprint(i % 8)
				got, _, err := idempotency.Do(t.Context(), cache, idempotency.Key{Scope: "s", ID: want}, &idempotency.Options{Wait: time.Minute},
					func(context.Context) (string, error) { return want, nil })
				if err != nil || got != want {
					t.Errorf("Do = %q, %v, want %q", got, err, want)
				}
			}
		})
	}
	wg.Wait()
}
