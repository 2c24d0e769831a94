package outboxtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/outbox"
)

// TestRelay checks a store under relays, with concurrent writers.
func TestRelay(t *testing.T, open func(t *testing.T) Backend) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Backend)
	}{
		{"OrderUnderConcurrentCommits", testOrder},
		{"RelaysShareAndTakeOver", testRelays},
		{"PoisonBlocksItsKeyOnly", testPoison},
		{"PoisonHeals", testHeals},
		{"PoisonWithoutKey", testPoisonNoKey},
		{"BrokerOutageCountsNoAttempts", testOutage},
		{"WriteThroughOutage", testBacklog},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

var quick = outbox.RelayOptions{
	BatchSize: 64, LeaseTTL: 2 * time.Second, RetryBase: time.Millisecond, RetryMax: 20 * time.Millisecond, MaxAttempts: 3,
}

// A writerLog is the order in which each key's messages were appended by
// transactions that committed, as the writers saw it.
type writerLog struct {
	mu    sync.Mutex
	locks [8]sync.Mutex // one for each key: what a row lock would be
	want  map[string][]string
	n     int
}

// write runs n transactions of up to three messages each. A transaction locks
// its keys in turn, appends, and keeps the locks until it ends, as one does that
// updates the rows its messages tell of; some are rolled back and some are slow.
func (w *writerLog) write(t *testing.T, b Backend, n int) {
	for range n {
		var keys []int
		for range 1 + rand.IntN(3) {
			if k := rand.IntN(len(w.locks)); !slices.Contains(keys, k) {
				keys = append(keys, k)
			}
		}
		slices.Sort(keys) // no deadlocks
		tx, err := b.Begin(t.Context())
		if err != nil {
			t.Error(err)
			return
		}
		var ids []string
		for _, k := range keys {
			w.locks[k].Lock()
			w.mu.Lock()
			w.n++
			id := fmt.Sprintf("k%d-%d", k, w.n)
			w.mu.Unlock()
			if err := tx.Append(t.Context(), msg(id, fmt.Sprint("k", k))); err != nil {
				t.Error(err)
			}
			ids = append(ids, id)
		}
		if rand.IntN(10) == 0 {
			time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
		}
		if rand.IntN(5) == 0 {
			err, ids = tx.Rollback(t.Context()), nil
		} else {
			err = tx.Commit(t.Context())
		}
		if err != nil {
			t.Error(err)
		}
		w.mu.Lock()
		for _, id := range ids {
			key, _, _ := strings.Cut(id, "-")
			w.want[key] = append(w.want[key], id)
		}
		w.mu.Unlock()
		for _, k := range keys {
			w.locks[k].Unlock()
		}
	}
}

func (w *writerLog) count() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, ids := range w.want {
		n += len(ids)
	}
	return n
}

// run runs writers side by side.
func (w *writerLog) run(t *testing.T, b Backend, writers, each int) {
	w.want = make(map[string][]string)
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() { w.write(t, b, each) })
	}
	wg.Wait()
}

// check compares the first deliveries with what was committed.
func (w *writerLog) check(t *testing.T, r *Recorder) {
	t.Helper()
	firsts := r.Firsts()
	for key, want := range w.want {
		if got := firsts[key]; !slices.Equal(got, want) {
			t.Errorf("key %s: delivered %d of %d, first difference at %d", key, len(got), len(want), firstDifference(got, want))
		}
	}
}

func firstDifference(a, b []string) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

func delivered(r *Recorder) (n int) {
	for _, ids := range r.Firsts() {
		n += len(ids)
	}
	return n
}

func testOrder(t *testing.T, b Backend) {
	var r Recorder
	var w writerLog
	run(t, b.Store(), &r, &quick)
	w.run(t, b, 8, 100)
	wait(t, "all messages", func() bool { return delivered(&r) >= w.count() })
	w.check(t, &r)
	if n := len(r.Messages()); n != w.count() {
		t.Errorf("%d deliveries of %d messages without any failure", n, w.count())
	}
}

// Three relays share the lanes; they come and go while messages are written.
func testRelays(t *testing.T, b Backend) {
	var r Recorder
	var w writerLog
	stops := []func(){run(t, b.Store(), &r, &quick), run(t, b.Store(), &r, &quick)}
	done := make(chan struct{})
	go func() { defer close(done); w.run(t, b, 4, 150) }()
	for i := range 6 {
		stops = append(stops, run(t, b.Store(), &r, &quick))
		time.Sleep(30 * time.Millisecond)
		stops[i]()
	}
	<-done
	wait(t, "all messages", func() bool { return delivered(&r) >= w.count() })
	w.check(t, &r)
}

func testPoison(t *testing.T, b Backend) {
	r := Recorder{Fail: func(m outbox.Message) error {
		if m.ID == "bad" {
			return errors.New("poison")
		}
		return nil
	}}
	run(t, b.Store(), &r, &quick)
	b.append(t, msg("a1", "a"), msg("bad", "a"), msg("a2", "a"), msg("b1", "b"), msg("a3", "a"))
	b.append(t, msg("b2", "b"))
	b.append(t, msg("a4", "a"))
	wait(t, "the other messages", func() bool { return delivered(&r) == 6 })
	firsts := r.Firsts()
	if want := []string{"a1", "a2", "a3", "a4"}; !slices.Equal(firsts["a"], want) {
		t.Errorf("key of the poison: delivered %v, want %v", firsts["a"], want)
	}
	if want := []string{"b1", "b2"}; !slices.Equal(firsts["b"], want) {
		t.Errorf("other key: delivered %v, want %v", firsts["b"], want)
	}
	var dead []outbox.DeadLetter
	wait(t, "the dead letter", func() bool {
		var err error
		dead, err = b.DeadLetters(t.Context(), 10)
		must(t, err)
		return len(dead) == 1
	})
	if d := dead[0]; d.ID != "bad" || d.Attempts != quick.MaxAttempts || !strings.Contains(d.Err, "poison") {
		t.Errorf("dead letter = %+v, want bad after %d attempts", d, quick.MaxAttempts)
	}
	b.append(t, msg("a5", "a"))
	wait(t, "the key to go on", func() bool { return delivered(&r) == 7 })
}

// A message that fails a few times is delivered before those behind it.
func testHeals(t *testing.T, b Backend) {
	var mu sync.Mutex
	failures := 0
	r := Recorder{Fail: func(m outbox.Message) error {
		mu.Lock()
		defer mu.Unlock()
		if m.ID == "2" && failures < 2 {
			failures++
			return fmt.Errorf("%w: not now", outbox.ErrRejected)
		}
		return nil
	}}
	b.append(t, msg("1", "k"), msg("2", "k"), msg("3", "k"))
	run(t, b.Store(), &r, &quick)
	b.append(t, msg("4", "k"))
	wait(t, "all messages", func() bool { return delivered(&r) == 4 })
	if got, want := r.Firsts()["k"], []string{"1", "2", "3", "4"}; !slices.Equal(got, want) {
		t.Errorf("delivered %v, want %v", got, want)
	}
	wait(t, "nothing to be parked", func() bool {
		s, err := b.Sample(t.Context())
		must(t, err)
		return s.Parked == 0 && s.Pending == 0
	})
}

func testPoisonNoKey(t *testing.T, b Backend) {
	r := Recorder{Fail: func(m outbox.Message) error {
		if strings.HasPrefix(m.ID, "bad") {
			return fmt.Errorf("%w: poison", outbox.ErrRejected)
		}
		return nil
	}}
	run(t, b.Store(), &r, &quick)
	for i := range 20 {
		b.append(t, msg(fmt.Sprint("bad", i), ""), msg(fmt.Sprint("good", i), ""))
	}
	wait(t, "20 delivered and 20 dead", func() bool {
		dead, err := b.DeadLetters(t.Context(), 100)
		must(t, err)
		return delivered(&r) == 20 && len(dead) == 20
	})
}

func testOutage(t *testing.T, b Backend) {
	var r Recorder
	r.Down(errors.New("broker is down"))
	var mu sync.Mutex
	outages, failed := 0, 0
	opts := quick
	opts.Observer = outbox.Observer{
		Outage: func(context.Context, []outbox.Record, error) { mu.Lock(); outages++; mu.Unlock() },
		Failed: func(context.Context, outbox.Record, error, bool) { mu.Lock(); failed++; mu.Unlock() },
	}
	run(t, b.Store(), &r, &opts)
	b.append(t, msg("1", "k"), msg("2", "k"), msg("x", "k2"))
	wait(t, "more failures than a message may have", func() bool { mu.Lock(); defer mu.Unlock(); return outages > 2*quick.MaxAttempts })
	r.Down(nil)
	wait(t, "all messages", func() bool { return delivered(&r) == 3 })
	if got, want := r.Firsts()["k"], []string{"1", "2"}; !slices.Equal(got, want) {
		t.Errorf("delivered %v, want %v", got, want)
	}
	mu.Lock()
	defer mu.Unlock()
	if failed != 0 {
		t.Errorf("%d failures were charged to messages while the broker was down", failed)
	}
}

// Messages written while nothing could be delivered come out in order.
func testBacklog(t *testing.T, b Backend) {
	var r Recorder
	var w writerLog
	r.Down(errors.New("broker is down"))
	stop := run(t, b.Store(), &r, &quick)
	w.run(t, b, 4, 200)
	stop() // while it fails
	r.Down(nil)
	run(t, b.Store(), &r, &quick)
	wait(t, "all messages", func() bool { return delivered(&r) >= w.count() })
	w.check(t, &r)
}
