package outboxtest

import (
	"fmt"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/outbox"
)

// takeOver makes relay "new" the owner of all lanes that "old" held.
func takeOver(t *testing.T, s outbox.Store) map[int]outbox.Lane {
	t.Helper()
	_, err := s.Lease(t.Context(), outbox.LeaseRequest{Relay: "old"})
	must(t, err)
	return hold(t, s, "new")
}

func testFence(t *testing.T, b Backend) {
	b.append(t, msg("a", "k"), msg("b", "k"))
	s, other := b.Store(), b.Store()
	old := hold(t, s, "old")
	recs := fetch(t, s, all(old, false))
	a := recs[0]
	now := takeOver(t, other)
	if now[a.Lane].Epoch <= old[a.Lane].Epoch {
		t.Fatalf("epoch %d after %d, want it to rise", now[a.Lane].Epoch, old[a.Lane].Epoch)
	}
	settle(t, other, outbox.Settlement{Advance: []outbox.Lane{{Number: a.Lane, Epoch: now[a.Lane].Epoch, Cursor: recs[1].Seq}}})
	// The zombie wakes and records what it knows: less than the new owner.
	lost := settle(t, s, outbox.Settlement{Advance: []outbox.Lane{{Number: a.Lane, Epoch: old[a.Lane].Epoch, Cursor: a.Seq}}})
	if len(lost) != 1 || lost[0] != a.Lane {
		t.Errorf("Settle with a stale epoch lost %v, want [%d]", lost, a.Lane)
	}
	if got := hold(t, other, "new")[a.Lane].Cursor; got != recs[1].Seq {
		t.Errorf("a stale epoch moved the cursor to %d, want %d", got, recs[1].Seq)
	}
}

func testFenceOutcomes(t *testing.T, b Backend) {
	b.append(t, msg("a", "k"), msg("b", "k2"))
	s, other := b.Store(), b.Store()
	old := hold(t, s, "old")
	var park, dead []outbox.Failure
	var stale []outbox.Lane
	for _, r := range fetch(t, s, all(old, false)) {
		r.Attempts = 1
		if r.ID == "a" {
			park = append(park, outbox.Failure{Record: r, Err: "e"})
		} else {
			dead = append(dead, outbox.Failure{Record: r, Err: "e"})
		}
		stale = append(stale, outbox.Lane{Number: r.Lane, Epoch: old[r.Lane].Epoch, Cursor: r.Seq})
	}
	now := takeOver(t, other)
	if lost := settle(t, s, outbox.Settlement{Advance: stale, Park: park, Dead: dead}); len(lost) != len(stale) {
		t.Errorf("stale outcomes: lost %v, want all %d lanes", lost, len(stale))
	}
	sample, err := b.Sample(t.Context())
	must(t, err)
	if sample.Parked != 0 || sample.Dead != 0 {
		t.Errorf("a stale epoch parked %d and buried %d records", sample.Parked, sample.Dead)
	}
	if n := len(fetch(t, other, all(now, true))); n != 2 {
		t.Errorf("the new owner fetched %d records, want 2", n)
	}
}

func testLease(t *testing.T, b Backend) {
	s, other := b.Store(), b.Store()
	if got := len(hold(t, s, "old")); got != outbox.Lanes {
		t.Fatalf("the only relay holds %d lanes, want %d", got, outbox.Lanes)
	}
	if got := len(hold(t, other, "new")); got != 0 {
		t.Fatalf("a second relay took %d lanes that are held", got)
	}
	// A lease that has ended is taken over, whether its owner is gone or not.
	short := 50 * time.Millisecond
	_, err := s.Lease(t.Context(), outbox.LeaseRequest{Relay: "old", TTL: short})
	must(t, err)
	wait(t, "the lanes of a dead relay", func() bool { return len(hold(t, other, "new")) == outbox.Lanes })
}

func testShare(t *testing.T, b Backend) {
	s, other := b.Store(), b.Store()
	held := hold(t, s, "old")
	hold(t, other, "new")
	g, err := s.Lease(t.Context(), outbox.LeaseRequest{Relay: "old", TTL: ttl})
	must(t, err)
	if g.Share != outbox.Lanes/2 {
		t.Fatalf("share with two relays = %d, want %d", g.Share, outbox.Lanes/2)
	}
	var surplus []int
	for n := range held {
		if len(surplus) < outbox.Lanes/2 {
			surplus = append(surplus, n)
		}
	}
	g, err = s.Lease(t.Context(), outbox.LeaseRequest{Relay: "old", TTL: ttl, Release: surplus})
	must(t, err)
	if len(g.Lanes) != outbox.Lanes/2 {
		t.Errorf("after giving up half: %d lanes, want %d", len(g.Lanes), outbox.Lanes/2)
	}
	if got := len(hold(t, other, "new")); got != outbox.Lanes/2 {
		t.Errorf("the second relay holds %d lanes, want %d", got, outbox.Lanes/2)
	}
}

func advance(lanes map[int]outbox.Lane, recs []outbox.Record) (out []outbox.Lane) {
	last := make(map[int]int64)
	for _, r := range recs {
		if !r.Parked {
			last[r.Lane] = r.Seq
		} else if last[r.Lane] == 0 {
			last[r.Lane] = lanes[r.Lane].Cursor
		}
	}
	for n, seq := range last {
		l := lanes[n]
		l.Cursor = seq
		lanes[n] = l
		out = append(out, outbox.Lane{Number: n, Epoch: l.Epoch, Cursor: seq})
	}
	return out
}

func testParked(t *testing.T, b Backend) {
	s := b.Store()
	lanes := hold(t, s, "r")
	b.append(t, msg("1", "k"), msg("2", "k"), msg("3", "k"))
	recs := fetch(t, s, all(lanes, false))
	st := outbox.Settlement{Advance: advance(lanes, recs)}
	recs[0].Attempts = 1
	st.Park = []outbox.Failure{{Record: recs[0], Err: "e1", RetryIn: time.Hour}, {Record: recs[1]}, {Record: recs[2]}}
	settle(t, s, st)
	wantIDs(t, "parked for an hour", fetch(t, s, all(lanes, true)))

	lane := hold(t, b.Store(), "r")[recs[0].Lane]
	if lane.Parked["k"] != recs[2].Seq {
		t.Fatalf("lease tells parked %v, want k up to %d", lane.Parked, recs[2].Seq)
	}
	// Due now: the head alone, because it has failed itself.
	recs[0].Attempts = 2
	settle(t, s, outbox.Settlement{Advance: advance(lanes, recs), Park: []outbox.Failure{{Record: recs[0], Err: "e2"}}})
	due := fetch(t, s, all(lanes, true))
	wantIDs(t, "due", due, "1")
	if !due[0].Parked || due[0].Attempts != 2 || string(due[0].Payload) != "1" {
		t.Errorf("due record = %+v, want it parked with 2 attempts and its payload", due[0])
	}
	wantIDs(t, "without Retry", fetch(t, s, all(lanes, false)))
	// Once it is delivered, those behind it follow in their order.
	settle(t, s, outbox.Settlement{Advance: advance(lanes, due), Delivered: due})
	due = fetch(t, s, all(lanes, true))
	wantIDs(t, "behind it", due, "2", "3")
	settle(t, s, outbox.Settlement{Advance: advance(lanes, due), Delivered: due})
	wantIDs(t, "in the end", fetch(t, s, all(lanes, true)))
}

// A crash between parking and moving the cursor makes a relay park again.
func testParkTwice(t *testing.T, b Backend) {
	s := b.Store()
	lanes := hold(t, s, "r")
	b.append(t, msg("1", "k"))
	recs := fetch(t, s, all(lanes, false))
	st := outbox.Settlement{Advance: advance(lanes, recs)}
	failed, behind := recs[0], recs[0]
	failed.Attempts = 3
	st.Park = []outbox.Failure{{Record: failed, Err: "e"}}
	settle(t, s, st)
	st.Park = []outbox.Failure{{Record: behind}}
	settle(t, s, st)
	due := fetch(t, s, all(lanes, true))
	wantIDs(t, "parked twice", due, "1")
	if due[0].Attempts != 3 {
		t.Errorf("attempts = %d after parking anew, want 3", due[0].Attempts)
	}
}

func testDead(t *testing.T, b Backend) {
	s := b.Store()
	lanes := hold(t, s, "r")
	var msgs []outbox.Message
	for i := range 3 {
		m := msg(fmt.Sprint(i), "k")
		m.Headers = map[string]string{"h": fmt.Sprint(i)}
		msgs = append(msgs, m)
	}
	b.append(t, msgs...)
	recs := fetch(t, s, all(lanes, false))
	st := outbox.Settlement{Advance: advance(lanes, recs)}
	for _, r := range recs {
		r.Attempts = 5
		st.Dead = append(st.Dead, outbox.Failure{Record: r, Err: "poison " + r.ID})
	}
	settle(t, s, st)
	dead, err := b.DeadLetters(t.Context(), 10)
	must(t, err)
	if len(dead) != 3 {
		t.Fatalf("%d dead letters, want 3", len(dead))
	}
	for i, d := range dead {
		if d.ID != fmt.Sprint(i) || d.Err != "poison "+d.ID || d.Attempts != 5 || d.Headers["h"] != d.ID || d.FailedAt.IsZero() {
			t.Errorf("dead letter %d = %+v", i, d)
		}
	}
	n, err := b.Replay(t.Context(), "1", "no such message")
	must(t, err)
	if n != 1 {
		t.Errorf("Replay of one = %d", n)
	}
	got := fetch(t, s, all(lanes, false))
	wantIDs(t, "replayed", got, "1")
	if got[0].Attempts != 0 || got[0].Headers["h"] != "1" || string(got[0].Payload) != "1" {
		t.Errorf("replayed record = %+v", got[0])
	}
	if dead, err = b.DeadLetters(t.Context(), 10); err != nil || len(dead) != 2 {
		t.Errorf("after the replay: %d dead letters (%v), want 2", len(dead), err)
	}
}

func testDelay(t *testing.T, b Backend) {
	s := b.Store()
	lanes := hold(t, s, "r")
	late, never := msg("late", "k"), msg("never", "k")
	late.Delay, never.Delay = 50*time.Millisecond, time.Hour
	b.append(t, late, never, msg("now", "k"))
	must(t, s.Maintain(t.Context()))
	recs := fetch(t, s, all(lanes, false))
	if len(recs) != 1 || recs[0].ID != "now" {
		// The 50 ms may have passed on a slow machine, but never the order.
		wantIDs(t, "at first", recs, "now", "late")
	}
	wait(t, "the delayed message", func() bool {
		must(t, s.Maintain(t.Context()))
		return len(fetch(t, s, all(lanes, false))) == 2
	})
	recs = fetch(t, s, all(lanes, false))
	wantIDs(t, "later", recs, "now", "late")
	if recs[1].Delay != 0 {
		t.Errorf("a delivered message still says Delay %v", recs[1].Delay)
	}
}
