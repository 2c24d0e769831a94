package chaos

import (
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A proxy stands before a server and, while it is bad, loses answers: it passes
// a request on, swallows what comes back and breaks the connection.
type proxy struct {
	listener net.Listener
	target   string
	bad      atomic.Bool
	lost     atomic.Int64
	conns    sync.WaitGroup
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, target: target}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			p.conns.Go(func() { p.serve(c) })
		}
	}()
	t.Cleanup(func() { l.Close() })
	return p
}

func (p *proxy) serve(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		_, _ = io.Copy(server, client) // ends when either side does
		server.Close()
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := server.Read(buf)
		if err != nil {
			return
		}
		if p.bad.Load() && rand.IntN(20) == 0 {
			p.lost.Add(1)
			return
		}
		if _, err := client.Write(buf[:n]); err != nil {
			return
		}
	}
}

// Answers of the database are lost: of writers' COMMITs as well as of the
// relays' outcomes.
func TestOutboxThroughLostReplies(t *testing.T) {
	var p *proxy
	s := open(t, func(dsn string) string {
		u, err := url.Parse(dsn)
		if err != nil {
			t.Fatal(err)
		}
		p = newProxy(t, u.Host)
		u.Host = p.listener.Addr().String()
		return u.String()
	})
	s.run(func(context.Context) {
		p.bad.Store(true)
		time.Sleep(3 * time.Second)
		p.bad.Store(false)
	})
	if p.lost.Load() < 10 {
		t.Errorf("%d answers were lost, want at least 10", p.lost.Load())
	}
	t.Logf("%d answers were lost", p.lost.Load())
}
