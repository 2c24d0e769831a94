// Package pglisten waits for notifications of Postgres. Backends that wake
// others by NOTIFY share it.
package pglisten

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// Listen calls wake for every notification on channel, a plain identifier, until
// ctx ends, and then returns nil. It connects with dial and again whenever the
// connection fails, which it logs as what, and calls wake then too: for what was
// sent while nobody listened.
func Listen(ctx context.Context, dial func(ctx context.Context) (*pgx.Conn, error), channel string, wake func(), log *slog.Logger, what string) error {
	if log == nil {
		log = slog.Default()
	}
	for attempt := 0; ; attempt++ {
		err := listen(ctx, dial, channel, func() { attempt = 0; wake() })
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the error is that ctx has ended, as it should
		}
		log.WarnContext(ctx, what, "error", err)
		_ = backoff.Sleep(ctx, min(50*time.Millisecond<<min(attempt, 10), 5*time.Second)) // ends with ctx, which the next attempt sees
	}
}

func listen(ctx context.Context, dial func(ctx context.Context) (*pgx.Conn, error), channel string, wake func()) error {
	conn, err := dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return err
	}
	wake()
	for {
		// A silently dead connection shows itself at the next ping.
		waitCtx, cancel := context.WithTimeout(ctx, 30*time.Second)
		_, err := conn.WaitForNotification(waitCtx)
		cancel()
		switch {
		case err == nil:
			wake()
		case ctx.Err() != nil:
			return ctx.Err()
		case waitCtx.Err() == nil:
			return err
		default:
			pingCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
			err := conn.Ping(pingCtx)
			cancel()
			if err != nil {
				return fmt.Errorf("connection lost: %w", err)
			}
		}
	}
}
