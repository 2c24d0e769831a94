package lockcheck

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

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/internal/redistest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
	"github.com/ashlar-go/ashlar/lock/lockredis"
)

// drive has clients take the same few keys, and then extend, release, repeat or
// forget what they were granted, late and repeatedly, on leases that end.
func drive(ctx context.Context, l *Leases, keys int) {
	var wg sync.WaitGroup
	for client := range 6 {
		wg.Go(func() {
			for i := range 10 * keys {
				key, owner := fmt.Sprint("k", i/10), fmt.Sprintf("%d/%d", client, i)
				ttl := 2 * time.Millisecond
				if !l.Acquire(ctx, client, key, owner, ttl) {
					continue
				}
				for range 1 + rand.IntN(3) {
					switch rand.IntN(5) {
					case 0:
						l.Acquire(ctx, client, key, owner, ttl)
					case 1:
						l.Extend(ctx, client, key, owner, ttl)
					case 2:
						time.Sleep(3 * time.Millisecond) // the lease may end
						l.Extend(ctx, client, key, owner, ttl)
					case 3:
						l.Release(ctx, client, key, owner)
					case 4:
						l.Release(ctx, (client+1)%6+100, key, fmt.Sprint("none ", owner))
					}
				}
			}
		})
	}
	wg.Wait()
}

func checkLeases(t *testing.T, store lock.Store) porcupine.CheckResult {
	t.Helper()
	l := NewLeases(store)
	_, l.Hesitant = store.(*lockpg.Store)
	drive(t.Context(), l, 12)
	result, n, err := l.Check(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d calls: %v", n, result)
	return result
}

func TestStoresAreLinearizable(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) lock.Store{
		"memory": func(*testing.T) lock.Store { return new(lock.MemoryStore) },
		"postgres": func(t *testing.T) lock.Store {
			pool := pgtest.Pool(t)
			if err := lockpg.Migrate(t.Context(), pool); err != nil {
				t.Fatal(err)
			}
			return lockpg.New(pool, nil)
		},
		"redis": func(t *testing.T) lock.Store {
			client := redistest.Client(t)
			redistest.Real(t, client, "leases that do not end early")
			return lockredis.New(client, &lockredis.Options{Prefix: redistest.Prefix(t, client)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			if result := checkLeases(t, open(t)); result != porcupine.Ok {
				t.Errorf("the history is %v", result)
			}
		})
	}
}

// A mutant is a memory store with one rule taken out.
type mutant struct {
	lock.MemoryStore
	rule string

	mu sync.Mutex
	n  int64
}

func (m *mutant) Acquire(ctx context.Context, req lock.Request) (int64, error) {
	switch m.rule {
	case "atomic": // looks whether the key is free, then takes it
		probe := req
		probe.Owner += " probe"
		token, err := m.MemoryStore.Acquire(ctx, probe)
		if err != nil {
			return token, err
		}
		if err := m.Release(ctx, probe); err != nil {
			return 0, err
		}
		runtime.Gosched()
		if real, err := m.MemoryStore.Acquire(ctx, req); err == nil {
			return real, nil
		}
		return token, nil
	case "token": // goes back now and then
		token, err := m.MemoryStore.Acquire(ctx, req)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.n++; m.n%17 == 0 {
			token = 1
		}
		return token, err
	case "lease": // ends early
		req.TTL /= 4
	}
	return m.MemoryStore.Acquire(ctx, req)
}

func (m *mutant) Extend(ctx context.Context, req lock.Request) error {
	err := m.MemoryStore.Extend(ctx, req)
	if m.rule == "owner" && errors.Is(err, lock.ErrLost) { // an upsert
		_, err = m.MemoryStore.Acquire(ctx, req)
		if errors.Is(err, lock.ErrHeld) {
			err = lock.ErrLost
		}
	}
	return err
}

func TestMutantsAreNotLinearizable(t *testing.T) {
	for _, rule := range []string{"none", "atomic", "token", "lease", "owner"} {
		t.Run(rule, func(t *testing.T) {
			want := porcupine.Illegal
			if rule == "none" {
				want = porcupine.Ok
			}
			for range 30 {
				result := checkLeases(t, &mutant{rule: rule})
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

// checkRegister has updaters, as of several processes, append to one value.
func checkRegister(t *testing.T, r lock.Register[string]) porcupine.CheckResult {
	t.Helper()
	v := NewValues()
	var wg sync.WaitGroup
	for p := range 3 {
		u := lock.NewUpdater(r, &lock.UpdateOptions{Attempts: 1000})
		for c := range 2 {
			client := 3*p + c
			wg.Go(func() {
				for i := range 8 {
					v.Update(t.Context(), client, u, fmt.Sprintf("%d/%d ", client, i))
				}
			})
		}
		wg.Go(func() {
			for range 8 {
				v.Load(t.Context(), 3*p+2, r)
				time.Sleep(time.Millisecond)
			}
		})
	}
	wg.Wait()
	result, n, err := v.Check(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d calls: %v", n, result)
	return result
}

func texts(t *testing.T) lock.Register[string] {
	pool := pgtest.Pool(t)
	if _, err := pool.Exec(t.Context(), `CREATE TABLE item (id text PRIMARY KEY, version bigint NOT NULL, value text NOT NULL);
		INSERT INTO item VALUES ('k', 1, '')`); err != nil {
		t.Fatal(err)
	}
	return lockpg.Rows[string]{
		DB:      pool,
		Select:  `SELECT version, value FROM item WHERE id = $1`,
		Update:  `UPDATE item SET version = version + 1, value = $3 WHERE id = $1 AND version = $2 RETURNING version`,
		Columns: func(v *string) []any { return []any{v} },
	}
}

func TestUpdatesAreLinearizable(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) lock.Register[string]{
		"memory":   func(*testing.T) lock.Register[string] { return new(lock.MemoryRegister[string]) },
		"postgres": texts,
	} {
		t.Run(name, func(t *testing.T) {
			if result := checkRegister(t, open(t)); result != porcupine.Ok {
				t.Errorf("the history is %v", result)
			}
		})
	}
}

// unchecked replaces whatever is there.
type unchecked struct{ lock.MemoryRegister[string] }

func (r *unchecked) Store(ctx context.Context, key, value string, version int64) (int64, error) {
	for {
		now, err := r.MemoryRegister.Store(ctx, key, value, version)
		var conflict *lock.ConflictError
		if !errors.As(err, &conflict) {
			return now, err
		}
		version = conflict.Version
	}
}

func (r *unchecked) Load(ctx context.Context, key string) (string, int64, error) {
	value, version, err := r.MemoryRegister.Load(ctx, key)
	time.Sleep(100 * time.Microsecond) // another comes in between
	return value, version, err
}

func TestLostUpdatesAreNotLinearizable(t *testing.T) {
	for range 30 {
		if checkRegister(t, new(unchecked)) == porcupine.Illegal {
			return
		}
	}
	t.Error("no history was illegal")
}
