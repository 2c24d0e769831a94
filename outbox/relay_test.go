package outbox_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxtest"
)

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// start runs a relay until the bubble's test ends or stop is called.
func start(t *testing.T, s outbox.Store, p outbox.Publisher, opts outbox.RelayOptions) (r *outbox.Relay, stop func()) {
	opts.Logger = quiet
	r = outbox.NewRelay(s, p, &opts)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return r, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v, want nil after a clean drain", err)
		}
	}
}

func ids(msgs []outbox.Message) (out []string) {
	for _, m := range msgs {
		out = append(out, m.ID)
	}
	return out
}

func TestWakeIsFasterThanPolling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := outbox.NewMemoryStore(), &outboxtest.Recorder{}
		r, stop := start(t, s, p, outbox.RelayOptions{Poll: time.Minute})
		defer stop()
		time.Sleep(5 * time.Minute) // until it polls once a minute
		_ = s.Append(t.Context(), outbox.Message{ID: "a", Topic: "t"})
		begin := time.Now()
		r.Wake()
		synctest.Wait()
		if len(p.Messages()) != 1 || time.Since(begin) != 0 {
			t.Errorf("%d messages %v after the wake-up, want 1 at once", len(p.Messages()), time.Since(begin))
		}
	})
}

func TestPollFindsWhatNobodyAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := outbox.NewMemoryStore(), &outboxtest.Recorder{}
		_, stop := start(t, s, p, outbox.RelayOptions{Poll: 40 * time.Millisecond})
		defer stop()
		time.Sleep(time.Second)
		_ = s.Append(t.Context(), outbox.Message{ID: "a", Topic: "t"})
		time.Sleep(41 * time.Millisecond)
		synctest.Wait()
		if len(p.Messages()) != 1 {
			t.Error("not delivered within the poll interval")
		}
	})
}

func TestDelayIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := outbox.NewMemoryStore(), &outboxtest.Recorder{}
		_, stop := start(t, s, p, outbox.RelayOptions{})
		defer stop()
		_ = s.Append(t.Context(), outbox.Message{ID: "a", Topic: "t", Delay: time.Hour})
		time.Sleep(time.Hour - time.Second)
		synctest.Wait()
		if n := len(p.Messages()); n != 0 {
			t.Fatalf("%d messages delivered before their delay was over", n)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := len(p.Messages()); n != 1 {
			t.Errorf("%d messages delivered after the delay, want 1", n)
		}
	})
}

// A failed message is tried again with growing waits, and then no more.
func TestAttemptsAreSpacedAndBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := outbox.NewMemoryStore()
		var attempts []time.Time
		p := &outboxtest.Recorder{Fail: func(m outbox.Message) error {
			if m.ID == "bad" {
				attempts = append(attempts, time.Now())
				return outbox.ErrRejected
			}
			return nil
		}}
		_, stop := start(t, s, p, outbox.RelayOptions{MaxAttempts: 6, RetryBase: time.Second, RetryMax: 8 * time.Second})
		_ = s.Append(t.Context(), outbox.Message{ID: "bad", Topic: "t", Key: "k"})
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		stop()
		if len(attempts) != 6 {
			t.Fatalf("%d attempts, want 6", len(attempts))
		}
		for i, at := range attempts[1:] {
			// A wait is at most its ceiling and one look for what is due.
			ceiling := min(time.Second<<i, 8*time.Second) + time.Second
			if d := at.Sub(attempts[i]); d > ceiling {
				t.Errorf("wait %d = %v, want at most %v", i, d, ceiling)
			}
		}
		dead, _ := s.DeadLetters(t.Context(), 10)
		if len(dead) != 1 || dead[0].Attempts != 6 {
			t.Errorf("dead letters %+v, want bad after 6 attempts", dead)
		}
	})
}

// A broker that is down for an hour costs no message an attempt.
func TestHourWithoutBroker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := outbox.NewMemoryStore(), &outboxtest.Recorder{}
		p.Down(errors.New("connection refused"))
		var charged atomic.Int32
		_, stop := start(t, s, p, outbox.RelayOptions{BatchSize: 10, Observer: outbox.Observer{
			Failed: func(context.Context, outbox.Record, error, bool) { charged.Add(1) },
		}})
		defer stop()
		for i := range 100 {
			_ = s.Append(t.Context(), outbox.Message{ID: fmt.Sprint(i), Topic: "t", Key: "k"})
		}
		time.Sleep(time.Hour)
		p.Down(nil)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		got := ids(p.Messages())
		if len(got) != 100 || charged.Load() != 0 {
			t.Fatalf("%d messages delivered and %d failures charged, want 100 and 0", len(got), charged.Load())
		}
		for i, id := range got {
			if id != fmt.Sprint(i) {
				t.Fatalf("message %d is %s: the order is lost", i, id)
			}
		}
	})
}

// stuck blocks until its context ends.
type stuck struct{ calls chan struct{} }

func (p stuck) Publish(ctx context.Context, _ []outbox.Message) error {
	p.calls <- struct{}{}
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestPublishIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := outbox.NewMemoryStore(), stuck{make(chan struct{}, 100)}
		_, stop := start(t, s, p, outbox.RelayOptions{PublishTimeout: 3 * time.Second})
		_ = s.Append(t.Context(), outbox.Message{Topic: "t"})
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(p.calls) < 10 {
			t.Errorf("%d calls in a minute, each bounded to 3 s", len(p.calls))
		}
		begin := time.Now()
		stop()
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("Run ended %v after its context, want at most the drain timeout", d)
		}
	})
}

// deaf is a store whose leases cannot be renewed.
type deaf struct {
	*outbox.MemoryStore
	off atomic.Bool
}

func (s *deaf) Lease(ctx context.Context, req outbox.LeaseRequest) (outbox.Grant, error) {
	if s.off.Load() && req.TTL > 0 {
		return outbox.Grant{}, errors.New("no connection")
	}
	return s.MemoryStore.Lease(ctx, req)
}

// A relay that cannot renew its lease stops publishing before it ends.
func TestNoPublishWithoutLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := &deaf{MemoryStore: outbox.NewMemoryStore()}, stuck{make(chan struct{}, 1000)}
		_, stop := start(t, s, p, outbox.RelayOptions{LeaseTTL: 10 * time.Second, PublishTimeout: time.Hour})
		defer stop()
		_ = s.Append(t.Context(), outbox.Message{Topic: "t"})
		<-p.calls
		s.off.Store(true)
		begin := time.Now()
		time.Sleep(11 * time.Second)
		synctest.Wait()
		g, _ := s.MemoryStore.Lease(t.Context(), outbox.LeaseRequest{Relay: "other", TTL: time.Minute})
		if len(g.Lanes) != outbox.Lanes {
			t.Fatalf("after %v another relay got %d lanes, want all", time.Since(begin), len(g.Lanes))
		}
		n := len(p.calls)
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := len(p.calls); got != n {
			t.Errorf("%d publishes without a lease", got-n)
		}
	})
}

func TestRunReportsMissingTables(t *testing.T) {
	err := outbox.NewRelay(unmigrated{outbox.NewMemoryStore()}, &outboxtest.Recorder{}, nil).Run(t.Context())
	if !errors.Is(err, outbox.ErrNotMigrated) {
		t.Errorf("Run = %v, want ErrNotMigrated", err)
	}
}

type unmigrated struct{ *outbox.MemoryStore }

func (unmigrated) Lease(context.Context, outbox.LeaseRequest) (outbox.Grant, error) {
	return outbox.Grant{}, fmt.Errorf("lease: %w", outbox.ErrNotMigrated)
}

func TestNewRelayNeedsItsParts(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("NewRelay without a store did not panic")
		}
	}()
	outbox.NewRelay(nil, &outboxtest.Recorder{}, nil)
}

func TestPublishError(t *testing.T) {
	cause := errors.New("cause")
	err := error(&outbox.PublishError{Errs: []error{nil, cause, nil}})
	if !errors.Is(err, cause) || err.Error() != "outbox: 1 of 3 messages failed, the first: cause" {
		t.Errorf("PublishError = %q", err)
	}
}

func TestObserverIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := outbox.NewMemoryStore(), &outboxtest.Recorder{}
		var delivered, lanes atomic.Int32
		_, stop := start(t, s, p, outbox.RelayOptions{Observer: outbox.Observer{
			Delivered: func(_ context.Context, recs []outbox.Record, _ time.Duration) { delivered.Add(int32(len(recs))) },
			Lanes:     func(held int) { lanes.Store(int32(held)) },
		}})
		defer stop()
		_ = s.Append(t.Context(), outbox.Message{Topic: "t"}, outbox.Message{Topic: "t"})
		time.Sleep(time.Second)
		synctest.Wait()
		if delivered.Load() != 2 || lanes.Load() != outbox.Lanes {
			t.Errorf("told of %d deliveries and %d lanes, want 2 and %d", delivered.Load(), lanes.Load(), outbox.Lanes)
		}
	})
}

func FuzzPrepare(f *testing.F) {
	f.Add("", "topic", "key", "h", "v")
	f.Add("id", "t", "\x00", "\xff", "")
	f.Fuzz(func(t *testing.T, id, topic, key, name, value string) {
		m, lane, err := outbox.Prepare(outbox.Message{ID: id, Topic: topic, Key: key, Headers: map[string]string{name: value}})
		if err != nil {
			if !errors.Is(err, outbox.ErrInvalid) {
				t.Fatalf("error %v does not wrap ErrInvalid", err)
			}
			return
		}
		again, sameLane, err := outbox.Prepare(m)
		if err != nil || again.ID != m.ID || sameLane != lane || lane < 0 || lane >= outbox.Lanes || m.ID == "" {
			t.Fatalf("Prepare is not stable: %q in lane %d, then %q in lane %d (%v)", m.ID, lane, again.ID, sameLane, err)
		}
	})
}

// The rule that other languages follow, with values worked out elsewhere.
func TestLaneRule(t *testing.T) {
	for key, want := range map[string]int{
		"a":       7,  // SHA-256 ca97...
		"order-1": 15, // 0baf...
		"é":       9,  // 4a99..., of its UTF-8
	} {
		if _, lane, _ := outbox.Prepare(outbox.Message{Topic: "t", Key: key}); lane != want {
			t.Errorf("lane of %q = %d, want %d", key, lane, want)
		}
	}
}
