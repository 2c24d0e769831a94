package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/examples/internal/stack"
	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
	"github.com/ashlar-go/ashlar/examples/payments/migrations"
	"github.com/ashlar-go/ashlar/examples/payments/payment"
	"github.com/ashlar-go/ashlar/examples/payments/server"
)

// Everything waits shorter here than in earnest, so that a person can watch it.
const (
	gatewayTimeout = time.Second
	gatewayLate    = 1200 * time.Millisecond // when a late charge is made
	gatewayWindow  = 2 * time.Second         // longer than that
	reconcileEvery = 500 * time.Millisecond
)

// A world is all that runs: servers, gateway, and one instance of the service
// that can be killed and comes up again.
type world struct {
	stacks []*stack.Stack
	pool   *pgxpool.Pool // the demo's own, to watch with
	seeds  []string
	sim    *gatewaysim.Simulator
	simURL string
	url    string // of the payments service
	log    *slog.Logger
	close  []func()

	mu      sync.Mutex
	kills   []string // points at which requests are to kill the service, in this order
	crashes map[string]int
	dead    chan struct{} // signals that the instance was killed
}

// newWorld starts the servers. The caller calls down, also after an error.
func newWorld(ctx context.Context, progress io.Writer, log *slog.Logger) (*world, error) {
	w := &world{log: log, crashes: make(map[string]int), dead: make(chan struct{}, 1)}
	for _, o := range []*stack.Options{
		{Backends: []string{stack.Kafka}, Order: []stack.Provider{stack.Embedded}},
		{Backends: []string{stack.Postgres}, Order: []stack.Provider{stack.Local, stack.Embedded}},
	} {
		o.Private, o.Log = true, progress
		s, err := stack.Start(ctx, o)
		if err != nil {
			return w, err
		}
		w.stacks = append(w.stacks, s)
	}
	w.seeds = []string{w.stacks[0].Service(stack.Kafka).Address}
	var err error
	if w.pool, err = pgxpool.New(ctx, w.postgres()); err != nil {
		return w, err
	}
	w.close = append(w.close, w.pool.Close)
	if err := migrations.Up(ctx, w.pool); err != nil {
		return w, err
	}
	w.sim = gatewaysim.New(&gatewaysim.Options{Hang: 5 * time.Second, Late: gatewayLate, Latency: 2 * time.Millisecond})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return w, err
	}
	srv := &http.Server{Handler: w.sim, ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = srv.Serve(ln) }()
	w.close = append(w.close, func() { _ = srv.Close() })
	w.simURL = "http://" + ln.Addr().String()
	return w, nil
}

func (w *world) postgres() string { return w.stacks[1].Service(stack.Postgres).Address }

// down takes everything down. run must have returned.
func (w *world) down() error {
	for i := range w.close {
		w.close[len(w.close)-1-i]()
	}
	var errs []error
	for _, s := range w.stacks {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// run keeps an instance of the service up until ctx ends: whenever one is
// killed, the next one starts at the same address. started is called once the
// first one listens.
func (w *world) run(ctx context.Context, started func()) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	address := ln.Addr().String()
	w.url = "http://" + address
	started()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c := newCord()
		instance, stop := context.WithCancel(ctx)
		failed := make(chan error, 1)
		corded, err := c.listen(ln)
		if err != nil {
			stop()
			return err
		}
		s, err := server.New(w.config(c))
		if err != nil {
			stop()
			return errors.Join(err, ln.Close())
		}
		wg.Go(func() {
			failed <- s.Run(instance, corded)
			s.Close()
			c.pull()
		})
		select {
		case <-w.dead:
			stop() // what is left of it ends in the background
		case err := <-failed:
			stop()
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("the service ended: %w", err)
		case <-ctx.Done():
			stop()
			return <-failed
		}
		for {
			if ln, err = net.Listen("tcp", address); err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
}

func (w *world) config(c *cord) server.Config {
	return server.Config{
		PostgresURL: w.postgres(), KafkaSeeds: w.seeds, GatewayURL: w.simURL,
		Options: server.Options{
			GatewayTimeout: gatewayTimeout, LeaseTTL: time.Second, Instance: "demo", Dial: c.dial, Logger: w.log,
			Payment: payment.Options{
				Every: reconcileEvery, Window: gatewayWindow,
				At: func(point string) { w.reached(c, point) },
			},
		},
	}
}

// kill makes the next request that reaches point kill the service there, once
// the kills that were asked for before have happened.
func (w *world) kill(point string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kills = append(w.kills, point)
}

func (w *world) reached(c *cord, point string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.kills) == 0 || w.kills[0] != point || !c.pull() {
		return
	}
	w.kills = w.kills[1:]
	w.crashes[point]++
	w.dead <- struct{}{}
}

// crashCount returns how often the service was killed, by point.
func (w *world) crashCount() (total int, byPoint map[string]int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	byPoint = make(map[string]int, len(w.crashes))
	for point, n := range w.crashes {
		byPoint[point] = n
		total += n
	}
	return total, byPoint
}
