// Package stack starts the servers that the tests and the examples need, in the
// best way the machine offers, and takes them down again.
//
// For each backend there are four providers: an address from the environment, a
// container, a server binary on this machine, and one embedded in this process.
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
)

// A Provider is a way to get a server.
type Provider string

// The providers, in the order in which Start tries them by default.
const (
	Env      Provider = "env"
	Docker   Provider = "docker"
	Local    Provider = "local"
	Embedded Provider = "embedded"
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
	// Order in which providers are tried. Default: what ASHLAR_STACK names (docker,
	// local or embedded; with local, embedded follows for what has no binary),
	// else Env, Docker, Local, Embedded.
	Order []Provider
	// Log receives progress. Default: none.
	Log io.Writer
}

// A Service is a running server.
type Service struct {
	Name     string
	Version  string
	Provider Provider
	Address  string // a URL, or for Kafka host:port[,host:port]
	Real     bool   // the real server, not an embedded imitation

	stop    func() error
	restart func(ctx context.Context, immediate bool) error
}

// Restart stops the server and starts it again at the same address with the same
// data; immediate means without a clean shutdown, as a crash would. It works for
// servers started from a binary.
func (s *Service) Restart(ctx context.Context, immediate bool) error {
	if s.restart == nil {
		return fmt.Errorf("stack: %s from %s cannot be restarted: %w", s.Name, s.Provider, errors.ErrUnsupported)
	}
	return s.restart(ctx, immediate)
}

// A Stack is a set of running servers.
type Stack struct {
	services []*Service
	close    sync.Once
	err      error
}

// starter starts one backend. errUnavailable lets the next provider try.
type starter func(ctx context.Context, log func(string, ...any)) (*Service, error)

var errUnavailable = errors.New("not available here")

var starters = map[string]map[Provider]starter{
	Postgres: {Env: envPostgres, Docker: dockerPostgres, Local: localPostgres, Embedded: embeddedPostgres},
	Redis:    {Env: envRedis, Docker: dockerRedis, Local: localRedis, Embedded: embeddedRedis},
	Kafka:    {Env: envKafka, Docker: dockerKafka, Local: localKafka, Embedded: embeddedKafka},
}

func (o *Options) order() ([]Provider, error) {
	if o.Order != nil {
		return o.Order, nil
	}
	switch class := os.Getenv("ASHLAR_STACK"); class {
	case "":
		return []Provider{Env, Docker, Local, Embedded}, nil
	case "docker":
		return []Provider{Docker}, nil
	case "local":
		return []Provider{Local, Embedded}, nil
	case "embedded":
		return []Provider{Embedded}, nil
	default:
		return nil, fmt.Errorf("stack: ASHLAR_STACK is %q; use docker, local or embedded", class)
	}
}

// Start starts the backends side by side and returns when all are ready. If one
// fails, or ctx ends, what was started is taken down. The caller calls Close.
func Start(ctx context.Context, opts *Options) (*Stack, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Backends == nil {
		o.Backends = []string{Postgres, Redis, Kafka}
	}
	order, err := o.order()
	if err != nil {
		return nil, err
	}
	for _, name := range o.Backends {
		if starters[name] == nil {
			return nil, fmt.Errorf("stack: no backend %q; there are postgres, redis and kafka", name)
		}
	}
	var logging sync.Mutex
	logf := func(format string, args ...any) {
		if o.Log != nil {
			logging.Lock()
			defer logging.Unlock()
			fmt.Fprintf(o.Log, format+"\n", args...)
		}
	}
	s := &Stack{services: make([]*Service, len(o.Backends))}
	errs := make([]error, len(o.Backends))
	var wg sync.WaitGroup
	for i, name := range o.Backends {
		wg.Go(func() { s.services[i], errs[i] = startOne(ctx, name, order, logf) })
	}
	wg.Wait()
	s.services = slices.DeleteFunc(s.services, func(svc *Service) bool { return svc == nil })
	if err := errors.Join(errs...); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func startOne(ctx context.Context, name string, order []Provider, logf func(string, ...any)) (*Service, error) {
	var why []string
	for _, p := range order {
		svc, err := starters[name][p](ctx, logf)
		if err == nil {
			svc.Name, svc.Provider = name, p
			return svc, nil
		}
		if !errors.Is(err, errUnavailable) {
			return nil, fmt.Errorf("stack: %s by %s: %w", name, p, err)
		}
		why = append(why, fmt.Sprintf("%s: %v", p, err))
	}
	return nil, fmt.Errorf("stack: no way to start %s (%s)", name, strings.Join(why, "; "))
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
	names := map[string]string{Postgres: "TEST_POSTGRES_URL", Redis: "TEST_REDIS_URL", Kafka: "TEST_KAFKA_SEEDS"}
	var env []string
	for _, svc := range s.services {
		env = append(env, names[svc.Name]+"="+svc.Address)
		if svc.Real {
			env = append(env, "TEST_"+strings.ToUpper(svc.Name)+"_REAL=1")
		}
	}
	return env
}

// Describe writes a line for each server.
func (s *Stack) Describe(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, svc := range s.services {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", svc.Name, svc.Version, svc.Provider, svc.Address)
	}
	tw.Flush()
}

// Close takes the servers down and removes what they left. Servers from the
// environment go on.
func (s *Stack) Close() error {
	s.close.Do(func() {
		errs := make([]error, len(s.services))
		var wg sync.WaitGroup
		for i, svc := range s.services {
			if svc.stop != nil {
				wg.Go(func() { errs[i] = svc.stop() })
			}
		}
		wg.Wait()
		s.err = errors.Join(errs...)
	})
	return s.err
}
