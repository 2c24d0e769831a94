package lockpg

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/lock/internal/wake"
)

// idle is for how long a connection is kept when nobody waits any more.
const idle = 5 * time.Second

// A listener has a connection that hears of free keys, while somebody waits.
type listener struct {
	dial   func(ctx context.Context) (*pgx.Conn, error)
	logger *slog.Logger
	hub    wake.Hub

	mu      sync.Mutex
	running bool
	hearing bool // since the last LISTEN
}

func dialLike(pool *pgxpool.Pool) func(ctx context.Context) (*pgx.Conn, error) {
	return func(ctx context.Context) (*pgx.Conn, error) {
		cfg := pool.Config()
		if cfg.BeforeConnect != nil { // may set a password that is only just valid
			if err := cfg.BeforeConnect(ctx, cfg.ConnConfig); err != nil {
				return nil, err
			}
		}
		return pgx.ConnectConfig(ctx, cfg.ConnConfig)
	}
}

// Watch implements [lock.Watcher].
func (s *Store) Watch(ctx context.Context, keys []string, wake func()) (stop func()) {
	l := &s.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	stop = l.hub.Add(keys, wake)
	if !l.running {
		l.running = true
		go l.run(context.WithoutCancel(ctx))
	}
	if l.hearing {
		wake()
	}
	return stop
}

// run listens until nobody has waited for a while.
func (l *listener) run(ctx context.Context) {
	for attempt := 0; ; attempt++ {
		err := l.listen(ctx, func() { attempt = 0 })
		if err == nil || l.over() {
			return
		}
		l.logger.WarnContext(ctx, "lockpg: not listening, those who wait for a lock will poll", "error", err)
		time.Sleep(min(50*time.Millisecond<<min(attempt, 10), idle))
	}
}

// over ends the listening if nobody waits.
func (l *listener) over() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running = !l.hub.Empty()
	l.hearing = l.hearing && l.running
	return !l.running
}

// listen returns nil when nobody has waited for a while.
func (l *listener) listen(ctx context.Context, connected func()) error {
	dialCtx, cancel := context.WithTimeout(ctx, idle)
	defer cancel()
	conn, err := l.dial(dialCtx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(dialCtx, "LISTEN lock_free"); err != nil {
		return err
	}
	connected()
	l.hear(true)
	defer l.hear(false)
	l.hub.WakeAll() // for what was told while nobody listened
	for quiet := 0; ; quiet++ {
		waitCtx, cancel := context.WithTimeout(ctx, idle)
		n, err := conn.WaitForNotification(waitCtx)
		cancel()
		switch {
		case err == nil:
			quiet = 0
			l.hub.Wake(n.Payload)
		case waitCtx.Err() == nil:
			return err
		case l.over():
			return nil
		case quiet%6 == 5: // a silently dead connection shows itself
			pingCtx, cancel := context.WithTimeout(ctx, idle)
			err := conn.Ping(pingCtx)
			cancel()
			if err != nil {
				return fmt.Errorf("connection lost: %w", err)
			}
		}
	}
}

func (l *listener) hear(hearing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hearing = hearing
}
