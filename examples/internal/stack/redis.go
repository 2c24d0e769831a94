package stack

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"github.com/alicebob/miniredis/v2"
)

// localRedis runs the redis-server that is installed.
func localRedis(ctx context.Context, _ func(string, ...any)) (*Service, error) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, fmt.Errorf("redis-server is not installed: %w", errUnavailable)
	}
	dir, err := tempDir(nil, "ashlar-redis-")
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	svc := &Service{Address: "redis://" + hostPort(port) + "/0", Real: true}
	var p *process
	start := func(ctx context.Context) (err error) {
		p, err = spawn(nil, dir, nil, path, "--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--dir", dir, "--save", "", "--appendonly", "yes", "--appendfsync", "everysec")
		if err != nil {
			return err
		}
		err = ready(ctx, p.gone, func(ctx context.Context) error { svc.Version, err = redisVersion(ctx, svc.Address); return err })
		if err != nil {
			return fmt.Errorf("%w\n%s", err, p.output)
		}
		return nil
	}
	svc.stop = func() error {
		defer os.RemoveAll(dir)
		return p.stop(syscall.SIGTERM)
	}
	svc.restart = func(ctx context.Context, immediate bool) error {
		sig := syscall.SIGTERM
		if immediate {
			sig = syscall.SIGKILL
		}
		if err := p.stop(sig); err != nil {
			return err
		}
		return start(ctx)
	}
	if err := start(ctx); err != nil {
		if p != nil {
			_ = p.stop(syscall.SIGKILL) // the error that matters is the one above
		}
		os.RemoveAll(dir)
		return nil, err
	}
	return svc, nil
}

// embeddedRedis runs an imitation of Redis in this process.
func embeddedRedis(context.Context, func(string, ...any)) (*Service, error) {
	m := miniredis.NewMiniRedis()
	if err := m.Start(); err != nil {
		return nil, err
	}
	return &Service{
		Version: "miniredis", Address: "redis://" + m.Addr() + "/0",
		stop: func() error { m.Close(); return nil },
	}, nil
}
