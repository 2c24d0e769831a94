package outboxpg

import (
	"context"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/internal/pglisten"
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
		_ = backoff.Sleep(ctx, n.opts.Interval) // the loop sees that ctx has ended
	}
}

// Listen calls wake, such as the Wake method of a relay, for every notification
// until ctx ends, and then returns nil. It connects with dial and again whenever
// the connection fails; a connection through PgBouncer must be to a pool in
// session mode, or straight to the server.
func Listen(ctx context.Context, dial func(ctx context.Context) (*pgx.Conn, error), wake func(), opts *WakeOptions) error {
	return pglisten.Listen(ctx, dial, channel, wake, opts.withDefaults().Logger, "outboxpg: not listening, relays will poll")
}
