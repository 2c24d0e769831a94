// Command demo runs the reference services in one process, on servers that it
// starts by itself, and shows them on a page.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/ashlar-go/ashlar/examples/internal/app"
)

const usage = `demo runs the payments example with all that it needs, in one process: Postgres
(the binary of this machine, or one that is fetched), an embedded Kafka, a
simulated payment gateway. Nothing has to be installed or set up, and nothing is
left behind.

  go run ./examples/demo               a page to make payments on and watch them
  go run ./examples/demo --scenario    a scripted day: 1,000 payments with crashes,
                                       then a reconciliation of the three books;
                                       exit code 0 only if they are equal

Flags:
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "demo: stopped")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	port := flags.Int("port", 8080, "`port` of the page on 127.0.0.1; another one if it is taken")
	script := flags.Bool("scenario", false, "run the scripted day instead of the page")
	payments := flags.Int("payments", 1000, "with --scenario: `number` of payments")
	seed := flags.Uint64("seed", 1, "with --scenario: what decides the plan of the day")
	verbose := flags.Bool("v", false, "show the servers' progress and the service's log")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 || *payments < 1 || *port < 0 || *port > 65535 {
		return errors.New("wrong usage; see --help")
	}
	progress, level := io.Discard, slog.LevelError+1
	if *verbose {
		progress, level = stderr, slog.LevelInfo
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))

	slog.SetDefault(log) // for what is not given a logger

	begin := time.Now()
	w, err := newWorld(ctx, progress, log)
	defer func() {
		if down := w.down(); err == nil {
			err = down
		}
	}()
	if err != nil {
		return err
	}
	for _, s := range w.stacks {
		s.Describe(stderr)
	}

	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	started, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		if err := w.run(ctx, func() { close(started) }); err != nil {
			stop(err)
		}
	}()
	defer func() { <-ended }()
	defer stop(nil)
	select {
	case <-started:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if *script {
		fmt.Fprintf(stderr, "ready after %.1f s\n\n", time.Since(begin).Seconds())
		if err := w.play(ctx, stdout, isTerminal(stdout), *payments, *seed); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return err
		}
		return nil
	}
	ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(*port)))
	if err != nil {
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return err
		}
		fmt.Fprintf(stderr, "port %d is taken, so it is another one\n", *port)
	}
	events := newEvents(w.seeds, log)
	watching := make(chan struct{})
	go func() { defer close(watching); events.run(ctx) }()
	defer func() { <-watching }()
	defer stop(nil)
	fmt.Fprintf(stdout, "ready after %.1f s: http://%s\n(Ctrl-C ends it and leaves nothing behind)\n", time.Since(begin).Seconds(), ln.Addr())
	err = app.NewServer(w.handler(events), &app.ServerOptions{Logger: log, Drain: 2 * time.Second}).Run(ctx, ln)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// isTerminal reports whether w is one, on which a line can be written over.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
