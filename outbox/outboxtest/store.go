package outboxtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/outbox"
)

const ttl = time.Minute

// TestStore checks a store. open returns a fresh, empty one for each subtest.
func TestStore(t *testing.T, open func(t *testing.T) Backend) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Backend)
	}{
		{"Content", testContent},
		{"RollbackDeliversNothing", testRollback},
		{"OpenTransactionHoldsItsLane", testOpenTransaction},
		{"RolledBackGapIsPassed", testGap},
		{"ManyGaps", testManyGaps},
		{"FetchLimit", testLimit},
		{"Fence", testFence},
		{"FenceHoldsForOutcomes", testFenceOutcomes},
		{"LeaseExcludesOthers", testLease},
		{"LeaseShares", testShare},
		{"ParkedAreRetriedInOrder", testParked},
		{"ParkingTwiceIsOnce", testParkTwice},
		{"DeadLettersAndReplay", testDead},
		{"Delay", testDelay},
		{"Sample", testSample},
		{"InvalidMessages", testInvalid},
		{"CancelledContext", testCancelled},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

// hold takes all lanes for a relay and returns them by number.
func hold(t *testing.T, s outbox.Store, relay string) map[int]outbox.Lane {
	t.Helper()
	g, err := s.Lease(t.Context(), outbox.LeaseRequest{Relay: relay, TTL: ttl})
	must(t, err)
	lanes := make(map[int]outbox.Lane)
	for _, l := range g.Lanes {
		lanes[l.Number] = l
	}
	return lanes
}

func all(lanes map[int]outbox.Lane, retry bool) []outbox.Position {
	var from []outbox.Position
	for _, n := range slices.Sorted(maps.Keys(lanes)) {
		from = append(from, outbox.Position{Lane: n, After: lanes[n].Cursor, Retry: retry})
	}
	return from
}

func fetch(t *testing.T, s outbox.Store, from []outbox.Position) []outbox.Record {
	t.Helper()
	recs, err := s.Fetch(t.Context(), from, 1000)
	must(t, err)
	return recs
}

func idsOf(recs []outbox.Record) []string {
	var ids []string
	for _, r := range recs {
		ids = append(ids, r.ID)
	}
	return ids
}

func wantIDs(t *testing.T, what string, recs []outbox.Record, want ...string) {
	t.Helper()
	if got := idsOf(recs); !slices.Equal(got, want) {
		t.Fatalf("%s: got %v, want %v", what, got, want)
	}
}

func settle(t *testing.T, s outbox.Store, st outbox.Settlement) []int {
	t.Helper()
	lost, err := s.Settle(t.Context(), st)
	must(t, err)
	return lost
}

func testContent(t *testing.T, b Backend) {
	want := []outbox.Message{
		{ID: "a", Topic: "t1", Key: "k", Payload: []byte{0, 1, 2, 255}, Headers: map[string]string{"h": "v", "é": "\"'\\"}},
		{ID: "b", Topic: "t2", Key: "k", Payload: []byte{}},
		{ID: "c", Topic: "t1", Key: "k", Payload: bytes.Repeat([]byte("x"), 1<<20)},
		{Topic: "t1", Key: "k"},
	}
	b.append(t, want...)
	s := b.Store()
	recs := fetch(t, s, all(hold(t, s, "r"), false))
	if len(recs) != len(want) {
		t.Fatalf("fetched %d records, want %d", len(recs), len(want))
	}
	for i, r := range recs {
		w := want[i]
		if w.ID != "" && r.ID != w.ID || r.ID == "" || r.Topic != w.Topic || r.Key != w.Key ||
			!bytes.Equal(r.Payload, w.Payload) || !maps.Equal(r.Headers, w.Headers) {
			t.Errorf("record %d = %.200q, want %.200q", i, fmt.Sprint(r), fmt.Sprint(w))
		}
		if _, lane, _ := outbox.Prepare(r.Message); r.Lane != lane || r.CreatedAt.IsZero() || r.Parked || r.Attempts != 0 {
			t.Errorf("record %d: lane %d (want %d), created %v, parked %v, attempts %d", i, r.Lane, lane, r.CreatedAt, r.Parked, r.Attempts)
		}
	}
}

func testRollback(t *testing.T, b Backend) {
	tx := b.begin(t)
	must(t, tx.Append(t.Context(), msg("a", "k"), outbox.Message{ID: "later", Topic: "t", Key: "k", Delay: time.Millisecond}))
	must(t, tx.Rollback(t.Context()))
	s := b.Store()
	time.Sleep(2 * time.Millisecond)
	must(t, s.Maintain(t.Context()))
	wantIDs(t, "after a rollback", fetch(t, s, all(hold(t, s, "r"), false)))
}

// A later message must not overtake one of an open transaction.
func testOpenTransaction(t *testing.T, b Backend) {
	s := b.Store()
	from := all(hold(t, s, "r"), false)
	slow := b.begin(t)
	must(t, slow.Append(t.Context(), msg("1", "k")))
	b.append(t, msg("2", "k"))
	for range 3 {
		wantIDs(t, "while an earlier transaction is open", fetch(t, s, from))
	}
	b.append(t, msg("3", "k"))
	wantIDs(t, "while an earlier transaction is open", fetch(t, s, from))
	must(t, slow.Commit(t.Context()))
	var got []outbox.Record
	wait(t, "the records", func() bool { got = fetch(t, s, from); return len(got) == 3 })
	wantIDs(t, "after its commit", got, "1", "2", "3")
}

func testGap(t *testing.T, b Backend) {
	s := b.Store()
	from := all(hold(t, s, "r"), false)
	tx := b.begin(t)
	must(t, tx.Append(t.Context(), msg("1", "k")))
	b.append(t, msg("2", "k"))
	wantIDs(t, "before the rollback", fetch(t, s, from))
	must(t, tx.Rollback(t.Context()))
	var got []outbox.Record
	wait(t, "the record behind the gap", func() bool { got = fetch(t, s, from); return len(got) > 0 })
	wantIDs(t, "after the rollback", got, "2")
}

// Gaps that open and close at different times must neither lose nor reorder.
func testManyGaps(t *testing.T, b Backend) {
	s := b.Store()
	lanes := hold(t, s, "r")
	var open []Tx
	var want, got []string
	for i := range 40 {
		tx := b.begin(t)
		must(t, tx.Append(t.Context(), msg(fmt.Sprint(i), "k")))
		if i%3 != 2 {
			want = append(want, fmt.Sprint(i))
		}
		open = append(open, tx)
	}
	read := func() {
		for _, r := range fetch(t, s, all(lanes, false)) {
			got = append(got, r.ID)
			l := lanes[r.Lane]
			l.Cursor = r.Seq
			lanes[r.Lane] = l
		}
		if len(got) > len(want) || !slices.Equal(got, want[:len(got)]) {
			t.Fatalf("delivered %v, want a prefix of %v", got, want)
		}
	}
	for i := range open {
		j := (i*7 + 3) % 40 // commits in another order than appends
		if j%3 == 2 {
			must(t, open[j].Rollback(t.Context()))
		} else {
			must(t, open[j].Commit(t.Context()))
		}
		read()
	}
	wait(t, "the rest", func() bool { read(); return len(got) == len(want) })
}

func testLimit(t *testing.T, b Backend) {
	var msgs []outbox.Message
	for i := range 500 {
		msgs = append(msgs, msg(fmt.Sprint(i), fmt.Sprint("k", i%50)))
	}
	b.append(t, msgs...)
	s := b.Store()
	lanes := hold(t, s, "r")
	seen := make(map[string]int)
	for len(seen) < 500 {
		recs, err := s.Fetch(t.Context(), all(lanes, false), 32)
		must(t, err)
		if len(recs) == 0 || len(recs) > 32 {
			t.Fatalf("Fetch with limit 32 returned %d records, %d of 500 seen", len(recs), len(seen))
		}
		for _, r := range recs {
			l := lanes[r.Lane]
			if r.Seq <= l.Cursor {
				t.Fatalf("lane %d: %d after %d", r.Lane, r.Seq, l.Cursor)
			}
			l.Cursor = r.Seq
			lanes[r.Lane] = l
			if seen[r.ID]++; seen[r.ID] > 1 {
				t.Fatalf("record %s twice", r.ID)
			}
		}
	}
}

func testSample(t *testing.T, b Backend) {
	s, err := b.Sample(t.Context())
	must(t, err)
	if s != (outbox.Sample{}) {
		t.Errorf("Sample of an empty outbox = %+v", s)
	}
	b.append(t, msg("a", "k"), msg("b", "k"), outbox.Message{Topic: "t", Delay: time.Hour})
	time.Sleep(2 * time.Millisecond)
	s, err = b.Sample(t.Context())
	must(t, err)
	if s.Pending != 2 || s.Delayed != 1 || s.OldestAge <= 0 {
		t.Errorf("Sample = %+v, want 2 pending of some age and 1 delayed", s)
	}
}

func testInvalid(t *testing.T, b Backend) {
	for name, m := range map[string]outbox.Message{
		"no topic":       {Key: "k"},
		"negative delay": {Topic: "t", Delay: -1},
		"NUL in key":     {Topic: "t", Key: "a\x00b"},
		"broken UTF-8":   {Topic: "t", Key: "\xff"},
		"long id":        {Topic: "t", ID: string(make([]byte, 256))},
		"long key":       {Topic: "t", Key: string(bytes.Repeat([]byte("k"), 1025))},
		"header":         {Topic: "t", Headers: map[string]string{"h": "\xff"}},
	} {
		tx := b.begin(t)
		if err := tx.Append(t.Context(), msg("ok", "k"), m); !errors.Is(err, outbox.ErrInvalid) {
			t.Errorf("%s: Append = %v, want ErrInvalid", name, err)
		}
		must(t, tx.Rollback(t.Context()))
	}
}

func testCancelled(t *testing.T, b Backend) {
	b.append(t, msg("a", "k"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := b.Store()
	lanes := hold(t, s, "r")
	if _, err := s.Fetch(ctx, all(lanes, false), 10); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("Fetch = %v, want context.Canceled", err)
	}
	wantIDs(t, "after a cancelled fetch", fetch(t, s, all(lanes, false)), "a")
}
