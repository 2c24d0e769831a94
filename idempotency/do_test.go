package idempotency_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ashlar-go/ashlar/idempotency"
)

var quiet = slog.New(slog.DiscardHandler)

func testKey() idempotency.Key { return idempotency.Key{Scope: "s", ID: "k"} }

func held(t *testing.T, s idempotency.Store) bool {
	t.Helper()
	_, err := s.Claim(t.Context(), testKey(), idempotency.ClaimRequest{Token: "probe", Lease: time.Minute, TTL: time.Minute})
	if err == nil {
		if err := s.Release(t.Context(), testKey(), "probe"); err != nil {
			t.Fatal(err)
		}
		return false
	}
	if !errors.Is(err, idempotency.ErrInProgress) {
		t.Fatal(err)
	}
	return true
}

// The heartbeat keeps the claim for as long as the work takes, in the time of a
// fake clock: an hour on a lease of five seconds.
func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(idempotency.MemoryStore)
		_, _, err := idempotency.Do(t.Context(), store, testKey(), nil, func(ctx context.Context) (int, error) {
			for range 3600 {
				time.Sleep(time.Second)
				if !held(t, store) {
					t.Fatal("the claim was lost")
				}
			}
			return 0, ctx.Err()
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

// When the claim cannot be extended, the work's context ends before the lease
// does, with the cause ErrLeaseLost.
func TestContextEndsBeforeTheLease(t *testing.T) {
	for name, failure := range map[string]error{
		"store down":    errors.New("down"),
		"taken over":    idempotency.ErrLeaseLost,
		"store hangs":   errHang,
		"store is deaf": errDeaf,
		"down, wraps":   fmt.Errorf("a: %w", io.EOF),
		"taken, wraps":  fmt.Errorf("a: %w", idempotency.ErrLeaseLost),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &hanging{failing{Store: new(idempotency.MemoryStore), extend: failure}}
				start := time.Now()
				opts := &idempotency.Options{Lease: 5 * time.Second, Logger: quiet}
				_, _, err := idempotency.Do(t.Context(), store, testKey(), opts, func(ctx context.Context) (int, error) {
					<-ctx.Done()
					if !errors.Is(context.Cause(ctx), idempotency.ErrLeaseLost) {
						t.Errorf("cause %v, want ErrLeaseLost", context.Cause(ctx))
					}
					if took := time.Since(start); took > 5*time.Second {
						t.Errorf("the context ended after %v, the lease after 5 s", took)
					}
					return 0, context.Cause(ctx)
				})
				if !errors.Is(err, idempotency.ErrLeaseLost) {
					t.Errorf("Do = %v", err)
				}
			})
		})
	}
}

var errHang, errDeaf = errors.New("hang"), errors.New("hang, whatever the context says")

// hanging is a store whose Extend hangs, until its context ends or for long after.
type hanging struct{ failing }

func (s *hanging) Extend(ctx context.Context, k idempotency.Key, token string, lease time.Duration) error {
	if errors.Is(s.extend, errDeaf) {
		time.Sleep(20 * time.Second)
		return errDeaf
	}
	if errors.Is(s.extend, errHang) {
		<-ctx.Done()
		return ctx.Err()
	}
	return s.failing.Extend(ctx, k, token, lease)
}

// A store that is down for less than a lease costs nothing.
func TestHeartbeatRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &failing{Store: new(idempotency.MemoryStore)}
		var mu sync.Mutex
		flaky := &locked{failing: store, mu: &mu}
		_, _, err := idempotency.Do(t.Context(), flaky, testKey(), nil, func(ctx context.Context) (int, error) {
			for i := range 20 {
				mu.Lock()
				store.extend = nil
				if i%2 == 0 {
					store.extend = errors.New("down")
				}
				mu.Unlock()
				time.Sleep(2 * time.Second)
			}
			return 0, context.Cause(ctx)
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

type locked struct {
	*failing
	mu *sync.Mutex
}

func (s *locked) Extend(ctx context.Context, k idempotency.Key, token string, lease time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failing.Extend(ctx, k, token, lease)
}

// What becomes of the key when the work fails.
func TestOutcomes(t *testing.T) {
	broken := errors.New("broken")
	never := func(error) bool { return false }
	always := func(error) bool { return true }
	for _, test := range []struct {
		name    string
		err     error
		release func(error) bool
		held    bool
	}{
		{"clean", broken, nil, false},
		{"clean, policy", broken, never, true},
		{"deadline", context.DeadlineExceeded, nil, true},
		{"cancelled", fmt.Errorf("call: %w", context.Canceled), nil, true},
		{"cancelled, policy", context.Canceled, always, false},
		{"network", &net.OpError{Op: "read", Err: broken}, nil, true},
		{"cut off", io.ErrUnexpectedEOF, nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			store := new(idempotency.MemoryStore)
			var told bool
			opts := &idempotency.Options{Release: test.release, Observer: idempotency.Observer{
				Failed: func(_ context.Context, _ idempotency.Key, err error, released bool) {
					told = errors.Is(err, test.err) && released == !test.held
				},
			}}
			_, _, err := idempotency.Do(t.Context(), store, testKey(), opts, func(context.Context) (int, error) { return 0, test.err })
			if !errors.Is(err, test.err) || err.Error() != test.err.Error() {
				t.Errorf("Do = %v, want the error as it is", err)
			}
			if held(t, store) != test.held || !told {
				t.Errorf("held %v, observer told the same: %v; want held %v", !test.held, told, test.held)
			}
		})
	}
}

// All exits of the work unlock the key, at the latest when the lease ends.
func TestGoexit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(idempotency.MemoryStore)
		go func() {
			_, _, _ = idempotency.Do(t.Context(), store, testKey(), nil, func(context.Context) (int, error) {
				runtime.Goexit()
				return 0, nil
			})
		}()
		synctest.Wait()
		time.Sleep(5*time.Second - 1)
		if !held(t, store) {
			t.Fatal("free before the lease ended")
		}
		time.Sleep(time.Nanosecond)
		if held(t, store) {
			t.Fatal("taken after the lease ended")
		}
	})
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(idempotency.MemoryStore)
		work := func(context.Context) (string, error) { time.Sleep(time.Minute); return "slow", nil }
		go func() { _, _, _ = idempotency.Do(t.Context(), store, testKey(), nil, work) }()
		synctest.Wait()
		start := time.Now()
		_, _, err := idempotency.Do(t.Context(), store, testKey(), &idempotency.Options{Wait: 10 * time.Second}, work)
		if waited := time.Since(start); !errors.Is(err, idempotency.ErrInProgress) || waited != 10*time.Second {
			t.Fatalf("%v after %v, want ErrInProgress after 10 s", err, waited)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := idempotency.Do(ctx, store, testKey(), &idempotency.Options{Wait: time.Hour}, work); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%v, want the context's error", err)
		}
		got, replayed, err := idempotency.Do(t.Context(), store, testKey(), &idempotency.Options{Wait: time.Hour}, work)
		if got != "slow" || !replayed || err != nil || time.Since(start) > time.Minute+time.Second {
			t.Fatalf("%q, %v, %v after %v", got, replayed, err, time.Since(start))
		}
	})
}

func TestTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(idempotency.MemoryStore)
		runs := 0
		do := func() {
			_, _, err := idempotency.Do(t.Context(), store, testKey(), nil, func(context.Context) (int, error) { runs++; return 0, nil })
			if err != nil {
				t.Fatal(err)
			}
		}
		do()
		time.Sleep(24*time.Hour - 1)
		do()
		if runs != 1 {
			t.Fatal("ran again within the TTL")
		}
		time.Sleep(time.Nanosecond)
		do()
		if runs != 2 {
			t.Fatal("did not run again after the TTL")
		}
	})
}

// Done but not recorded: the caller gets the value and is told.
func TestNotRecorded(t *testing.T) {
	for _, reason := range []error{errors.New("down"), idempotency.ErrLeaseLost} {
		synctest.Test(t, func(t *testing.T) {
			store := &failing{Store: new(idempotency.MemoryStore), complete: reason}
			var lost error
			opts := &idempotency.Options{Observer: idempotency.Observer{Lost: func(_ context.Context, _ idempotency.Key, err error) { lost = err }}}
			got, _, err := idempotency.Do(t.Context(), store, testKey(), opts, func(context.Context) (int, error) { return 7, nil })
			if got != 7 || !errors.Is(err, idempotency.ErrNotRecorded) || !errors.Is(err, reason) || !errors.Is(lost, reason) {
				t.Fatalf("%v, %v; the observer was told %v", got, err, lost)
			}
		})
	}
	_, _, err := idempotency.Do(t.Context(), new(idempotency.MemoryStore), testKey(), nil, func(context.Context) (chan int, error) { return nil, nil })
	if !errors.Is(err, idempotency.ErrNotRecorded) {
		t.Fatalf("a result that has no JSON = %v", err)
	}
}

// A completion whose reply is lost is repeated.
func TestCompleteIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &onceDown{Store: new(idempotency.MemoryStore)}
		for i := range 2 {
			got, replayed, err := idempotency.Do(t.Context(), store, testKey(), nil, func(context.Context) (int, error) { return 7, nil })
			if got != 7 || err != nil || replayed != (i == 1) {
				t.Fatalf("%v, %v, %v", got, replayed, err)
			}
		}
	})
}

type onceDown struct {
	idempotency.Store
	calls int
}

func (s *onceDown) Complete(ctx context.Context, k idempotency.Key, token string, result []byte) error {
	err := s.Store.Complete(ctx, k, token, result)
	if s.calls++; s.calls == 1 {
		return errors.New("the reply was lost")
	}
	return err
}

// A claim whose reply is lost is given back.
func TestClaimLost(t *testing.T) {
	store := &lostClaim{Store: new(idempotency.MemoryStore)}
	down := errors.New("the reply was lost")
	store.err = down
	_, _, err := idempotency.Do(t.Context(), store, testKey(), nil, func(context.Context) (int, error) { t.Error("ran"); return 0, nil })
	if !errors.Is(err, down) {
		t.Fatalf("Do = %v", err)
	}
	store.err = nil
	if held(t, store) {
		t.Fatal("the key stays taken")
	}
}

type lostClaim struct {
	idempotency.Store
	err error
}

func (s *lostClaim) Claim(ctx context.Context, k idempotency.Key, req idempotency.ClaimRequest) (idempotency.Claim, error) {
	c, err := s.Store.Claim(ctx, k, req)
	if s.err != nil {
		return idempotency.Claim{}, s.err
	}
	return c, err
}

func TestObserver(t *testing.T) {
	var log []string
	note := func(what string) { log = append(log, what) }
	opts := &idempotency.Options{Observer: idempotency.Observer{
		Completed: func(context.Context, idempotency.Key, time.Duration) { note("completed") },
		Replayed:  func(context.Context, idempotency.Key) { note("replayed") },
		Refused:   func(_ context.Context, _ idempotency.Key, err error) { note(err.Error()) },
		Failed:    func(_ context.Context, _ idempotency.Key, err error, _ bool) { note(fmt.Sprint("failed ", err)) },
	}}
	store := new(idempotency.MemoryStore)
	do := func(k idempotency.Key, fn func(context.Context) (int, error)) {
		defer func() { _ = recover() }()
		_, _, _ = idempotency.Do(t.Context(), store, k, opts, fn)
	}
	ok := func(context.Context) (int, error) { return 0, nil }
	other := testKey()
	other.Fingerprint = []byte("other")
	do(testKey(), func(context.Context) (int, error) { do(testKey(), ok); return 0, errors.New("broken") })
	do(testKey(), ok)
	do(testKey(), ok)
	do(other, ok)
	do(idempotency.Key{Scope: "s", ID: "panics"}, func(context.Context) (int, error) { panic("boom") })
	want := []string{
		idempotency.ErrInProgress.Error(), "failed broken", "completed", "replayed",
		idempotency.ErrMismatch.Error(), "failed <nil>",
	}
	if fmt.Sprint(log) != fmt.Sprint(want) {
		t.Fatalf("told\n%v, want\n%v", log, want)
	}
}

func TestKeyValidate(t *testing.T) {
	ok := strings.Repeat("é", 127) + "x" // 255 bytes
	for _, k := range []idempotency.Key{{Scope: "s", ID: "i"}, {Scope: idempotency.Global, ID: ok}, {Scope: ok, ID: "i", Fingerprint: make([]byte, 255)}} {
		if err := k.Validate(); err != nil {
			t.Errorf("%v: %v", k, err)
		}
	}
	for _, k := range []idempotency.Key{
		{},
		{ID: "i"},
		{Scope: "s"},
		{Scope: "s", ID: ok + "x"},
		{Scope: ok + "x", ID: "i"},
		{Scope: "s", ID: "a\nb"},
		{Scope: "s\x00", ID: "i"},
		{Scope: "s", ID: "\xff"},
		{Scope: "s", ID: "\x7f"},
		{Scope: "s", ID: "i", Fingerprint: make([]byte, 256)},
	} {
		if err := k.Validate(); !errors.Is(err, idempotency.ErrInvalid) {
			t.Errorf("%v: %v, want ErrInvalid", k, err)
		}
		_, _, err := idempotency.Do(t.Context(), new(idempotency.MemoryStore), k, nil, func(context.Context) (int, error) { return 0, nil })
		if !errors.Is(err, idempotency.ErrInvalid) {
			t.Errorf("Do with %v: %v, want ErrInvalid", k, err)
		}
	}
}
