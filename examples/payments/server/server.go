// Package server wires the payments example together: the HTTP API, the
// reconciler, the relay from the outbox to Kafka, and the order consumer.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/examples/internal/app"
	"github.com/ashlar-go/ashlar/examples/payments/gateway"
	"github.com/ashlar-go/ashlar/examples/payments/migrations"
	"github.com/ashlar-go/ashlar/examples/payments/order"
	"github.com/ashlar-go/ashlar/examples/payments/payment"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxkafka"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// Config is what a [Server] needs.
type Config struct {
	PostgresURL string
	KafkaSeeds  []string
	GatewayURL  string

	Options
}

// Options tunes a [Server]. The zero value of each field means its default.
type Options struct {
	// GatewayTimeout bounds a call of the gateway. Default 10 s.
	GatewayTimeout time.Duration
	// Group of the order consumer. Default "orders".
	Group string
	// Instance names this one among those of the group, in all its lives: after
	// a crash it takes up its partitions at once. Default: none, and others take
	// them up when the session of the dead one has ended, after 6 s.
	Instance string
	// LeaseTTL is how long the lanes of a dead relay stay with it. Default 10 s.
	LeaseTTL time.Duration
	// Dial opens the connections to Postgres, Kafka and the gateway. Default: a
	// net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Payment tunes the payment service. Its Topic is also the consumer's.
	Payment payment.Options
	// Logger is everybody's. Default slog.Default().
	Logger *slog.Logger
}

// A Server is one instance of the example. Any number may run side by side.
type Server struct {
	cfg   Config
	pool  *pgxpool.Pool
	wake  *pgx.ConnConfig
	kafka *kgo.Client // produces
	group *kgo.Client // consumes
	http  http.RoundTripper
}

// New returns a server. It dials nothing; see [Server.Run].
func New(cfg Config) (*Server, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Group == "" {
		cfg.Group = "orders"
	}
	if cfg.Payment.Topic == "" {
		cfg.Payment.Topic = "payment.events"
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	}
	cfg.Payment.Logger = cfg.Logger

	pc, err := pgxpool.ParseConfig(cfg.PostgresURL)
	if err != nil {
		return nil, errors.New("server: the Postgres URL cannot be parsed") // pgx's text may hold the password
	}
	pc.ConnConfig.DialFunc = cfg.Dial
	pc.MaxConns = max(pc.MaxConns, 16)
	s := &Server{cfg: cfg, wake: pc.ConnConfig.Copy()}
	if s.pool, err = pgxpool.NewWithConfig(context.Background(), pc); err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	common := []kgo.Opt{kgo.SeedBrokers(cfg.KafkaSeeds...), kgo.Dialer(cfg.Dial), kgo.AllowAutoTopicCreation()}
	if s.kafka, err = kgo.NewClient(common...); err != nil {
		s.pool.Close()
		return nil, fmt.Errorf("server: %w", err)
	}
	if cfg.Instance != "" {
		common = append(common, kgo.InstanceID(cfg.Instance))
	}
	if s.group, err = kgo.NewClient(append(common,
		kgo.ConsumerGroup(cfg.Group), kgo.ConsumeTopics(cfg.Payment.Topic),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.DisableAutoCommit(), kgo.BlockRebalanceOnPoll(),
		kgo.SessionTimeout(6*time.Second), kgo.RebalanceTimeout(10*time.Second), kgo.MetadataMinAge(100*time.Millisecond), kgo.MetadataMaxAge(10*time.Second))...); err != nil {
		s.pool.Close()
		s.kafka.Close()
		return nil, fmt.Errorf("server: %w", err)
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext, t.Proxy, t.MaxIdleConnsPerHost = cfg.Dial, nil, 64
	s.http = t
	return s, nil
}

// Close ends what the server has opened. Run must have returned.
func (s *Server) Close() {
	s.group.CloseAllowingRebalance()
	s.kafka.Close()
	s.pool.Close()
	s.http.(*http.Transport).CloseIdleConnections()
}

// Run brings the tables up to date and serves on ln, which it closes, until ctx
// ends. Requests in flight are finished first, and what they wrote to the outbox
// is handed on by the next instance if the relay has no time to.
func (s *Server) Run(ctx context.Context, ln net.Listener) error {
	defer ln.Close()
	if err := migrations.Up(ctx, s.pool); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	relay := outbox.NewRelay(outboxpg.New(s.pool, nil), outboxkafka.New(s.kafka),
		&outbox.RelayOptions{LeaseTTL: s.cfg.LeaseTTL, Logger: s.cfg.Logger})
	notifier := outboxpg.NewNotifier(s.pool, &outboxpg.WakeOptions{Logger: s.cfg.Logger})
	opts := s.cfg.Payment
	opts.Notify = func() { relay.Wake(); notifier.Notify() }
	gw := gateway.New(s.cfg.GatewayURL, &gateway.Options{Timeout: s.cfg.GatewayTimeout, Transport: s.http})
	payments := payment.New(s.pool, gw, &opts)
	orders := order.New(s.pool, s.group, &order.Options{Logger: s.cfg.Logger})
	web := app.NewServer(payments.Handler(), &app.ServerOptions{Ready: s.pool.Ping, Logger: s.cfg.Logger})

	// The workers end after the last request, whose events they hand on.
	workers, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	serving, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{
		relay.Run, notifier.Run, payments.Run, orders.Run,
		func(ctx context.Context) error {
			return outboxpg.Listen(ctx, func(ctx context.Context) (*pgx.Conn, error) { return pgx.ConnectConfig(ctx, s.wake.Copy()) }, relay.Wake,
				&outboxpg.WakeOptions{Logger: s.cfg.Logger})
		},
	} {
		wg.Go(func() {
			if err := run(workers); err != nil {
				fail(err)
			}
		})
	}
	err := web.Run(serving, ln)
	stop()
	wg.Wait()
	if cause := context.Cause(serving); cause != nil && ctx.Err() == nil {
		err = errors.Join(err, cause)
	}
	return err
}
