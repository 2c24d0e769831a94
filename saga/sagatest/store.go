package sagatest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/saga"
)

const (
	r1  = "00000000-0000-7000-8000-000000000001"
	r2  = "00000000-0000-7000-8000-000000000002"
	ttl = time.Minute
)

var both = map[string]int{"a": 1, "b": 1}

func lease(t *testing.T, s saga.Store, runner string, limit int) saga.Grant {
	t.Helper()
	g, err := s.Lease(t.Context(), saga.LeaseRequest{Runner: runner, TTL: ttl, Beat: true, Sagas: both, Limit: limit})
	must(t, err)
	return g
}

func create(t *testing.T, s saga.Store, ins ...saga.Instance) {
	t.Helper()
	existing, err := s.Create(t.Context(), ins)
	must(t, err)
	for i, name := range existing {
		if name != "" {
			t.Fatalf("%s exists as %q", ins[i].ID, name)
		}
	}
}

func instance(id string) saga.Instance {
	return saga.Instance{ID: id, Saga: "a", Version: 1, Status: saga.Running, State: []byte(`{}`)}
}

func checkpoint(id string) saga.Checkpoint {
	return saga.Checkpoint{ID: id, Version: 1, Status: saga.Running, State: []byte(`{}`)}
}

func save(t *testing.T, s saga.Store, runner string, cs ...saga.Checkpoint) []saga.Ack {
	t.Helper()
	acks, err := s.Save(t.Context(), runner, cs)
	must(t, err)
	return acks
}

func ids(ins []saga.Instance) (out []string) {
	for _, in := range ins {
		out = append(out, in.ID)
	}
	return out
}

func testContent(t *testing.T, s saga.Store) {
	lease(t, s, r1, 0)
	in := instance("idé-\"1\"")
	in.Owner, in.State = r1, bytes.Repeat([]byte{0, 1, 255, '\''}, 1<<18) // 1 MiB
	create(t, s, in)
	begun := time.Now().Add(-time.Hour).Truncate(time.Microsecond)
	steps := []saga.StepRecord{
		{Name: "x", Outcome: saga.OK, Attempts: 3, Error: "was \"bad\" \u2028 \\u0000", BegunAt: begun, EndedAt: begun},
		{Name: "y", Pivot: true, Outcome: saga.Begun, Undo: &saga.Undo{Outcome: saga.Unknown, Attempts: 2, NotBefore: begun}},
	}
	b, err := json.Marshal(steps)
	must(t, err)
	c := checkpoint(in.ID)
	c.Version, c.Status, c.State, c.Steps, c.Cause = 7, saga.Compensating, []byte{}, steps, "cause é"
	if a := save(t, s, r1, c); !a[0].Held {
		t.Fatal("not held")
	}
	got, err := s.Get(t.Context(), in.ID)
	must(t, err)
	if got.Saga != "a" || got.Version != 7 || got.Status != saga.Compensating || len(got.State) != 0 || got.Cause != c.Cause || got.Owner != r1 || got.StartedAt.IsZero() {
		t.Errorf("got %+v", got)
	}
	if b2, _ := json.Marshal(got.Steps); !bytes.Equal(normal(t, b2), normal(t, b)) {
		t.Errorf("steps %s, want %s", b2, b)
	}
	if _, err := s.Get(t.Context(), "none"); !errors.Is(err, saga.ErrNotFound) {
		t.Errorf("Get of none: %v", err)
	}
}

// normal makes times comparable.
func normal(t *testing.T, b []byte) []byte {
	var steps []saga.StepRecord
	must(t, json.Unmarshal(b, &steps))
	for i := range steps {
		steps[i].BegunAt, steps[i].EndedAt = steps[i].BegunAt.UTC(), steps[i].EndedAt.UTC()
		if u := steps[i].Undo; u != nil {
			u.NotBefore = u.NotBefore.UTC()
		}
	}
	b, err := json.Marshal(steps)
	must(t, err)
	return b
}

func testCreateOnce(t *testing.T, s saga.Store) {
	create(t, s, instance("1"))
	other := instance("1")
	other.Saga = "b"
	existing, err := s.Create(t.Context(), []saga.Instance{other, instance("2"), instance("1")})
	must(t, err)
	if fmt.Sprint(existing) != "[a  a]" {
		t.Errorf("existing %q", existing)
	}
	if in, err := s.Get(t.Context(), "1"); err != nil || in.Saga != "a" {
		t.Errorf("%+v, %v", in, err)
	}
	// In the name of a runner that has no lease, it is nobody's.
	orphan := instance("3")
	orphan.Owner = r2
	create(t, s, orphan)
	if g := lease(t, s, r1, 10); len(g.Taken) != 3 {
		t.Errorf("took %v", ids(g.Taken))
	}
}

func testOneOfManyCreates(t *testing.T, s saga.Store) {
	var mu sync.Mutex
	created := make(map[string]int)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 20 {
				id := fmt.Sprint(i)
				existing, err := s.Create(t.Context(), []saga.Instance{instance(id)})
				if err != nil {
					t.Error(err)
					return
				}
				if existing[0] == "" {
					mu.Lock()
					created[id]++
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	for i := range 20 {
		if n := created[fmt.Sprint(i)]; n != 1 {
			t.Errorf("saga %d was created %d times", i, n)
		}
	}
}

func testTakesWhatIsDue(t *testing.T, s saga.Store) {
	for i := range 5 {
		create(t, s, instance(fmt.Sprint(i)))
	}
	g := lease(t, s, r1, 3)
	if len(g.Taken) != 3 || g.Now.IsZero() {
		t.Fatalf("took %v of 5 with limit 3, now %v", ids(g.Taken), g.Now)
	}
	for _, in := range g.Taken {
		if in.Owner != r1 || in.Deaths != 0 || in.Saga != "a" || string(in.State) != "{}" {
			t.Errorf("took %+v", in)
		}
	}
	if more := lease(t, s, r2, 10); len(more.Taken) != 2 {
		t.Errorf("another took %v, want the other two", ids(more.Taken))
	}
	if again := lease(t, s, r1, 10); len(again.Taken) != 0 {
		t.Errorf("took %v again", ids(again.Taken))
	}
}

func testTakesWhatItKnows(t *testing.T, s saga.Store) {
	newer, foreign := instance("newer"), instance("foreign")
	newer.Version, foreign.Saga = 2, "c"
	create(t, s, newer, foreign, instance("mine"))
	if g := lease(t, s, r1, 10); fmt.Sprint(ids(g.Taken)) != "[mine]" || g.Next >= 0 {
		t.Errorf("took %v, next in %v", ids(g.Taken), g.Next)
	}
}

func testOneOfManyTakes(t *testing.T, s saga.Store) {
	for i := range 60 {
		create(t, s, instance(fmt.Sprint(i)))
	}
	var mu sync.Mutex
	taken := make(map[string]string)
	var wg sync.WaitGroup
	for i := range 6 {
		runner := fmt.Sprintf("00000000-0000-7000-8000-00000000001%d", i)
		wg.Go(func() {
			for range 30 {
				g, err := s.Lease(t.Context(), saga.LeaseRequest{Runner: runner, TTL: ttl, Beat: true, Sagas: both, Limit: 2})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, in := range g.Taken {
					if other := taken[in.ID]; other != "" {
						t.Errorf("%s is taken by %s and %s", in.ID, other, runner)
					}
					taken[in.ID] = runner
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(taken) != 60 {
		t.Errorf("%d of 60 were taken", len(taken))
	}
}

// die leaves runner with a lease that is over.
func die(t *testing.T, s saga.Store, runner string, limit int) saga.Grant {
	t.Helper()
	g, err := s.Lease(t.Context(), saga.LeaseRequest{Runner: runner, TTL: time.Millisecond, Beat: true, Sagas: both, Limit: limit})
	must(t, err)
	return g
}

func testDeadRunner(t *testing.T, s saga.Store) {
	create(t, s, instance("1"))
	if g := die(t, s, r1, 1); len(g.Taken) != 1 {
		t.Fatalf("took %v", ids(g.Taken))
	}
	eventually(t, "the lease to end", func() bool {
		g := lease(t, s, r2, 1)
		return len(g.Taken) == 1 && g.Taken[0].Deaths == 1 && g.Taken[0].Owner == r2
	})
	// Its name is used up, whether it asks for a beat or not.
	for _, beat := range []bool{true, false} {
		_, err := s.Lease(t.Context(), saga.LeaseRequest{Runner: r1, TTL: ttl, Beat: beat, Sagas: both, Limit: 1})
		wantErr(t, err, saga.ErrLeaseLost)
	}
	if a := save(t, s, r2, checkpoint("1")); !a[0].Held {
		t.Error("the new owner does not hold it")
	}
	if in, err := s.Get(t.Context(), "1"); err != nil || in.Deaths != 0 {
		t.Errorf("deaths %d after a checkpoint, %v", in.Deaths, err)
	}
}

func testFence(t *testing.T, s saga.Store) {
	create(t, s, instance("1"), instance("2"))
	die(t, s, r1, 2)
	eventually(t, "the takeover", func() bool { return len(lease(t, s, r2, 1).Taken) == 1 })
	list, err := s.List(t.Context(), saga.Query{})
	must(t, err)
	for _, in := range list {
		c := checkpoint(in.ID)
		c.State = []byte("zombie")
		if a := save(t, s, r1, c); a[0].Held && in.Owner != r1 {
			t.Errorf("%s of %s was saved by %s", in.ID, in.Owner, r1)
		}
		got, err := s.Get(t.Context(), in.ID)
		must(t, err)
		if in.Owner == r2 && string(got.State) == "zombie" {
			t.Errorf("%s was changed by a zombie", in.ID)
		}
	}
	if a := save(t, s, r2, checkpoint("none")); a[0].Held {
		t.Error("a saga that does not exist is held")
	}
}

func testFenceOfRelease(t *testing.T, s saga.Store) {
	create(t, s, instance("1"))
	lease(t, s, r1, 1)
	c := checkpoint("1")
	c.Status, c.Release = saga.Done, true
	if a := save(t, s, r1, c); !a[0].Held {
		t.Fatal("not held")
	}
	if a := save(t, s, r1, c); a[0].Held {
		t.Error("held after it was given up")
	}
	in, err := s.Get(t.Context(), "1")
	must(t, err)
	if in.Status != saga.Done || in.EndedAt.IsZero() || in.Owner != "" {
		t.Errorf("got %+v", in)
	}
	if g := lease(t, s, r2, 1); len(g.Taken) != 0 {
		t.Error("a saga that has ended was taken")
	}
}

func testWaits(t *testing.T, s saga.Store) {
	create(t, s, instance("1"), instance("2"))
	g := lease(t, s, r1, 2)
	soon, never := checkpoint("1"), checkpoint("2")
	soon.Release, soon.WakeAt = true, g.Now.Add(300*time.Millisecond)
	never.Release = true
	save(t, s, r1, soon, never)
	g = lease(t, s, r2, 2)
	if len(g.Taken) == 0 && (g.Next < 0 || g.Next > 300*time.Millisecond) {
		t.Errorf("next in %v, want within 300 ms", g.Next)
	}
	eventually(t, "saga 1 to be due", func() bool {
		g := lease(t, s, r2, 2)
		if len(g.Taken) == 1 && g.Now.Before(soon.WakeAt) {
			t.Error("taken before its time")
		}
		return fmt.Sprint(ids(g.Taken)) == "[1]"
	})
	if g := lease(t, s, r2, 2); len(g.Taken) != 0 || g.Next >= 0 {
		t.Errorf("took %v, next in %v", ids(g.Taken), g.Next)
	}
}

// signal and cancel are what a Runner does to a saga.
func signal(t *testing.T, s saga.Store, id, name string) {
	t.Helper()
	must(t, saga.NewRunner(s, nil, nil).Signal(t.Context(), id, name, []byte{0, 255}))
}

func testSignalBeforeTheWait(t *testing.T, s saga.Store) {
	create(t, s, instance("1"), instance("2"))
	lease(t, s, r1, 2)
	signal(t, s, "1", "go")
	signal(t, s, "2", "other")
	cs := []saga.Checkpoint{checkpoint("1"), checkpoint("2")}
	for i := range cs {
		cs[i].Release, cs[i].Await = true, []string{"go", "stop"}
	}
	acks := save(t, s, r1, cs...)
	if got := acks[0].Signals["go"]; !bytes.Equal(got, []byte{0, 255}) {
		t.Errorf("signals %v", acks[0].Signals)
	}
	if g := lease(t, s, r2, 2); fmt.Sprint(ids(g.Taken)) != "[1]" {
		t.Errorf("took %v, want the one whose signal is there", ids(g.Taken))
	}
}

func testCancelBeforeTheWait(t *testing.T, s saga.Store) {
	create(t, s, instance("1"), instance("2"))
	lease(t, s, r1, 2)
	for _, id := range []string{"1", "2"} {
		must(t, saga.NewRunner(s, nil, nil).Cancel(t.Context(), id, saga.By{Actor: "me", Reason: "why"}))
	}
	if g := lease(t, s, r1, 0); len(g.Cancel) != 2 {
		t.Errorf("to cancel: %v", g.Cancel)
	}
	cs := []saga.Checkpoint{checkpoint("1"), checkpoint("2")}
	cs[0].Release, cs[1].Release, cs[1].Cancel = true, true, "why" // 2 is known to be cancelled
	if acks := save(t, s, r1, cs...); acks[0].Cancel != "why" {
		t.Errorf("acks %+v", acks)
	}
	if g := lease(t, s, r2, 2); fmt.Sprint(ids(g.Taken)) != "[1]" {
		t.Errorf("took %v", ids(g.Taken))
	}
}

func testLeave(t *testing.T, s saga.Store) {
	create(t, s, instance("1"))
	lease(t, s, r1, 1)
	_, err := s.Lease(t.Context(), saga.LeaseRequest{Runner: r1})
	must(t, err)
	g := lease(t, s, r2, 1)
	if len(g.Taken) != 1 || g.Taken[0].Deaths != 0 {
		t.Errorf("took %+v", g.Taken)
	}
	if a := save(t, s, r1, checkpoint("1")); a[0].Held {
		t.Error("held by one who has left")
	}
}

func testEdit(t *testing.T, s saga.Store) {
	ctx := t.Context()
	create(t, s, instance("1"))
	wantErr(t, s.Edit(ctx, "none", func(*saga.Instance) (*saga.Audit, error) { return nil, nil }), saga.ErrNotFound)
	no := errors.New("no")
	if err := s.Edit(ctx, "1", func(in *saga.Instance) (*saga.Audit, error) { in.Cancel = "x"; return nil, no }); !errors.Is(err, no) {
		t.Errorf("error %v, want that of f", err)
	}
	lease(t, s, r1, 1)
	change := func(in *saga.Instance) (*saga.Audit, error) {
		in.Status, in.Reason, in.Cancel, in.Signals = saga.Stuck, "r", "c", map[string][]byte{"s": nil}
		in.Steps = append(in.Steps, saga.StepRecord{Name: "x", Outcome: saga.Skipped})
		return &saga.Audit{Actor: "me", Action: "try", Detail: "d", Reason: "r"}, nil
	}
	must(t, s.Edit(ctx, "1", change))
	in, err := s.Get(ctx, "1")
	must(t, err)
	if _, there := in.Signals["s"]; in.Status != saga.Running || len(in.Steps) != 0 || in.Cancel != "c" || !there {
		t.Errorf("while in hand, only Cancel and Signals may be changed: %+v", in)
	}
	c := checkpoint("1")
	c.Release, c.Status = true, saga.Stuck
	save(t, s, r1, c)
	must(t, s.Edit(ctx, "1", func(in *saga.Instance) (*saga.Audit, error) {
		in.Deaths, in.Cause, in.WakeAt = 3, "cause", time.Unix(0, 0)
		return change(in)
	}))
	in, err = s.Get(ctx, "1")
	must(t, err)
	if in.Status != saga.Stuck || in.Reason != "r" || in.Cause != "cause" || in.Deaths != 3 || len(in.Steps) != 1 {
		t.Errorf("got %+v", in)
	}
	if len(in.Audit) != 2 || in.Audit[0].Actor != "me" || in.Audit[1].Action != "try" || in.Audit[0].At.IsZero() {
		t.Errorf("audit %+v", in.Audit)
	}
	if g := lease(t, s, r2, 1); len(g.Taken) != 1 {
		t.Error("an edited saga was not woken")
	}
}

func testList(t *testing.T, s saga.Store) {
	for i := range 7 {
		in := instance(fmt.Sprintf("id-%d", i))
		if i%2 == 1 {
			in.Saga = "b"
		}
		create(t, s, in)
	}
	page := func(q saga.Query) string {
		out, err := s.List(t.Context(), q)
		must(t, err)
		return fmt.Sprint(ids(out))
	}
	if got := page(saga.Query{Saga: "a", Limit: 3}); got != "[id-0 id-2 id-4]" {
		t.Error(got)
	}
	if got := page(saga.Query{Saga: "a", Limit: 3, After: "id-4"}); got != "[id-6]" {
		t.Error(got)
	}
	if got := page(saga.Query{Status: saga.Stuck}); got != "[]" {
		t.Error(got)
	}
	if got := page(saga.Query{}); got != "[id-0 id-1 id-2 id-3 id-4 id-5 id-6]" {
		t.Error(got)
	}
}

func testSample(t *testing.T, s saga.Store) {
	create(t, s, instance("1"), instance("2"), instance("3"), instance("4"))
	lease(t, s, r1, 3)
	list, err := s.List(t.Context(), saga.Query{})
	must(t, err)
	var held []string
	for _, in := range list {
		if in.Owner != "" {
			held = append(held, in.ID)
		}
	}
	stuck, done := checkpoint(held[0]), checkpoint(held[1])
	stuck.Status, stuck.Release, done.Status, done.Release = saga.Stuck, true, saga.Done, true
	save(t, s, r1, stuck, done)
	got, err := s.Sample(t.Context())
	must(t, err)
	if got.Running != 2 || got.Stuck != 1 || got.Compensating != 0 || got.InHand != 1 || got.Due != 1 || got.Lag <= 0 {
		t.Errorf("sample %+v", got)
	}
}

func testCancelledContext(t *testing.T, s saga.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Create(ctx, []saga.Instance{instance("1")})
	wantErr(t, err, context.Canceled)
	_, err = s.Lease(ctx, saga.LeaseRequest{Runner: r1, TTL: ttl, Beat: true})
	wantErr(t, err, context.Canceled)
	_, err = s.Save(ctx, r1, []saga.Checkpoint{checkpoint("1")})
	wantErr(t, err, context.Canceled)
	_, err = s.Get(ctx, "1")
	wantErr(t, err, context.Canceled)
	wantErr(t, s.Edit(ctx, "1", nil), context.Canceled)
}
