package locktest

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/ashlar-go/ashlar/lock"
)

// TestRegister runs the suite of a register of numbers. For each test it calls
// open, which returns a register in which the key "k" has the value 0.
func TestRegister(t *testing.T, open func(t *testing.T) lock.Register[int64]) {
	for _, test := range []struct {
		name string
		f    func(t *testing.T, r lock.Register[int64])
	}{
		{"LoadStore", loadStore},
		{"OneOfManyStores", oneOfManyStores},
		{"RegisterCancelled", registerCancelled},
		{"NoUpdateIsLost", noUpdateIsLost},
	} {
		t.Run(test.name, func(t *testing.T) { test.f(t, open(t)) })
	}
}

func loadStore(t *testing.T, r lock.Register[int64]) {
	value, first, err := r.Load(t.Context(), "k")
	if err != nil || value != 0 || first <= 0 {
		t.Fatalf("Load = %d, %d, %v", value, first, err)
	}
	second, err := r.Store(t.Context(), "k", 7, first)
	if err != nil || second <= first {
		t.Fatalf("Store = %d, %v after version %d", second, err, first)
	}
	for _, stale := range []int64{first, second + 1} {
		_, err = r.Store(t.Context(), "k", 8, stale)
		var conflict *lock.ConflictError
		if !errors.As(err, &conflict) || !errors.Is(err, lock.ErrConflict) {
			t.Fatalf("Store of version %d over %d = %v, want a ConflictError", stale, second, err)
		}
		if conflict.Expected != stale || conflict.Version != second || !conflict.Exists {
			t.Fatalf("Store of version %d over %d = %+v", stale, second, *conflict)
		}
		if conflict.Current != nil && conflict.Current != int64(7) {
			t.Fatalf("the current value is %v, want 7", conflict.Current)
		}
	}
	if value, version, err := r.Load(t.Context(), "k"); err != nil || value != 7 || version != second {
		t.Fatalf("Load = %d, %d, %v; want 7, %d", value, version, err, second)
	}
}

func oneOfManyStores(t *testing.T, r lock.Register[int64]) {
	for range 10 {
		_, version, err := r.Load(t.Context(), "k")
		if err != nil {
			t.Fatal(err)
		}
		n := suite{T: t}.race(8, func(i int) bool {
			_, err := r.Store(t.Context(), "k", int64(i), version)
			if err != nil && !errors.Is(err, lock.ErrConflict) {
				t.Error(err)
			}
			return err == nil
		})
		if n != 1 {
			t.Fatalf("%d of 8 stores at once over the same version succeeded, want 1", n)
		}
	}
}

func registerCancelled(t *testing.T, r lock.Register[int64]) {
	_, version, err := r.Load(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	ctx := cancelled(t.Context())
	if _, _, err := r.Load(ctx, "k"); !errors.Is(err, context.Canceled) {
		t.Errorf("Load with a cancelled context = %v", err)
	}
	if _, err := r.Store(ctx, "k", 1, version); !errors.Is(err, context.Canceled) {
		t.Errorf("Store with a cancelled context = %v", err)
	}
}

// Updaters in several processes, each with several callers, lose nothing.
func noUpdateIsLost(t *testing.T, r lock.Register[int64]) {
	const updaters, callers, each = 3, 4, 10
	var wg sync.WaitGroup
	for range updaters {
		u := lock.NewUpdater(r, &lock.UpdateOptions{Attempts: 10_000})
		for range callers {
			wg.Go(func() {
				last := int64(0)
				for range each {
					value, version, err := u.Update(t.Context(), "k", func(n int64) (int64, error) { return n + 1, nil })
					if err != nil {
						t.Error(err)
						return
					}
					if value <= last || version <= 0 {
						t.Errorf("value %d after %d, version %d", value, last, version)
					}
					last = value
					_, _, err = u.Update(t.Context(), "k", func(int64) (int64, error) { return -1, errBroken })
					if !errors.Is(err, errBroken) {
						t.Errorf("a change that fails = %v", err)
					}
				}
			})
		}
	}
	wg.Wait()
	if value, _, err := r.Load(t.Context(), "k"); err != nil || value != updaters*callers*each {
		t.Fatalf("Load = %d, %v after %d updates", value, err, updaters*callers*each)
	}
}

var errBroken = errors.New("broken")
