// Command testenv starts the servers that tests need, runs a command with their
// addresses in its environment, and takes them down.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ashlar-go/ashlar/examples/internal/stack"
)

const usage = `testenv starts Postgres, Redis and Kafka, runs a command and takes them down.

  go run ./examples/testenv [flags] -- command [arguments]
  go run ./examples/testenv -- go test ./... ./examples/...
  go run ./examples/testenv -- $SHELL

The command finds the addresses in TEST_POSTGRES_URL, TEST_REDIS_URL and
TEST_KAFKA_SEEDS; TEST_REDIS_REAL=1 and TEST_KAFKA_REAL=1 say that a server is
the real program and not an imitation.

Each server is the first of these that the machine has: an address that is set
already, a container, a binary, an embedded server. ASHLAR_IMAGE_POSTGRES,
ASHLAR_IMAGE_REDIS and ASHLAR_IMAGE_KAFKA name other images.

The exit code is the command's, 128+n if signal n ended it, 127 if it cannot be
run, 1 if a server cannot be started, 2 for wrong usage. (go run makes 1 of all.)

Flags:
`

func main() {
	// Before anything is started: from here no signal ends this process without
	// the servers being taken down.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	os.Exit(run(os.Args[1:], signals, os.Stderr))
}

func run(args []string, signals <-chan os.Signal, stderr io.Writer) int {
	flags := flag.NewFlagSet("testenv", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	class := flags.String("stack", os.Getenv("ASHLAR_STACK"), "only `class` docker, local or embedded; with local,\nwhat has no binary is embedded (also ASHLAR_STACK)")
	only := flags.String("only", "", "start only these, comma-separated `names`: postgres, redis, kafka")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if flags.NArg() == 0 {
		fmt.Fprintln(stderr, "testenv: no command; for example: go run ./examples/testenv -- go test ./...\nFor a shell: go run ./examples/testenv -- $SHELL. For more: --help.")
		return 2
	}
	os.Setenv("ASHLAR_STACK", *class)
	opts := &stack.Options{Log: prefixed{stderr}}
	if *only != "" {
		opts.Backends = strings.Split(strings.ReplaceAll(*only, " ", ""), ",")
	}

	begin := time.Now()
	s, sig, err := start(opts, signals)
	if sig != 0 {
		fmt.Fprintln(stderr, "testenv: stopped:", sig)
		return 128 + int(sig)
	}
	if err != nil {
		fmt.Fprintln(stderr, "testenv:", err)
		return 1
	}
	s.Describe(stderr)
	fmt.Fprintf(stderr, "testenv: ready after %.1f s\n", time.Since(begin).Seconds())
	code := execute(flags.Args(), environ(os.Environ(), s.Environ()), signals, stderr)
	if err := s.Close(); err != nil {
		fmt.Fprintln(stderr, "testenv: clean up:", err)
		code = max(code, 1)
	}
	return code
}

// start starts the servers. A signal ends that, and is returned.
func start(opts *stack.Options, signals <-chan os.Signal) (*stack.Stack, syscall.Signal, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	started, watched := make(chan struct{}), make(chan syscall.Signal)
	go func() {
		select {
		case sig := <-signals:
			cancel()
			watched <- sig.(syscall.Signal)
		case <-started:
			watched <- 0
		}
	}()
	s, err := stack.Start(ctx, opts)
	close(started)
	sig := <-watched
	if sig != 0 && err == nil {
		err = s.Close()
	}
	return s, sig, err
}

// environ adds the servers to a command's environment. What tells of others is
// left out, and what stack.Start would start there is what runs already.
func environ(base, servers []string) []string {
	env := slices.DeleteFunc(slices.Clone(base), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		return strings.HasPrefix(name, "TEST_") && strings.HasSuffix(name, "_REAL")
	})
	return append(append(env, servers...), "ASHLAR_TESTENV=1")
}

// execute runs the command to its end, passing signals on.
func execute(args, env []string, signals <-chan os.Signal, stderr io.Writer) int {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = env
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(stderr, "testenv:", err)
		return 127
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for received := 0; ; {
		select {
		case sig := <-signals:
			received++
			switch {
			case received > 2:
				_ = cmd.Process.Kill() // it was asked twice
			case sig == os.Interrupt && inForeground():
				// Ctrl-C: the terminal has told the command.
			default:
				_ = cmd.Process.Signal(sig) // it may have exited just now
			}
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
				fmt.Fprintln(stderr, "testenv:", err)
				return 1
			}
		}
	}
}

// prefixed marks lines of progress.
type prefixed struct{ w io.Writer }

func (p prefixed) Write(line []byte) (int, error) {
	if _, err := p.w.Write(append([]byte("testenv: "), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}
