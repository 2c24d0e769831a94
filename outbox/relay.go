package outbox

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/internal/ids"
)

// RelayOptions tunes a [Relay]. The zero value of each field means its default.
type RelayOptions struct {
	// BatchSize is how many messages are published at once. Default 2048.
	// Memory is bounded by two batches.
	BatchSize int
	// Poll is the longest wait between two looks for messages when there were
	// none; it starts at 1 ms and doubles. Default 50 ms. See [Relay.Wake].
	Poll time.Duration
	// LeaseTTL is how long the lanes of a dead relay stay with it. Default 10 s.
	LeaseTTL time.Duration
	// PublishTimeout bounds one call of the Publisher. Default 10 s.
	PublishTimeout time.Duration
	// MaxAttempts is how many failures of its own send a message to the dead
	// letters. Failures of the whole broker do not count. Default 16, which with
	// the default waits takes about half an hour.
	MaxAttempts int
	// RetryBase and RetryMax bound the waits between the attempts of one
	// message: exponential with full jitter. Defaults 250 ms and 10 min.
	RetryBase, RetryMax time.Duration
	// DrainTimeout bounds how long Run goes on after its context has ended, so
	// that what was published is also recorded. Default 5 s.
	DrainTimeout time.Duration
	// Logger reports failures. Default slog.Default().
	Logger *slog.Logger
	// Observer is told what happens.
	Observer Observer
}

// An Observer is a set of callbacks, each of which may be nil. They run in the
// relay's loop and must not block.
type Observer struct {
	// Delivered is told of every publish that got something through.
	Delivered func(ctx context.Context, recs []Record, took time.Duration)
	// Failed is told of a failure charged to a message; dead means that it went
	// to the dead letters.
	Failed func(ctx context.Context, rec Record, err error, dead bool)
	// Outage is told of a publish that got nothing through and will be repeated.
	Outage func(ctx context.Context, recs []Record, err error)
	// Lanes is told how many lanes the relay holds when that changes.
	Lanes func(held int)
}

// A Relay moves messages from a [Store] to a [Publisher].
type Relay struct {
	store Store
	pub   Publisher
	opts  RelayOptions
	wake  chan struct{}
}

// NewRelay returns a relay between store and pub. It starts nothing; see
// [Relay.Run].
func NewRelay(store Store, pub Publisher, opts *RelayOptions) *Relay {
	if store == nil || pub == nil {
		panic("outbox: NewRelay needs a store and a publisher")
	}
	var o RelayOptions
	if opts != nil {
		o = *opts
	}
	setDefault(&o.BatchSize, 2048)
	setDefault(&o.Poll, 50*time.Millisecond)
	setDefault(&o.LeaseTTL, 10*time.Second)
	setDefault(&o.PublishTimeout, 10*time.Second)
	setDefault(&o.MaxAttempts, 16)
	setDefault(&o.RetryBase, 250*time.Millisecond)
	setDefault(&o.RetryMax, 10*time.Minute)
	setDefault(&o.DrainTimeout, 5*time.Second)
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return &Relay{store: store, pub: pub, opts: o, wake: make(chan struct{}, 1)}
}

func setDefault[T int | time.Duration](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}

// Wake makes the relay look for messages now instead of at its next poll. It
// never blocks and may be called from anywhere, as often as one likes; a wake-up
// that is lost costs at most one poll interval.
func (r *Relay) Wake() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run delivers messages until ctx ends, then finishes the batch in flight,
// records its outcome, gives its lanes up and returns nil. It retries errors of
// the store and the broker; the one it returns is [ErrNotMigrated].
//
// Each call is a relay of its own: it may run in many processes, and many times
// in one. If the process is killed, another relay takes the lanes over when the
// lease ends and repeats at most two batches of each.
func (r *Relay) Run(ctx context.Context) error {
	k := &keeper{
		store: r.store, relay: ids.New(), ttl: r.opts.LeaseTTL, log: r.opts.Logger,
		changed: make(chan struct{}, 1), kick: make(chan struct{}, 1),
	}
	if err := k.beat(ctx); errors.Is(err, ErrNotMigrated) {
		return err
	}
	var wg sync.WaitGroup
	helpers, stop := context.WithCancel(context.WithoutCancel(ctx))
	wg.Go(func() { k.run(helpers) })
	wg.Go(func() { r.maintain(helpers) })

	l := &loop{r: r, keeper: k}
	l.run(ctx)
	stop()
	wg.Wait()
	k.leave(ctx, r.opts.DrainTimeout)
	return nil
}

func (r *Relay) maintain(ctx context.Context) {
	failures := 0
	for {
		wait := 200 * time.Millisecond
		if err := r.store.Maintain(ctx); err != nil && ctx.Err() == nil {
			wait += backoff.Policy{Base: wait}.Next(failures)
			failures++
			r.opts.Logger.WarnContext(ctx, "outbox: maintenance failed", "error", err)
		} else {
			failures = 0
		}
		if backoff.Sleep(ctx, wait) != nil {
			return
		}
	}
}
