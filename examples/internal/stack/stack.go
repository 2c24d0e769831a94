// Package stack starts the servers that the tests and the examples need, in the
// best way the machine offers, and takes them down again.
//
// For each backend there are four providers: an address from the environment, a
// container, a server binary on this machine, and one embedded in this process.
//
// Close leaves no process, container or folder behind. If the program ends
// without it, even by SIGKILL, a watchdog process does the same.
package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// A Provider is a way to get a server.
type Provider string

// The providers, in the order in which Start tries them by default.
const (
	Env      Provider = "env"      // TEST_POSTGRES_URL, TEST_REDIS_URL, TEST_KAFKA_SEEDS
	Docker   Provider = "docker"   // a container
	Local    Provider = "local"    // a binary of this machine
	Embedded Provider = "embedded" // miniredis, kfake; for Postgres a binary, fetched if there is none
)

// The names of the backends.
const (
	Postgres = "postgres"
	Redis    = "redis"
	Kafka    = "kafka"
)

// Options tunes [Start]. The zero value of each field means its default.
type Options struct {
	// Backends to start. Default: all.
	Backends []string
	// Order in which providers are tried. Default: Env, Docker, Local, Embedded.
	// ASHLAR_STACK=docker, local or embedded decides instead; with local,
	// embedded follows for what has no binary.
	Order []Provider
	// Private leaves out Env, for a caller that stops its servers. Default: false.
	Private bool
	// Timeout for a started server to answer. Default: 90 s.
	Timeout time.Duration
	// Log receives lines of progress. Default: none.
	Log io.Writer
}

// A Stack is a set of running servers.
type Stack struct {
	services []*Service
	run      *run
}

// run is what the providers share.
type run struct {
	dir     string // for everything that the servers write
	timeout time.Duration
	unwatch func()

	mu  sync.Mutex
	log io.Writer
}

func (r *run) logf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.log, format+"\n", args...)
}

// A starter starts one backend. It leaves nothing behind when it fails.
type starter func(ctx context.Context, r *run) (*Service, error)

// errUnavailable marks what the machine does not have, as opposed to a failure.
var errUnavailable = errors.New("not available here")

var starters = map[string]map[Provider]starter{
	Postgres: {Env: envPostgres, Docker: dockerPostgres, Local: localPostgres, Embedded: embeddedPostgres},
	Redis:    {Env: envRedis, Docker: dockerRedis, Local: localRedis, Embedded: embeddedRedis},
	Kafka:    {Env: envKafka, Docker: dockerKafka, Local: localKafka, Embedded: embeddedKafka},
}

// watchdog is a variable so that a test can do without.
var watchdog = startWatchdog

func (o *Options) order() ([]Provider, error) {
	order := o.Order
	if order == nil {
		order = []Provider{Env, Docker, Local, Embedded}
	}
	switch class := Provider(os.Getenv("ASHLAR_STACK")); class {
	case "":
	case Docker, Local, Embedded:
		order = []Provider{class}
		if class == Local {
			order = append(order, Embedded)
		}
		// testenv's addresses are of the chosen class already.
		if os.Getenv("ASHLAR_TESTENV") == "1" {
			order = append([]Provider{Env}, order...)
		}
	default:
		return nil, fmt.Errorf("stack: ASHLAR_STACK is %q; use docker, local or embedded", class)
	}
	return slices.DeleteFunc(slices.Clone(order), func(p Provider) bool { return p == Env && o.Private }), nil
}

// Start starts the backends side by side and returns when all are ready. If one
// fails, or ctx ends, what was started is taken down. The servers outlive ctx:
// the caller calls Close.
func Start(ctx context.Context, opts *Options) (*Stack, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Backends == nil {
		o.Backends = []string{Postgres, Redis, Kafka}
	}
	if o.Timeout <= 0 {
		o.Timeout = 90 * time.Second
	}
	if o.Log == nil {
		o.Log = io.Discard
	}
	order, err := o.order()
	if err != nil {
		return nil, err
	}
	for i, name := range o.Backends {
		if starters[name] == nil || slices.Contains(o.Backends[:i], name) {
			return nil, fmt.Errorf("stack: cannot start backend %q; there are postgres, redis and kafka, each once", name)
		}
	}
	r := &run{timeout: o.Timeout, log: o.Log}
	if r.dir, err = makeDir(); err != nil {
		return nil, err
	}
	if r.unwatch, err = watchdog(r.dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(r.dir))
	}

	s := &Stack{run: r, services: make([]*Service, len(o.Backends))}
	errs := make([]error, len(o.Backends))
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for i, name := range o.Backends {
		wg.Go(func() {
			if s.services[i], errs[i] = startOne(ctx, name, order, r); errs[i] != nil {
				cancel() // the others are of no use
			}
		})
	}
	wg.Wait()
	s.services = slices.DeleteFunc(s.services, func(svc *Service) bool { return svc == nil })
	for _, err := range errs {
		// Those that the first failure cancelled say nothing.
		if err != nil && !errors.Is(err, context.Canceled) {
			return nil, errors.Join(err, s.Close())
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func startOne(ctx context.Context, name string, order []Provider, r *run) (*Service, error) {
	var notes, why []string
	for _, p := range order {
		start := starters[name][p]
		if start == nil {
			return nil, fmt.Errorf("stack: no provider %q; there are env, docker, local and embedded", p)
		}
		svc, err := start(ctx, r)
		if err == nil {
			svc.Name, svc.Provider, svc.Note = name, p, strings.Join(notes, "; ")
			r.logf("%s: ready (%s)", name, p)
			return svc, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("stack: %s: %w", name, ctx.Err())
		}
		// An address that was given is meant: nothing else is started in its place.
		if p == Env && !errors.Is(err, errUnavailable) {
			return nil, fmt.Errorf("stack: %s: %w", name, err)
		}
		why = append(why, fmt.Sprintf("%s: %v", p, err))
		if p != Env {
			notes = append(notes, fmt.Sprintf("not %s: %s", p, brief(err)))
			if !errors.Is(err, errUnavailable) {
				r.logf("%s: failed as %s: %v", name, p, err)
			}
		}
	}
	return nil, fmt.Errorf("stack: no way to start %s\n  %s\ninstall it, start a Docker engine, or set %s to a running server",
		name, strings.Join(why, "\n  "), variables[name])
}

// brief shortens an error for a table; it has been logged whole.
func brief(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	line = strings.TrimSuffix(line, ": "+errUnavailable.Error())
	if r := []rune(line); len(r) > 72 {
		line = string(r[:72]) + "..."
	}
	return line
}

// Service returns the running server of that name, or nil.
func (s *Stack) Service(name string) *Service {
	for _, svc := range s.services {
		if svc.Name == name {
			return svc
		}
	}
	return nil
}

// Environ returns the variables by which tests find the servers.
func (s *Stack) Environ() []string {
	var env []string
	for _, svc := range s.services {
		env = append(env, variables[svc.Name]+"="+svc.Address)
		if svc.Real {
			env = append(env, "TEST_"+strings.ToUpper(svc.Name)+"_REAL=1")
		}
	}
	return env
}

// Describe writes a line for each server: what, version, provider, address, and
// why better providers were passed over.
func (s *Stack) Describe(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, svc := range s.services {
		note := ""
		if svc.Note != "" {
			note = "\t(" + svc.Note + ")"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s%s\n", svc.Name, svc.Version, svc.Provider, svc.Address, note)
	}
	tw.Flush()
}

// Close takes the servers down and removes what they left. Servers from the
// environment go on. It may be called again.
func (s *Stack) Close() error {
	errs := make([]error, len(s.services))
	var wg sync.WaitGroup
	for i, svc := range s.services {
		if svc.inst != nil {
			wg.Go(func() { errs[i] = svc.inst.close() })
		}
	}
	wg.Wait()
	// Without the folder the watchdog finds nothing to do.
	errs = append(errs, os.RemoveAll(s.run.dir))
	s.run.unwatch()
	return errors.Join(errs...)
}
