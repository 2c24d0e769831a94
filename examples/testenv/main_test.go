package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The test binary is testenv itself, and the command that it runs.
func TestMain(m *testing.M) {
	switch os.Getenv("TESTENV_TEST") {
	case "testenv":
		_ = os.Unsetenv("TESTENV_TEST")
		main()
	case "":
		os.Exit(m.Run())
	}
}

// testenv runs the program with servers that start quickly, and a folder for
// temporary files in which nothing may stay.
func testenv(t *testing.T, args ...string) (cmd *exec.Cmd, stderr *bytes.Buffer) {
	t.Helper()
	// Not t.TempDir: servers that run under another account must reach it.
	dir, err := os.MkdirTemp("", "testenv-test-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	stderr = &bytes.Buffer{}
	cmd = exec.Command(os.Args[0], args...)
	cmd.Stderr = stderr
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "TEST_") || strings.HasPrefix(kv, "ASHLAR_")
	}), "TESTENV_TEST=testenv", "TMPDIR="+dir, "ASHLAR_STACK=embedded")
	t.Cleanup(func() {
		if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
		os.RemoveAll(dir)
	})
	return cmd, stderr
}

func code(t *testing.T, err error) int {
	t.Helper()
	if err == nil {
		return 0
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return exit.ExitCode()
}

func TestExitCode(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want int
		says string
	}{
		{"success", []string{"--only", "redis", "--", "true"}, 0, "miniredis"},
		{"of the command", []string{"--only=redis,kafka", "sh", "-c", "exit 42"}, 42, "kfake"},
		{"of a signal", []string{"--only", "redis", "--", "sh", "-c", "kill -KILL $$"}, 128 + 9, ""},
		{"no such command", []string{"--only", "redis", "--", "no-such-command"}, 127, "no-such-command"},
		{"no command", nil, 2, "-- $SHELL"},
		{"help", []string{"--help"}, 0, "TEST_KAFKA_SEEDS"},
		{"unknown flag", []string{"--postgres"}, 2, "-only"},
		{"unknown class", []string{"--stack", "podman", "--", "true"}, 1, "use docker, local or embedded"},
		{"unknown server", []string{"--only", "mysql", "--", "true"}, 1, "postgres, redis and kafka"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd, stderr := testenv(t, tt.args...)
			if got := code(t, cmd.Run()); got != tt.want {
				t.Errorf("exit code %d, want %d\n%s", got, tt.want, stderr)
			}
			if !strings.Contains(stderr.String(), tt.says) {
				t.Errorf("it does not say %q:\n%s", tt.says, stderr)
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	cmd, stderr := testenv(t, "--", "env")
	cmd.Env = append(cmd.Env, "TEST_KAFKA_REAL=1", "TEST_REDIS_URL=redis://elsewhere", "OTHER=kept")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	env := map[string]string{}
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		env[key] = value
	}
	for key, prefix := range map[string]string{
		"TEST_POSTGRES_URL": "postgres://postgres@127.0.0.1:", "TEST_REDIS_URL": "redis://127.0.0.1:",
		"TEST_KAFKA_SEEDS": "127.0.0.1:", "OTHER": "kept", "ASHLAR_TESTENV": "1", "TEST_POSTGRES_REAL": "1",
	} {
		if !strings.HasPrefix(env[key], prefix) {
			t.Errorf("%s=%q, want %s...", key, env[key], prefix)
		}
	}
	for _, key := range []string{"TEST_KAFKA_REAL", "TEST_REDIS_REAL"} {
		if env[key] != "" {
			t.Errorf("%s=%s for an embedded server", key, env[key])
		}
	}
	// One line for each server, aligned.
	var columns []int
	for line := range strings.Lines(stderr.String()) {
		if name, _, _ := strings.Cut(line, " "); slices.Contains([]string{"postgres", "redis", "kafka"}, name) {
			columns = append(columns, strings.Index(line, "embedded"))
		}
	}
	if len(columns) != 3 || columns[0] < 0 || columns[0] != columns[1] || columns[1] != columns[2] {
		t.Errorf("not a table:\n%s", stderr)
	}
}

// A signal reaches the command, its own exit code is kept, and the servers go.
func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			cmd, stderr := testenv(t, "--", "sh", "-c", "trap 'exit 33' INT TERM; echo up; while :; do sleep 0.05; done")
			runs(t, cmd, "up")
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if got := code(t, cmd.Wait()); got != 33 {
				t.Errorf("exit code %d, want 33\n%s", got, stderr)
			}
		})
	}
	t.Run("a command that ignores it", func(t *testing.T) {
		cmd, stderr := testenv(t, "--only", "redis", "--", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")
		runs(t, cmd, "up")
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for {
			_ = cmd.Process.Signal(syscall.SIGTERM) // it may be gone
			select {
			case err := <-ended:
				if got := code(t, err); got != 128+9 {
					t.Errorf("exit code %d, want 137\n%s", got, stderr)
				}
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	t.Run("while the servers start", func(t *testing.T) {
		cmd, stderr := testenv(t, "--", "true")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		stderrPipe, write := io.Pipe()
		cmd.Stderr = io.MultiWriter(stderr, write)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(stderrPipe)
		lines.Scan() // the first server is ready, Postgres is not
		go func() { _, _ = io.Copy(io.Discard, stderrPipe) }()
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, out)
		if got := code(t, cmd.Wait()); got != 128+2 {
			t.Errorf("exit code %d, want 130\n%s", got, stderr)
		}
	})
}

// runs starts cmd and waits for a line of its output.
func runs(t *testing.T, cmd *exec.Cmd, line string) {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() || lines.Text() != line {
		t.Fatalf("it says %q: %v\n%s", lines.Text(), cmd.Wait(), cmd.Stderr)
	}
}

// Servers of a testenv around it are used, not started again.
func TestNested(t *testing.T) {
	script := filepath.Join(t.TempDir(), "nested")
	inner := fmt.Sprintf("#!/bin/sh\necho $TEST_REDIS_URL\nTESTENV_TEST=testenv exec %s --only redis -- sh -c 'echo $TEST_REDIS_URL'\n", os.Args[0])
	if err := os.WriteFile(script, []byte(inner), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd, stderr := testenv(t, "--only", "redis", "--", script)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	lines := strings.Fields(string(out))
	if len(lines) != 2 || lines[0] != lines[1] {
		t.Errorf("outside and inside: %q\n%s", lines, stderr)
	}
}

func TestSignalsBeforeAnythingRuns(t *testing.T) {
	signals := make(chan os.Signal, 1)
	signals <- os.Interrupt
	t.Setenv("ASHLAR_STACK", "embedded")
	var stderr bytes.Buffer
	if got := run([]string{"--", "true"}, signals, &stderr); got != 128+2 {
		t.Errorf("exit code %d, want 130\n%s", got, &stderr)
	}
}
