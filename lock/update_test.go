package lock_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ashlar-go/ashlar/lock"
)

// A slow register takes a second for each call, and counts.
type slow struct {
	lock.MemoryRegister[string]
	loads, stores atomic.Int64
	before        func(version int64) // of each store
	fail          func() error
	bare          bool // conflicts without the current value
}

func (r *slow) Load(ctx context.Context, key string) (string, int64, error) {
	r.loads.Add(1)
	time.Sleep(time.Second)
	return r.MemoryRegister.Load(ctx, key)
}

func (r *slow) Store(ctx context.Context, key, value string, version int64) (int64, error) {
	r.stores.Add(1)
	time.Sleep(time.Second)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if r.before != nil {
		r.before(version)
	}
	if r.fail != nil {
		if err := r.fail(); err != nil {
			return 0, err
		}
	}
	version, err := r.MemoryRegister.Store(ctx, key, value, version)
	var conflict *lock.ConflictError
	if r.bare && errors.As(err, &conflict) {
		conflict.Current = nil
	}
	return version, err
}

// overwrite stores as another process.
func (r *slow) overwrite(t *testing.T, value string) {
	t.Helper()
	_, version, err := r.MemoryRegister.Load(t.Context(), "k")
	if err == nil {
		_, err = r.MemoryRegister.Store(t.Context(), "k", value, version)
	}
	if err != nil {
		t.Error(err)
	}
}

func add(s string) func(string) (string, error) {
	return func(v string) (string, error) { return v + s, nil }
}

// Those who wait while a value is stored are stored together, in order; each gets
// its own value, and one that fails harms nobody.
func TestUpdatesCombine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &slow{}
		var stored []int
		u := lock.NewUpdater[string](r, &lock.UpdateOptions{Observer: lock.UpdateObserver{
			Stored: func(_ context.Context, _ string, n int) { stored = append(stored, n) },
		}})
		broken := errors.New("broken")
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() {
				change := add(fmt.Sprint(i))
				if i == 4 {
					change = func(string) (string, error) { return "never seen", broken }
				}
				value, version, err := u.Update(t.Context(), "k", change)
				want, at := strings.ReplaceAll("0123456789"[:i+1], "4", ""), int64(3)
				if i == 0 {
					at = 2
				}
				switch {
				case i == 4 && (!errors.Is(err, broken) || value != "" || version != 0):
					t.Errorf("a change that fails: %q, %d, %v", value, version, err)
				case i != 4 && (err != nil || value != want || version != at):
					t.Errorf("change %d: %q, %d, %v; want %q, %d", i, value, version, err, want, at)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		if l, s := r.loads.Load(), r.stores.Load(); l != 1 || s != 2 || fmt.Sprint(stored) != "[1 8]" {
			t.Errorf("%d loads and %d stores of %v changes", l, s, stored)
		}
	})
}

func TestBatchOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &slow{}
		u := lock.NewUpdater[string](r, &lock.UpdateOptions{Batch: 1})
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				if _, version, err := u.Update(t.Context(), "k", add("x")); err != nil || version != int64(i)+2 {
					t.Errorf("Update %d = version %d, %v", i, version, err)
				}
			})
			synctest.Wait()
		}
		wg.Wait()
		if l, s := r.loads.Load(), r.stores.Load(); l != 1 || s != 5 {
			t.Errorf("%d loads and %d stores", l, s)
		}
	})
}

// A conflict brings the current value, so that a retry costs one round trip; one
// without it is loaded again.
func TestConflict(t *testing.T) {
	for _, bare := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := &slow{bare: bare}
			once := sync.OnceFunc(func() { r.overwrite(t, "other") })
			r.before = func(int64) { once() }
			conflicts := 0
			u := lock.NewUpdater[string](r, &lock.UpdateOptions{Observer: lock.UpdateObserver{
				Conflicted: func(context.Context, string, int, error) { conflicts++ },
			}})
			runs := 0
			value, version, err := u.Update(t.Context(), "k", func(v string) (string, error) { runs++; return v + "mine", nil })
			if err != nil || value != "othermine" || version != 3 || runs != 2 || conflicts != 1 {
				t.Errorf("Update = %q, %d, %v after %d runs and %d conflicts", value, version, err, runs, conflicts)
			}
			if l, s := r.loads.Load(), r.stores.Load(); s != 2 || l != map[bool]int64{false: 1, true: 2}[bare] {
				t.Errorf("%d loads and %d stores", l, s)
			}
		})
	}
}

func TestConflictsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &slow{}
		r.before = func(int64) { r.overwrite(t, "other") }
		u := lock.NewUpdater[string](r, &lock.UpdateOptions{Attempts: 4})
		_, _, err := u.Update(t.Context(), "k", add("x"))
		var conflict *lock.ConflictError
		if !errors.As(err, &conflict) || !errors.Is(err, lock.ErrConflict) || conflict.Version != 5 || conflict.Current != "other" || r.stores.Load() != 4 {
			t.Errorf("Update = %v after %d attempts", err, r.stores.Load())
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		began := time.Now()
		_, _, err = lock.NewUpdater[string](r, &lock.UpdateOptions{Attempts: 1e6}).Update(ctx, "k", add("x"))
		if !errors.Is(err, lock.ErrConflict) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Update = %v, want the conflict and the context's error", err)
		}
		if took := time.Since(began); took != 10*time.Second {
			t.Errorf("gave up after %v", took)
		}
		time.Sleep(time.Minute)
		n := r.stores.Load()
		time.Sleep(time.Hour)
		if r.stores.Load() != n {
			t.Error("it goes on although nobody waits")
		}
		r.fail = func() error { return &lock.ConflictError{Expected: 1} }
		if _, _, err = u.Update(t.Context(), "k", add("x")); !errors.As(err, &conflict) || conflict.Exists {
			t.Errorf("Update of what is gone = %v", err)
		}
	})
}

// A pause grows with the conflicts, from about a round trip.
func TestJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &slow{}
		var at []time.Time
		r.before = func(int64) { at = append(at, time.Now()); r.overwrite(t, "other") }
		_, _, err := lock.NewUpdater[string](r, &lock.UpdateOptions{Attempts: 8}).Update(t.Context(), "k", add("x"))
		if !errors.Is(err, lock.ErrConflict) {
			t.Fatal(err)
		}
		distinct := make(map[time.Duration]bool)
		for i := 1; i < len(at); i++ {
			pause := at[i].Sub(at[i-1]) - time.Second
			if pause <= 0 || pause > time.Second<<(i-1) {
				t.Errorf("pause %d is %v", i, pause)
			}
			distinct[pause] = true
		}
		if len(distinct) < 7 {
			t.Errorf("%d different pauses of 7", len(distinct))
		}
	})
}

func TestUpdateFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &slow{fail: func() error { return errDown }}
		u := lock.NewUpdater[string](r, nil)
		if _, _, err := u.Update(t.Context(), "k", add("x")); !errors.Is(err, errDown) || errors.Is(err, lock.ErrConflict) {
			t.Errorf("Update = %v", err)
		}
		r.fail = nil
		if value, _, err := u.Update(t.Context(), "k", add("x")); err != nil || value != "x" {
			t.Errorf("Update = %q, %v", value, err)
		}
	})
}

// One who leaves takes nobody along, and its change is not run any more.
func TestUpdateIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &slow{}
		u := lock.NewUpdater[string](r, nil)
		var wg sync.WaitGroup
		update := func(after time.Duration, s string, want error) {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), after)
				defer cancel()
				left := atomic.Bool{}
				_, _, err := u.Update(ctx, "k", func(v string) (string, error) {
					if left.Load() {
						t.Errorf("the change %q ran after its Update had returned", s)
					}
					return v + s, nil
				})
				left.Store(true)
				if !errors.Is(err, want) || want == nil && err != nil {
					t.Errorf("Update %q = %v, want %v", s, err, want)
				}
			})
			synctest.Wait()
		}
		update(500*time.Millisecond, "a", context.DeadlineExceeded) // while the value is loaded
		update(1500*time.Millisecond, "b", context.DeadlineExceeded)
		update(time.Hour, "c", nil)
		wg.Wait()
		// The first load was of a alone, and stopped with it; b and c were stored.
		value, _, err := r.MemoryRegister.Load(t.Context(), "k")
		if err != nil || value != "bc" && value != "c" {
			t.Errorf("the value is %q, %v", value, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := u.Update(ctx, "k", add("x")); !errors.Is(err, context.Canceled) {
			t.Errorf("Update with a context that has ended = %v", err)
		}
	})
}

// Panics and exits stay with those who caused them.
func TestChangePanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &slow{}
		u := lock.NewUpdater[string](r, nil)
		var wg sync.WaitGroup
		var panicked atomic.Value
		broken := errors.New("boom")
		exited := true
		wg.Go(func() {
			if _, _, err := u.Update(t.Context(), "k", add("a")); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			defer func() { panicked.Store(recover()) }()
			_, _, _ = u.Update(t.Context(), "k", func(string) (string, error) { panic(broken) })
		})
		synctest.Wait()
		wg.Go(func() {
			_, _, _ = u.Update(t.Context(), "k", func(string) (string, error) { runtime.Goexit(); return "", nil })
			exited = false
		})
		synctest.Wait()
		wg.Go(func() {
			if value, _, err := u.Update(t.Context(), "k", add("b")); err != nil || value != "ab" {
				t.Errorf("Update = %q, %v", value, err)
			}
		})
		wg.Wait()
		if err, ok := panicked.Load().(error); !ok || !errors.Is(err, broken) || !strings.Contains(err.Error(), "update_test.go") {
			t.Errorf("the panic came out as %v", panicked.Load())
		}
		if !exited {
			t.Error("Update returned although its change exited")
		}
	})
}

// A storm of everything, for the race detector.
func TestUpdateStorm(t *testing.T) {
	r := new(lock.MemoryRegister[int])
	var sum, added atomic.Int64
	var wg sync.WaitGroup
	for range 2 {
		u := lock.NewUpdater[int](r, &lock.UpdateOptions{Batch: 5, Attempts: 1e6})
		for i := range 16 {
			wg.Go(func() {
				for n := range 50 {
					ctx, cancel := context.WithCancel(t.Context())
					if i == 0 && n%2 == 0 {
						go cancel()
					}
					_, _, err := u.Update(ctx, "k", func(v int) (int, error) {
						if n%7 == 3 {
							return 0, errDown
						}
						return v + 1, nil
					})
					cancel()
					switch {
					case err == nil:
						sum.Add(1)
					case errors.Is(err, context.Canceled):
						added.Add(1) // or not
					case !errors.Is(err, errDown):
						t.Error(err)
					}
				}
			})
		}
	}
	wg.Wait()
	value, _, err := r.Load(t.Context(), "k")
	if err != nil || int64(value) < sum.Load() || int64(value) > sum.Load()+added.Load() {
		t.Errorf("%d after %d updates and at most %d more, %v", value, sum.Load(), added.Load(), err)
	}
}
