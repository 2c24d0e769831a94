package main

import (
	"context"
	"errors"
	"net"
	"sync"
)

var errCut = errors.New("the service was killed")

// A cord is what all connections of one service instance hang on. Pulling it is
// to the rest of the world what kill -9 of a process is: every connection breaks
// at once, its transactions are rolled back, and nothing that the instance still
// tries gets out.
type cord struct {
	mu  sync.Mutex
	cut bool
	all map[interface{ Close() error }]struct{}
}

func newCord() *cord { return &cord{all: make(map[interface{ Close() error }]struct{})} }

// pull breaks everything. It reports whether it was the first to.
func (c *cord) pull() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		return false
	}
	c.cut = true
	for x := range c.all {
		if t, ok := x.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // a reset, not a farewell
		}
		_ = x.Close()
	}
	c.all = nil
	return true
}

func (c *cord) attach(x interface{ Close() error }) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		return errors.Join(errCut, x.Close())
	}
	c.all[x] = struct{}{}
	return nil
}

func (c *cord) detach(x interface{ Close() error }) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.all, x)
}

// dial is a net.Dialer's DialContext whose connections hang on the cord.
func (c *cord) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c.mu.Lock()
	cut := c.cut
	c.mu.Unlock()
	if cut {
		return nil, errCut
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return c.hang(conn)
}

func (c *cord) hang(conn net.Conn) (net.Conn, error) {
	if err := c.attach(conn); err != nil {
		return nil, err
	}
	return &corded{conn, c}, nil
}

type corded struct {
	net.Conn
	cord *cord
}

func (c *corded) Close() error {
	c.cord.detach(c.Conn)
	return c.Conn.Close()
}

// listen returns ln with its connections, and itself, on the cord.
func (c *cord) listen(ln net.Listener) (net.Listener, error) {
	return &cordedListener{ln, c}, c.attach(ln)
}

type cordedListener struct {
	net.Listener
	cord *cord
}

func (l *cordedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.cord.hang(conn)
}
