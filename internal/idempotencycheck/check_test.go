package idempotencycheck

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/idempotency/idempotencyredis"
	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/internal/redistest"
)

// drive has clients claim the same few keys, and then extend, complete, release
// or forget what they were granted, late and repeatedly, on leases that end.
func drive(ctx context.Context, r *Recorder, keys int) {
	var wg sync.WaitGroup
	for client := range 6 {
		wg.Go(func() {
			for i := range 12 * keys {
				key, token := fmt.Sprint("k", i/12), fmt.Sprintf("%d/%d", client, i)
				lease := []time.Duration{2 * time.Millisecond, time.Minute}[rand.IntN(2)]
				if i%12 < 6 {
					lease = 2 * time.Millisecond
				}
				if !r.Claim(ctx, client, key, token, lease) {
					continue
				}
				for range 1 + rand.IntN(2) {
					switch rand.IntN(5) {
					case 0:
						r.Claim(ctx, client, key, token, lease)
					case 1:
						r.Extend(ctx, client, key, token, 2*time.Millisecond)
					case 2:
						time.Sleep(3 * time.Millisecond) // the lease may end
						r.Complete(ctx, client, key, token, token)
					case 3:
						r.Release(ctx, client, key, token)
					case 4:
						r.Complete(ctx, client, key, token, token)
					}
				}
			}
		})
	}
	wg.Wait()
}

func check(t *testing.T, store idempotency.Store) porcupine.CheckResult {
	t.Helper()
	r := NewRecorder(store)
	drive(t.Context(), r, 15)
	result, err := r.Check(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d calls: %v", r.Len(), result)
	return result
}

func TestStoresAreLinearizable(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) idempotency.Store{
		"memory": func(*testing.T) idempotency.Store { return new(idempotency.MemoryStore) },
		"cache": func(*testing.T) idempotency.Store {
			return idempotency.NewCache(new(idempotency.MemoryStore), nil)
		},
		"postgres": func(t *testing.T) idempotency.Store {
			pool := pgtest.Pool(t)
			if err := idempotencypg.Migrate(t.Context(), pool); err != nil {
				t.Fatal(err)
			}
			return idempotencypg.New(pool)
		},
		"redis": func(t *testing.T) idempotency.Store {
			client := redistest.Client(t)
			return idempotencyredis.New(client, &idempotencyredis.Options{Prefix: redistest.Prefix(t, client)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			if result := check(t, open(t)); result != porcupine.Ok {
				t.Errorf("the history is %v", result)
			}
		})
	}
}

// A mutant is a memory store with one rule taken out.
type mutant struct {
	idempotency.MemoryStore
	rule string

	mu    sync.Mutex
	owner map[string]string
}

func (m *mutant) Claim(ctx context.Context, k idempotency.Key, req idempotency.ClaimRequest) (idempotency.Claim, error) {
	switch m.rule {
	case "claim": // not atomic: looks whether the key is free, then takes it
		probe := req
		probe.Token, probe.Lease = "probe "+req.Token, time.Minute
		c, err := m.MemoryStore.Claim(ctx, k, probe)
		if err != nil || c.Done {
			return c, err
		}
		if err := m.Release(ctx, k, probe.Token); err != nil {
			return c, err
		}
		runtime.Gosched()
		if c, err := m.MemoryStore.Claim(ctx, k, req); err == nil {
			return c, err
		}
		return idempotency.Claim{}, nil
	case "lease": // ends early
		req.Lease = 1
	}
	c, err := m.MemoryStore.Claim(ctx, k, req)
	if err == nil && !c.Done {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.owner[k.ID] = req.Token
	}
	return c, err
}

func (m *mutant) Complete(ctx context.Context, k idempotency.Key, token string, result []byte) error {
	err := m.MemoryStore.Complete(ctx, k, token, result)
	if m.rule == "token" && errors.Is(err, idempotency.ErrLeaseLost) {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.MemoryStore.Complete(ctx, k, m.owner[k.ID], result)
	}
	return err
}

func TestMutantsAreNotLinearizable(t *testing.T) {
	for _, rule := range []string{"none", "claim", "lease", "token"} {
		t.Run(rule, func(t *testing.T) {
			want := porcupine.Illegal
			if rule == "none" {
				want = porcupine.Ok
			}
			for range 30 {
				result := check(t, &mutant{rule: rule, owner: make(map[string]string)})
				if result == want {
					return
				}
				if rule == "none" {
					break
				}
			}
			t.Errorf("no history was %v", want)
		})
	}
}
