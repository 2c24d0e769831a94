// Command payments takes payments: an HTTP API on Postgres, a payment gateway
// and Kafka. See README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
	"github.com/ashlar-go/ashlar/examples/payments/payment"
	"github.com/ashlar-go/ashlar/examples/payments/server"
)

const usage = `payments takes payments.

  go run ./examples/payments -postgres postgres://... -kafka host:port [flags]

Without -gateway it starts a simulator of one, whose book it serves at /book of
the address that it logs. To see it all with nothing to set up:
go run ./examples/demo.

Flags (and the variables that are their defaults):
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "payments:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) error {
	flags := flag.NewFlagSet("payments", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	or := func(name, fallback string) string {
		if v := getenv(name); v != "" {
			return v
		}
		return fallback
	}
	addr := flags.String("addr", or("PAYMENTS_ADDR", "127.0.0.1:8081"), "`address` to listen on (PAYMENTS_ADDR)")
	postgres := flags.String("postgres", getenv("PAYMENTS_POSTGRES_URL"), "`URL` of the database (PAYMENTS_POSTGRES_URL)")
	kafka := flags.String("kafka", getenv("PAYMENTS_KAFKA_SEEDS"), "comma-separated `brokers` (PAYMENTS_KAFKA_SEEDS)")
	gatewayURL := flags.String("gateway", getenv("PAYMENTS_GATEWAY_URL"), "`URL` of the gateway; empty means a simulator (PAYMENTS_GATEWAY_URL)")
	timeout := flags.Duration("gateway-timeout", 10*time.Second, "longest wait for the gateway")
	every := flags.Duration("reconcile", 5*time.Minute, "how often pending payments are verified")
	window := flags.Duration("gateway-window", 15*time.Minute, "how long the gateway may still act on a request")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *postgres == "" || *kafka == "" {
		return errors.New("-postgres and -kafka are required; see -help")
	}
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	if *gatewayURL == "" {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		sim := &http.Server{Handler: gatewaysim.New(nil), ReadHeaderTimeout: 5 * time.Second}
		go func() { _ = sim.Serve(ln) }()
		defer func() { _ = sim.Close() }()
		*gatewayURL = "http://" + ln.Addr().String()
		log.Info("simulated gateway", "url", *gatewayURL)
	}
	ln, err := net.Listen("tcp", *addr)
	if err != nil {
		return err
	}
	s, err := server.New(server.Config{
		PostgresURL: *postgres, KafkaSeeds: strings.Split(*kafka, ","), GatewayURL: *gatewayURL,
		Options: server.Options{
			GatewayTimeout: *timeout, Logger: log,
			Payment: payment.Options{Every: *every, Window: *window},
		},
	})
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	defer s.Close()
	log.Info("listening", "address", ln.Addr().String())
	return s.Run(ctx, ln)
}
