package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"
)

// A Service is a running server.
type Service struct {
	Name     string
	Version  string
	Provider Provider
	Address  string // a URL, or for Kafka host:port[,host:port]
	Real     bool   // the real server, not an embedded imitation
	Note     string // why providers before this one were passed over

	inst instance
}

// An instance is a server as its provider sees it.
type instance interface {
	stop(ctx context.Context, immediate bool) error
	start(ctx context.Context) error
	close() error
}

// Stop takes the server down until Start; immediate means without a clean
// shutdown, as a crash would. Data survives, but in Redis, which persists nothing
// while it runs, only a clean shutdown. A server from the environment cannot be
// stopped: errors.ErrUnsupported.
func (s *Service) Stop(ctx context.Context, immediate bool) error {
	if s.inst == nil {
		return fmt.Errorf("stack: %s from %s cannot be stopped: %w", s.Name, s.Provider, errors.ErrUnsupported)
	}
	return s.inst.stop(ctx, immediate)
}

// Start starts a stopped server at the same address and returns when it answers.
func (s *Service) Start(ctx context.Context) error {
	if s.inst == nil {
		return fmt.Errorf("stack: %s from %s cannot be started: %w", s.Name, s.Provider, errors.ErrUnsupported)
	}
	return s.inst.start(ctx)
}

// Restart is Stop and Start.
func (s *Service) Restart(ctx context.Context, immediate bool) error {
	if err := s.Stop(ctx, immediate); err != nil {
		return err
	}
	return s.Start(ctx)
}

// A probe asks the server at a port for its version. An error means not yet.
type probe func(ctx context.Context, port int) (version string, err error)

var errGone = errors.New("the server has exited")

// ready calls p until it succeeds, ctx ends, or gone is closed.
func ready(ctx context.Context, gone <-chan struct{}, port int, p probe) (string, error) {
	for {
		version, err := func() (string, error) {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			return p(ctx, port)
		}()
		if err == nil {
			return version, nil
		}
		select {
		case <-gone:
			return "", errGone
		case <-ctx.Done():
			return "", fmt.Errorf("no answer: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// freePort returns a TCP port on loopback that nobody uses now. It may be taken
// a moment later: who starts a server on it tries again.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

// portTaken reports whether an error says that another program has the port.
func portTaken(err error) bool {
	text := strings.ToLower(err.Error())
	return strings.Contains(text, "address already in use") || strings.Contains(text, "address in use") ||
		strings.Contains(text, "port is already allocated")
}

func hostPort(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
