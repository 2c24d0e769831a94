package redistest

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
)

// fakeTB records how a test that uses the package would end.
type fakeTB struct {
	testing.TB
	failed, skipped string
}

func (f *fakeTB) Helper()        {}
func (f *fakeTB) Cleanup(func()) {}

func (f *fakeTB) Fatal(args ...any) {
	f.failed = fmt.Sprint(args...)
	runtime.Goexit()
}

func (f *fakeTB) Fatalf(format string, args ...any) { f.Fatal(fmt.Sprintf(format, args...)) }

func (f *fakeTB) Skip(args ...any) {
	f.skipped = fmt.Sprint(args...)
	runtime.Goexit()
}

// outcome runs what a test would call.
func outcome(t *testing.T, call func(tb testing.TB)) *fakeTB {
	t.Helper()
	f := &fakeTB{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		call(f)
	}()
	<-done
	return f
}

func says(t *testing.T, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%q lacks %q", got, w)
		}
	}
}

// nobody is an address at which no server listens.
func nobody(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestUnset(t *testing.T) {
	t.Setenv("TEST_REDIS_URL", "")
	t.Setenv("TEST_REQUIRE_BACKENDS", "")
	says(t, outcome(t, use).skipped, "redistest:", "TEST_REDIS_URL is not set", "go run ./examples/testenv -- go test")
	t.Setenv("TEST_REQUIRE_BACKENDS", "1")
	says(t, outcome(t, use).failed, "redistest:", "TEST_REDIS_URL is not set", "go run ./examples/testenv -- go test")
}

func use(tb testing.TB) { Client(tb) }

func TestUnusableServers(t *testing.T) {
	for _, tt := range []struct {
		name, dsn string
		want      []string
	}{
		{"no scheme", "localhost:6379", []string{"must be a URL such as redis://"}},
		{"another scheme", "http://localhost:6379", []string{"must be a URL such as redis://"}},
		{"no server", "redis://" + nobody(t), []string{"cannot reach the server that TEST_REDIS_URL names", "go run ./examples/testenv"}},
		{"too old", "redis://" + server(t, "6.0.16"), []string{"the server is Redis 6.0.16, ashlar needs 6.2 or newer", "point TEST_REDIS_URL at a newer server"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("TEST_REDIS_URL", tt.dsn)
			says(t, outcome(t, use).failed, append(tt.want, "redistest:")...)
		})
	}
}

func TestUsableVersions(t *testing.T) {
	for _, version := range []string{"6.2.0", "7.0.15", "10.0.1", ""} {
		t.Setenv("TEST_REDIS_URL", "redis://"+server(t, version))
		if f := outcome(t, use); f.failed != "" || f.skipped != "" {
			t.Errorf("version %q is refused: %s%s", version, f.failed, f.skipped)
		}
	}
}

func TestPasswordIsNotPrinted(t *testing.T) {
	for _, dsn := range []string{"redis://:hunter2@" + nobody(t), "rediz://:hunter2@localhost"} {
		t.Setenv("TEST_REDIS_URL", dsn)
		if f := outcome(t, use); f.failed == "" || strings.Contains(f.failed, "hunter2") {
			t.Errorf("it says %q", f.failed)
		}
	}
}

func TestPrefixesAreOwn(t *testing.T) {
	if os.Getenv("TEST_REDIS_URL") == "" {
		use(t) // skips or fails
	}
	client := Client(t)
	prefixes := map[string]bool{}
	t.Run("use", func(t *testing.T) {
		for range 3 {
			p := Prefix(t, client)
			prefixes[p] = true
			for i := range 2500 { // more than one page of a scan
				if err := client.Set(t.Context(), fmt.Sprint(p, i), 1, 0).Err(); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	if len(prefixes) != 3 {
		t.Errorf("shared: %v", prefixes)
	}
	for p := range prefixes {
		var left int
		for iter := client.Scan(t.Context(), 0, p+"*", 1000).Iterator(); iter.Next(t.Context()); {
			left++
		}
		if left > 0 {
			t.Errorf("%d keys are left behind", left)
		}
	}
}

// server answers as a Redis of that version would.
func server(t *testing.T, version string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				in := bufio.NewScanner(conn)
				for in.Scan() {
					switch strings.ToUpper(in.Text()) {
					case "PING":
						fmt.Fprint(conn, "+PONG\r\n")
					case "INFO":
						info := "# Server\r\nredis_version:" + version + "\r\n"
						fmt.Fprintf(conn, "$%d\r\n%s\r\n", len(info), info)
					case "HELLO", "CLIENT":
						fmt.Fprint(conn, "-ERR unknown command\r\n")
					}
				}
			}()
		}
	}()
	return l.Addr().String()
}
