package idempotencypg_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/internal/pgtest"
)

// A proxy passes everything between clients and the server, except that it cuts
// a connection in place of an answer that contains what armed asks for.
type proxy struct {
	net.Listener
	server string
	armed  atomic.Pointer[[]byte]
	cut    atomic.Int64
	wg     sync.WaitGroup
}

func startProxy(t *testing.T, server string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l, server: server}
	p.wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.pass(client) })
		}
	})
	t.Cleanup(func() { l.Close(); p.wg.Wait() })
	return p
}

func (p *proxy) pass(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", p.server)
	if err != nil {
		return
	}
	defer server.Close()
	p.wg.Go(func() {
		_, _ = io.Copy(server, client)
		server.Close()
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := server.Read(buf)
		if err != nil {
			return
		}
		if want := p.armed.Load(); want != nil && bytes.Contains(buf[:n], *want) && p.armed.CompareAndSwap(want, nil) {
			p.cut.Add(1)
			return
		}
		if _, err := client.Write(buf[:n]); err != nil {
			return
		}
	}
}

// through returns a pool on dsn whose connections pass the proxy.
func through(t *testing.T, dsn string) (*pgxpool.Pool, *proxy) {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	p := startProxy(t, u.Host)
	u.Host = p.Addr().String()
	return pgtest.Open(t, u.String()), p
}

// The COMMIT is done and its answer lost: the caller gets an error, and its
// retry the result, not a second effect.
func TestLostCommit(t *testing.T) {
	direct, dsn := crashLedger(t)
	pool, proxy := through(t, dsn)
	commit := append([]byte("COMMIT"), 0) // the tag of a CommandComplete message
	for i := range 10 {
		id := fmt.Sprint("k", i)
		work := func(ctx context.Context, tx pgx.Tx) (int, error) {
			_, err := tx.Exec(ctx, `INSERT INTO effect (id, nonce) VALUES ($1, '')`, id)
			return i, err
		}
		armed := func(ctx context.Context, tx pgx.Tx) (int, error) {
			v, err := work(ctx, tx)
			proxy.armed.Store(&commit)
			return v, err
		}
		if _, _, err := idempotencypg.DoTx(t.Context(), pool, key(id), nil, armed); err == nil {
			t.Fatal("no error although the answer of COMMIT was lost")
		}
		got, replayed, err := idempotencypg.DoTx(t.Context(), pool, key(id), &idempotencypg.TxOptions{Wait: time.Minute}, work)
		if err != nil || got != i {
			t.Fatalf("the retry: %v, %v, %v", got, replayed, err)
		}
		if n := effects(t, direct, id); n != 1 {
			t.Fatalf("%d effects of %s, want 1 (replayed %v)", n, id, replayed)
		}
		if !replayed {
			t.Errorf("%s: the answer was cut after the COMMIT, yet the retry ran again", id)
		}
	}
	if n := proxy.cut.Load(); n != 10 {
		t.Fatalf("%d answers were lost, want 10", n)
	}
}

// The same for each answer of a two-phase execution.
func TestLostReplies(t *testing.T) {
	direct, dsn := crashLedger(t)
	pool, proxy := through(t, dsn)
	store := idempotencypg.New(pool)
	for i, tag := range []string{"INSERT 0 1\x00", "UPDATE 1\x00", "COMMIT\x00"} { // of Claim, CompleteTx, COMMIT
		id, cut := fmt.Sprint("k", i), []byte(tag)
		if tag == "INSERT 0 1\x00" {
			proxy.armed.Store(&cut)
		}
		opts := &idempotency.Options{Lease: crashLease, Wait: time.Minute}
		var got int
		err := errors.New("not tried")
		for attempt := 0; err != nil && attempt < 20; attempt++ {
			got, _, err = idempotency.Do(t.Context(), store, key(id), opts, func(ctx context.Context) (int, error) {
				return attempt, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
					if _, err := tx.Exec(ctx, `INSERT INTO effect (id, nonce) VALUES ($1, $2)`, id, fmt.Sprint(attempt)); err != nil {
						return err
					}
					if attempt == 0 {
						proxy.armed.Store(&cut)
					}
					return idempotencypg.CompleteTx(ctx, tx, attempt)
				})
			})
			if err == nil && attempt == 0 {
				t.Errorf("%q: no error although the answer was lost", tag)
			}
		}
		if err != nil {
			t.Fatalf("%q: %v", tag, err)
		}
		if n := count(t, direct, `SELECT count(*) FROM effect WHERE id = $1 AND nonce = $2`, id, fmt.Sprint(got)); n != 1 || effects(t, direct, id) != 1 {
			t.Fatalf("%q: %d effects, %d of the result %d; want 1", tag, effects(t, direct, id), n, got)
		}
		if proxy.armed.Load() != nil {
			t.Fatalf("%q: the answer was not lost", tag)
		}
	}
}
