// Package crashtest runs the test binary as a child process that stops at named
// points, where its parent kills or pauses it.
package crashtest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const env = "ASHLAR_CRASH_CHILD"

// A Plan tells a child what to do.
type Plan struct {
	Mode       string // how it works
	Backend    string // what it works on
	Point      string // where it stops; empty means nowhere, Anywhere that it does not stop
	After      int    // how often it passes the point first
	From, To   int    // its keys
	Duplicates int    // of each key at once
}

// Anywhere is the point of a child that is killed while it goes on.
const Anywhere = "anywhere"

// A Child is the child's side.
type Child struct {
	Plan
	passed atomic.Int64
	mu     sync.Mutex
}

// Current returns the plan of this process, or skips the test if it is no child.
func Current(t *testing.T) *Child {
	t.Helper()
	text := os.Getenv(env)
	if text == "" {
		t.Skip("runs as a child of the crash test")
	}
	c := &Child{}
	if err := json.Unmarshal([]byte(text), &c.Plan); err != nil {
		t.Fatal(err)
	}
	return c
}

// At is called at a named point. If it is the one of the plan, the parent is
// told and the caller stops until the process is killed, or continued.
func (c *Child) At(point, key string) {
	if c.Point == Anywhere {
		if c.passed.Add(1) == 1 {
			c.Report("at %s", key)
		}
		return
	}
	if point != c.Point || c.passed.Add(1) != int64(c.After)+1 {
		return
	}
	c.Report("at %s", key)
	if strings.HasPrefix(c.Mode, "pause") {
		// The parent stops the process somewhere in here and lets it go on later.
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		return
	}
	select {}
}

// Report tells the parent something, in one line.
func (c *Child) Report(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Fprintf(os.Stdout, "\n## "+format+"\n", args...)
}

// A Process is the parent's side of a child.
type Process struct {
	Plan
	// Lines are what the child reports; closed when its output ends.
	Lines chan string
	cmd   *exec.Cmd
	stdin io.Writer
	t     *testing.T
}

// Start runs the named test of this binary in a child.
func Start(t *testing.T, test string, plan Plan) *Process {
	t.Helper()
	text, err := json.Marshal(plan)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+test+"$", "-test.v", "-test.timeout=30m")
	cmd.Env = append(os.Environ(), env+"="+string(text))
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &Process{Plan: plan, Lines: make(chan string, 1000), cmd: cmd, stdin: stdin, t: t}
	go func() {
		defer close(p.Lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			if line, ok := strings.CutPrefix(s.Text(), "## "); ok {
				p.Lines <- line
			} else if strings.Contains(s.Text(), "_test.go:") {
				p.Lines <- "failed " + s.Text()
			}
		}
	}()
	return p
}

// Signal sends the child a signal.
func (p *Process) Signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatalf("signal %v: %v", sig, err)
	}
}

// Continue lets a child that was paused go on.
func (p *Process) Continue() {
	p.t.Helper()
	p.Signal(syscall.SIGCONT)
	if _, err := p.stdin.Write([]byte("\n")); err != nil {
		p.t.Fatal(err)
	}
}

// Kill kills the child and fails the test unless that is what ended it.
func (p *Process) Kill() {
	p.t.Helper()
	p.Signal(syscall.SIGKILL)
	if sig := p.wait(); sig != syscall.SIGKILL {
		p.t.Fatalf("the child ended by signal %d, not by SIGKILL: the kill did not land", sig)
	}
}

// Wait waits for a child that ends by itself and reports whether it succeeded.
func (p *Process) Wait() bool {
	p.t.Helper()
	return p.wait() == 0 && p.cmd.ProcessState.Success()
}

func (p *Process) wait() syscall.Signal {
	for line := range p.Lines {
		if strings.HasPrefix(line, "failed ") {
			p.t.Log(line)
		}
	}
	_ = p.cmd.Wait() // its state tells
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
		return status.Signal()
	}
	return 0
}

// A Storm starts children that overlap on their keys and kills each at its
// point, until at least so many kills have landed. Some children find all their
// keys done before they reach their point; they end by themselves.
type Storm struct {
	Test      string   // the child's
	Plan      Plan     // of every child; Point, After, From and To are set by Run
	Points    []string // taken in turn
	Kills     int
	Processes int // at once
	Window    int // keys of one child
}

// Run returns how many keys were used, which kills landed at which point, and on
// which keys.
func (s Storm) Run(t *testing.T) (keys int, landed map[string]int, at map[string][]string) {
	t.Helper()
	landed, at = make(map[string]int), make(map[string][]string)
	type event struct {
		p    *Process
		line string // empty: the child has ended
	}
	// Whoever stops is dealt with first: others may wait for the key it holds.
	events := make(chan event, s.Processes)
	running := make(map[*Process]bool)
	defer func() {
		for p := range running {
			_ = p.cmd.Process.Kill() // the test has failed already
			_ = p.cmd.Wait()
		}
	}()
	for started, kills := 0, 0; kills < s.Kills || len(running) > 0; {
		for kills < s.Kills && len(running) < s.Processes {
			plan := s.Plan
			plan.Point = s.Points[started%len(s.Points)]
			plan.After = rand.N(s.Window / 4)
			plan.From = started * s.Window / (2 * s.Processes) // several work on each key
			plan.To = plan.From + s.Window
			keys = max(keys, plan.To)
			started++
			p := Start(t, s.Test, plan)
			running[p] = true
			go func() {
				for line := range p.Lines {
					if strings.HasPrefix(line, "at ") {
						events <- event{p, line}
						return
					}
					t.Log(line)
				}
				events <- event{p, ""}
			}()
		}
		e := <-events
		delete(running, e.p)
		if e.line == "" {
			if !e.p.Wait() {
				t.Errorf("the child for %+v failed", e.p.Plan)
				return keys, landed, at
			}
			continue
		}
		if e.p.Point == Anywhere {
			time.Sleep(rand.N(20 * time.Millisecond))
			if e.p.Signal(syscall.SIGKILL); e.p.wait() != syscall.SIGKILL {
				continue // it was done before
			}
		} else {
			e.p.Kill()
		}
		kills++
		landed[e.p.Point]++
		at[e.p.Point] = append(at[e.p.Point], strings.TrimPrefix(e.line, "at "))
	}
	return keys, landed, at
}

// Sweep runs all keys to their end, in several processes at once.
func (s Storm) Sweep(t *testing.T, keys int) {
	t.Helper()
	plan := s.Plan
	plan.To = keys
	var running []*Process
	for range s.Processes {
		running = append(running, Start(t, s.Test, plan))
	}
	for _, p := range running {
		if !p.Wait() {
			t.Error("a child that was not killed failed")
		}
	}
}
