// Command testenv starts the servers that tests need, runs a command with their
// addresses in its environment, and takes them down.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/ashlar-go/ashlar/examples/internal/stack"
)

const usage = `testenv starts Postgres, Redis and Kafka, runs a command and takes them down.

Usage: go run ./examples/testenv [flags] -- command [arguments]

It tries, for each server: the address in the environment (TEST_POSTGRES_URL,
TEST_REDIS_URL, TEST_KAFKA_SEEDS), a container, a binary on this machine, and one
embedded in this process. The command finds the addresses in those variables.
Its exit code is passed on.

Flags:
`

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	flags := flag.NewFlagSet("testenv", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	class := flags.String("stack", os.Getenv("ASHLAR_STACK"), "only `class` docker, local or embedded (also ASHLAR_STACK)")
	only := flags.String("only", "", "start only these, comma-separated `names`: postgres, redis, kafka")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if flags.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "testenv: no command; for example: go run ./examples/testenv -- go test ./...")
		return 2
	}
	os.Setenv("ASHLAR_STACK", *class)
	opts := &stack.Options{Log: os.Stderr}
	if *only != "" {
		opts.Backends = strings.Split(*only, ",")
	}

	// The signals end the start of the servers, and are passed on to the command;
	// the servers are taken down in any case.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	interrupted := make(chan os.Signal, 1)
	started := make(chan struct{})
	go func() {
		select {
		case sig := <-signals:
			interrupted <- sig
			cancel()
		case <-started:
		}
	}()
	begin := time.Now()
	s, err := stack.Start(ctx, opts)
	close(started)
	if err != nil {
		select {
		case sig := <-interrupted:
			return 128 + int(sig.(syscall.Signal))
		default:
		}
		fmt.Fprintln(os.Stderr, "testenv:", err)
		return 1
	}
	defer func() {
		if err := s.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "testenv: clean up:", err)
		}
	}()
	s.Describe(os.Stderr)
	fmt.Fprintf(os.Stderr, "testenv: ready after %.1f s\n", time.Since(begin).Seconds())
	return execute(flags.Args(), s.Environ(), signals)
}

// execute runs the command to its end, passing signals on.
func execute(args, env []string, signals <-chan os.Signal) int {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), env...)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "testenv:", err)
		return 127
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case sig := <-signals:
			_ = cmd.Process.Signal(sig) // it may have exited just now
		case err := <-done:
			var exit *exec.ExitError
			switch {
			case err == nil:
				return 0
			case errors.As(err, &exit):
				if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
					return 128 + int(ws.Signal())
				}
				return exit.ExitCode()
			default:
				fmt.Fprintln(os.Stderr, "testenv:", err)
				return 1
			}
		}
	}
}
