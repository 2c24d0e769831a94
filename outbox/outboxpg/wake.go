package outboxpg

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const channel = "outbox_wake"

// A Notifier tells relays in other processes that there are messages, so that
// they need not wait for their next poll. It sends at most one NOTIFY in each
// interval, outside of the writers' transactions: NOTIFY in each of them would
// make commits wait for one another.
//
// It is an optimization: what it loses, the relays' polling finds.
type Notifier struct {
	pool  *pgxpool.Pool
	opts  WakeOptions
	dirty chan struct{}
}

// WakeOptions tunes a [Notifier] and [Listen]. The zero value of each field
// means its default.
type WakeOptions struct {
	// Interval between two notifications. Default 25 ms. Listen does not use it.
	Interval time.Duration
	// Logger reports failures. Default slog.Default().
	Logger *slog.Logger
}

func (o *WakeOptions) withDefaults() WakeOptions {
	var d WakeOptions
	if o != nil {
		d = *o
	}
	if d.Interval <= 0 {
		d.Interval = 25 * time.Millisecond
	}
	if d.Logger == nil {
		d.Logger = slog.Default()
	}
	return d
}

// NewNotifier returns a notifier that sends through pool. It starts nothing; see
// [Notifier.Run].
func NewNotifier(pool *pgxpool.Pool, opts *WakeOptions) *Notifier {
	if pool == nil {
		panic("outboxpg: NewNotifier needs a pool")
	}
	return &Notifier{pool: pool, opts: opts.withDefaults(), dirty: make(chan struct{}, 1)}
}

// Notify asks for a notification soon. Call it after a transaction that has
// appended messages is committed. It never blocks.
func (n *Notifier) Notify() {
	select {
	case n.dirty <- struct{}{}:
	default:
	}
}

// Run sends notifications until ctx ends, and then returns nil.
func (n *Notifier) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.dirty:
		}
		if _, err := n.pool.Exec(ctx, "NOTIFY "+channel); err != nil && ctx.Err() == nil {
			n.opts.Logger.WarnContext(ctx, "outboxpg: notification not sent, relays will poll", "error", err)
		}
		pause(ctx, n.opts.Interval)
	}
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// Listen calls wake, such as the Wake method of a relay, for every notification
// until ctx ends, and then returns nil. It connects with dial and again whenever
// the connection fails; a connection through PgBouncer must be to a pool in
// session mode, or straight to the server.
func Listen(ctx context.Context, dial func(ctx context.Context) (*pgx.Conn, error), wake func(), opts *WakeOptions) error {
	o := opts.withDefaults()
	for attempt := 0; ; attempt++ {
		err := listen(ctx, dial, func() { attempt = 0; wake() })
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the error is that ctx has ended, as it should
		}
		o.Logger.WarnContext(ctx, "outboxpg: not listening, relays will poll", "error", err)
		pause(ctx, min(50*time.Millisecond<<min(attempt, 10), 5*time.Second))
	}
}

func listen(ctx context.Context, dial func(ctx context.Context) (*pgx.Conn, error), wake func()) error {
	conn, err := dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "LISTEN "+channel); err != nil {
		return err
	}
	wake() // for what was sent while nobody listened
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
