package outboxpg_test

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

var kills = flag.Int("kills", 24, "how often the crash suite kills a process; the full form is 200")

const (
	childEnv  = "OUTBOXPG_CHILD" // relay or writer
	pointEnv  = "OUTBOXPG_POINT" // where the child stops to be killed
	crashDSN  = "OUTBOXPG_DSN"
	crashKeys = 12
	batchSize = 32
)

// The broker of the crash suite is a table, so that what it acknowledged is
// known whatever dies. Its sequence is the order of arrival.
const brokerSQL = `CREATE TABLE broker (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id text, key text, relay text);
	CREATE TABLE written (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id text, key text);
	CREATE TABLE counter (key text PRIMARY KEY, n bigint NOT NULL);`

type tableBroker struct {
	pool  *pgxpool.Pool
	relay string
	point string // stop here
	after int    // at this publish
	calls int
}

func (b *tableBroker) Publish(ctx context.Context, msgs []outbox.Message) error {
	b.calls++
	if b.point == "before-publish" && b.calls == b.after {
		reached()
	}
	var ids, keys []string
	for i, m := range msgs {
		if b.point == "inside-publish" && b.calls == b.after && i == len(msgs)/2 {
			break
		}
		ids, keys = append(ids, m.ID), append(keys, m.Key)
	}
	_, err := b.pool.Exec(ctx, `INSERT INTO broker (id, key, relay) SELECT u.id, u.key, $3
		FROM unnest($1::text[], $2::text[]) WITH ORDINALITY u(id, key, n) ORDER BY n`, ids, keys, b.relay)
	if err == nil && len(ids) < len(msgs) || b.point == "after-publish" && b.calls == b.after {
		reached()
	}
	return err
}

// killStore stops at points around the store's calls.
type killStore struct {
	*outboxpg.Store
	point  string
	after  int
	settle int
}

func (s *killStore) Settle(ctx context.Context, st outbox.Settlement) ([]int, error) {
	s.settle++
	if s.point == "before-settle" && s.settle == s.after {
		reached()
	}
	lost, err := s.Store.Settle(ctx, st)
	if s.point == "after-settle" && s.settle == s.after {
		reached()
	}
	return lost, err
}

// reached says that the point is reached and waits for the kill.
func reached() {
	fmt.Println("REACHED")
	select {}
}

// TestCrashChild is a relay or a writer that a crash test starts and kills.
func TestCrashChild(t *testing.T) {
	role, point := os.Getenv(childEnv), os.Getenv(pointEnv)
	if role == "" {
		t.Skip("runs as a child of TestCrash")
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv(crashDSN))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("READY")
	if role == "writer" {
		write(ctx, pool, point, 1+rand.IntN(40))
		return
	}
	after := 1 + rand.IntN(4)
	name := fmt.Sprint(os.Getpid())
	relay := outbox.NewRelay(&killStore{Store: outboxpg.New(pool, nil), point: point, after: after},
		&tableBroker{pool: pool, relay: name, point: point, after: after},
		&outbox.RelayOptions{BatchSize: batchSize, LeaseTTL: time.Second, Poll: 5 * time.Millisecond})
	if err := relay.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

// write runs transactions until the process is killed: each locks a key's
// counter, records the message for the audit and appends it.
func write(ctx context.Context, pool *pgxpool.Pool, point string, stopAt int) {
	for i := 1; ; i++ {
		key := fmt.Sprint("k", rand.IntN(crashKeys))
		err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			var n int64
			err := tx.QueryRow(ctx, `INSERT INTO counter VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = counter.n + 1 RETURNING n`, key).Scan(&n)
			if err != nil {
				return err
			}
			id := fmt.Sprintf("%s-%d", key, n)
			if err := outboxpg.Append(ctx, tx, outbox.Message{ID: id, Topic: "t", Key: key}); err != nil {
				return err
			}
			if point == "writer-after-append" && i == stopAt {
				reached()
			}
			_, err = tx.Exec(ctx, `INSERT INTO written (id, key) VALUES ($1, $2)`, id, key)
			return err
		})
		if err == nil && point == "writer-after-commit" && i == stopAt {
			reached()
		}
		time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
	}
}

// A child is a process of the crash suite.
type child struct {
	cmd     *exec.Cmd
	reached chan struct{}
}

func startChild(t *testing.T, dsn, role, point string) *child {
	t.Helper()
	c := &child{cmd: exec.Command(os.Args[0], "-test.run", "^TestCrashChild$"), reached: make(chan struct{}, 1)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+role, pointEnv+"="+point, crashDSN+"="+dsn)
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	go func() {
		var once sync.Once
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			switch scanner.Text() {
			case "READY":
				once.Do(func() { close(ready) })
			case "REACHED":
				c.reached <- struct{}{}
			}
		}
		once.Do(func() { close(ready) })
	}()
	t.Cleanup(func() { _ = c.cmd.Process.Kill() })
	<-ready
	return c
}

// kill sends SIGKILL and tells whether that is what ended the process.
func (c *child) kill() bool {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
	ws, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && ws.Signaled() && ws.Signal() == syscall.SIGKILL
}

var points = []string{
	"before-publish", "inside-publish", "after-publish", "before-settle", "after-settle",
	"writer-after-append", "writer-after-commit", "anywhere",
}

// Whatever process is killed at whatever point: no message is lost, none
// overtakes another of its key, and each kill repeats at most two batches.
func TestCrash(t *testing.T) {
	dsn := pgtest.URL(t)
	pool := pgtest.Open(t, dsn)
	if err := outboxpg.Migrate(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), brokerSQL); err != nil {
		t.Fatal(err)
	}
	relayKills := 0
	for i := range *kills {
		point := points[i%len(points)]
		writerPoint, relayPoint := "", point
		if strings.HasPrefix(point, "writer") {
			writerPoint, relayPoint = point, ""
		}
		writer := startChild(t, dsn, "writer", writerPoint)
		relay := startChild(t, dsn, "relay", relayPoint)
		victim := relay
		if writerPoint != "" {
			victim = writer
		}
		if point == "anywhere" {
			time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
		} else {
			select {
			case <-victim.reached:
			case <-time.After(30 * time.Second):
				t.Fatalf("kill %d: the point %s was not reached", i, point)
			}
		}
		if !victim.kill() {
			t.Fatalf("kill %d at %s did not land: %v", i, point, victim.cmd.ProcessState)
		}
		for _, c := range []*child{writer, relay} {
			if c != victim {
				c.kill()
			}
		}
		relayKills++ // in each round the relay dies, by its point or at the end
	}
	last := startChild(t, dsn, "relay", "")
	eventually(t, "all messages", func() bool {
		return scan[int64](t, pool, `SELECT count(*) FROM written w WHERE NOT EXISTS (SELECT FROM broker b WHERE b.id = w.id)`) == 0
	})
	last.kill()
	audit(t, pool, relayKills)
}

// audit compares what was committed with what the broker received.
func audit(t *testing.T, pool *pgxpool.Pool, kills int) {
	t.Helper()
	type row struct{ ID, Key string }
	read := func(table string) []row {
		rows, err := pool.Query(t.Context(), `SELECT id, key FROM `+table+` ORDER BY n`)
		if err != nil {
			t.Fatal(err)
		}
		out, err := pgx.CollectRows(rows, pgx.RowToStructByPos[row])
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	want, got, seen := make(map[string][]string), make(map[string][]string), make(map[string]bool)
	written, deliveries := read("written"), read("broker")
	for _, r := range written {
		want[r.Key] = append(want[r.Key], r.ID)
	}
	for key := range want { // a key's transactions are serialised by its counter
		slices.SortFunc(want[key], func(a, b string) int { return number(a) - number(b) })
	}
	duplicates := 0
	for _, r := range deliveries {
		if seen[r.ID] {
			duplicates++
			continue
		}
		seen[r.ID] = true
		got[r.Key] = append(got[r.Key], r.ID)
	}
	for key := range want {
		if !slices.Equal(got[key], want[key]) {
			t.Errorf("key %s: %d of %d delivered, first difference at %d", key, len(got[key]), len(want[key]), firstDifference(got[key], want[key]))
		}
	}
	if len(seen) != len(written) {
		t.Errorf("%d messages delivered, %d were committed", len(seen), len(written))
	}
	if limit := kills * 2 * batchSize; duplicates > limit {
		t.Errorf("%d duplicates after %d kills, want at most %d", duplicates, kills, limit)
	}
	t.Logf("%d kills, %d messages, %d duplicates, 0 lost, 0 out of order unless said above", kills, len(written), duplicates)
}

func number(id string) (n int) {
	_, s, _ := strings.Cut(id, "-")
	_, _ = fmt.Sscan(s, &n) // ids of this test are well-formed
	return n
}

func firstDifference(a, b []string) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
