package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
)

func listen(t *testing.T, port int) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", hostPort(port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestOrder(t *testing.T) {
	tests := []struct {
		name    string
		class   string
		testenv string
		opts    Options
		want    []Provider
	}{
		{"default", "", "", Options{}, []Provider{Env, Docker, Local, Embedded}},
		{"private", "", "1", Options{Private: true}, []Provider{Docker, Local, Embedded}},
		{"chosen by the program", "", "", Options{Order: []Provider{Env, Local, Embedded}}, []Provider{Env, Local, Embedded}},
		{"docker", "docker", "", Options{}, []Provider{Docker}},
		{"local", "local", "", Options{}, []Provider{Local, Embedded}},
		{"embedded beats the program", "embedded", "", Options{Order: []Provider{Local, Docker}}, []Provider{Embedded}},
		{"under testenv", "docker", "1", Options{}, []Provider{Env, Docker}},
		{"private under testenv", "embedded", "1", Options{Private: true}, []Provider{Embedded}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("ASHLAR_STACK", tt.class)
			t.Setenv("ASHLAR_TESTENV", tt.testenv)
			before := slices.Clone(tt.opts.Order)
			got, err := tt.opts.order()
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("got %v, %v, want %v", got, err, tt.want)
			}
			if !slices.Equal(tt.opts.Order, before) {
				t.Errorf("the caller's order became %v", tt.opts.Order)
			}
		})
	}
}

func TestWrongChoices(t *testing.T) {
	tests := []struct {
		name, class string
		opts        Options
		want        string
	}{
		{"class", "podman", Options{}, `ASHLAR_STACK is "podman"; use docker, local or embedded`},
		{"backend", "", Options{Backends: []string{"mysql"}}, `cannot start backend "mysql"; there are postgres, redis and kafka`},
		{"twice", "", Options{Backends: []string{Redis, Redis}}, `cannot start backend "redis"`},
		{"provider", "", Options{Backends: []string{Redis}, Order: []Provider{"cloud"}}, `no provider "cloud"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("ASHLAR_STACK", tt.class)
			s, err := Start(t.Context(), &tt.opts)
			if err == nil {
				s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
}

// A provider that fails, by absence or by an error of its own, passes the backend
// on to the next one; the line that is printed says so.
func TestFallback(t *testing.T) {
	broken := errors.New("the image cannot be downloaded")
	for _, why := range []error{errUnavailable, broken} {
		t.Setenv("ASHLAR_STACK", "")
		replace(t, Redis, Docker, func(context.Context, *run) (*Service, error) { return nil, fmt.Errorf("image x: %w", why) })
		s, err := Start(t.Context(), &Options{Backends: []string{Redis}, Order: []Provider{Docker, Embedded}})
		if err != nil {
			t.Fatal(err)
		}
		svc := s.Service(Redis)
		if svc.Provider != Embedded || !strings.Contains(svc.Note, "not docker: image x") {
			t.Errorf("got %s with note %q", svc.Provider, svc.Note)
		}
		var line strings.Builder
		s.Describe(&line)
		for _, want := range []string{"redis", "miniredis", "embedded", svc.Address, "not docker: image x"} {
			if !strings.Contains(line.String(), want) {
				t.Errorf("the line %q lacks %q", line.String(), want)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestBrief(t *testing.T) {
	for in, want := range map[string]string{
		"short":                           "short",
		"none: " + errUnavailable.Error(): "none",
		"first\nsecond":                   "first",
		strings.Repeat("\u00e9", 80) + "\nsecond": strings.Repeat("\u00e9", 72) + "...",
	} {
		if got := brief(errors.New(in)); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}

// A chosen class does not fall back, and the error names every way out.
func TestNoFallbackFromAChosenClass(t *testing.T) {
	t.Setenv("ASHLAR_STACK", "docker")
	replace(t, Redis, Docker, func(context.Context, *run) (*Service, error) {
		return nil, fmt.Errorf("no Docker engine answers: %w", errUnavailable)
	})
	s, err := Start(t.Context(), &Options{Backends: []string{Redis}, Private: true})
	if err == nil {
		s.Close()
		t.Fatal("it started")
	}
	for _, want := range []string{"redis", "no Docker engine answers", "TEST_REDIS_URL"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error %q lacks %q", err, want)
		}
	}
}

// One backend that cannot be had takes the others down.
func TestFailureTakesAllDown(t *testing.T) {
	t.Setenv("ASHLAR_STACK", "embedded")
	var dir string
	replace(t, Kafka, Embedded, func(_ context.Context, r *run) (*Service, error) {
		dir = r.dir
		return nil, errors.New("planted")
	})
	if _, err := Start(t.Context(), &Options{Private: true}); err == nil || !strings.Contains(err.Error(), "planted") {
		t.Fatalf("got %v", err)
	}
	if left := leftovers(dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func replace(t *testing.T, name string, p Provider, s starter) {
	t.Helper()
	old := starters[name][p]
	starters[name][p] = s
	t.Cleanup(func() { starters[name][p] = old })
}
