package stack

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
)

func redisURL(port int) string { return "redis://" + hostPort(port) + "/0" }

func localRedis(ctx context.Context, r *run) (*Service, error) {
	bin, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, fmt.Errorf("redis-server is not installed (apt install redis-server, brew install redis): %w", errUnavailable)
	}
	p, err := newProgram(r, Redis, nil)
	if err != nil {
		return nil, err
	}
	p.finish = saveRedis
	p.argv = func(port int) []string {
		return []string{
			bin, "--port", strconv.Itoa(port), "--bind", "127.0.0.1", "--dir", p.dir,
			"--save", "", "--databases", "64",
		}
	}
	p.probe = func(ctx context.Context, port int) (string, error) {
		version, got, err := redisVersion(ctx, redisURL(port))
		if err == nil && got != strconv.Itoa(p.cmd.Process.Pid) {
			err = errors.New("another server has the port")
		}
		return version, err
	}
	version, err := p.launch(ctx)
	if err != nil {
		return nil, err
	}
	if err := atLeast("Redis", version, 6, 2); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", err, errUnavailable), p.close())
	}
	return &Service{Real: true, Version: version, Address: redisURL(p.port), inst: p}, nil
}

// saveRedis writes the snapshot that the server loads when it starts again.
func saveRedis(ctx context.Context, port int) error {
	client := redis.NewClient(&redis.Options{Addr: hostPort(port)})
	defer func() { _ = client.Close() }()
	return client.Save(ctx).Err()
}

// mini is an embedded Redis. As with the real one, which persists nothing here
// while it runs, its data survives a gentle stop only.
type mini struct {
	m      *miniredis.Miniredis
	closed chan struct{}
	once   sync.Once
}

func embeddedRedis(context.Context, *run) (*Service, error) {
	s := &mini{m: miniredis.NewMiniRedis(), closed: make(chan struct{})}
	if err := s.m.Start(); err != nil {
		return nil, err
	}
	go s.age()
	return &Service{Version: "miniredis", Address: "redis://" + s.m.Addr() + "/0", inst: s}, nil
}

// age lets keys expire: by itself miniredis never does that.
func (s *mini) age() {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-s.closed:
			return
		case <-tick.C:
			now := time.Now()
			s.m.FastForward(now.Sub(last))
			last = now
		}
	}
}

func (s *mini) stop(_ context.Context, immediate bool) error {
	s.m.Close()
	if immediate {
		s.m.FlushAll()
	}
	return nil
}

func (s *mini) start(context.Context) error { return s.m.Restart() }

func (s *mini) close() error {
	s.once.Do(func() { close(s.closed) })
	s.m.Close()
	return nil
}
