package pgtest

import (
	"bytes"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
)

// A Proxy passes everything between clients and the server, except that it cuts
// a connection in place of an answer that contains what Arm asks for.
type Proxy struct {
	listener net.Listener
	server   string
	armed    atomic.Pointer[[]byte]
	cut      atomic.Int64
	wg       sync.WaitGroup
}

func startProxy(t testing.TB, server string) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{listener: l, server: server}
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

func (p *Proxy) pass(client net.Conn) {
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

// Arm has the next answer that contains tag lost, with its connection.
func (p *Proxy) Arm(tag string) {
	b := []byte(tag)
	p.armed.Store(&b)
}

// Armed reports whether an answer is still to be lost.
func (p *Proxy) Armed() bool { return p.armed.Load() != nil }

// Cuts returns how many answers were lost.
func (p *Proxy) Cuts() int { return int(p.cut.Load()) }

// Through returns a pool on dsn whose connections pass a proxy.
func Through(tb testing.TB, dsn string) (*pgxpool.Pool, *Proxy) {
	tb.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		tb.Fatal(err)
	}
	p := startProxy(tb, u.Host)
	u.Host = p.listener.Addr().String()
	return Open(tb, u.String()), p
}
