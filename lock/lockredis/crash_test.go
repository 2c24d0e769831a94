package lockredis_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/internal/crashtest"
	"github.com/ashlar-go/ashlar/internal/redistest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockredis"
)

const crashTTL = 500 * time.Millisecond

// fencedWrite is what is written to: it refuses tokens lower than one it has seen,
// unless told not to look. It keeps the tokens of all writes.
var fencedWrite = redis.NewScript(`
if ARGV[2] == 'fenced' and tonumber(redis.call('LINDEX', KEYS[1], -1) or '0') > tonumber(ARGV[1]) then
	return 0
end
return redis.call('RPUSH', KEYS[1], ARGV[1])`)

// One process is killed while it holds the lease; another is stopped past its
// lease and then goes on to write, in ignorance, when a third has written.
func TestCrash(t *testing.T) {
	rounds := 2
	if os.Getenv("LOCK_CRASH_FULL") != "" {
		rounds = 20
	}
	for range rounds {
		crash(t, "fenced")
	}
}

func crash(t *testing.T, fence string) {
	t.Helper()
	client := redistest.Client(t)
	prefix := redistest.Prefix(t, client)
	start := func(mode, point string) *crashtest.Process {
		return crashtest.Start(t, "TestCrashChild", crashtest.Plan{Mode: mode + fence, Backend: prefix, Point: point})
	}
	token := func(p *crashtest.Process) int64 {
		t.Helper()
		line := <-p.Lines
		n, err := strconv.ParseInt(strings.TrimPrefix(line, "at "), 10, 64)
		if err != nil {
			t.Fatalf("the child reports %q", line)
		}
		return n
	}
	killed := start("die ", "held")
	first := token(killed)
	killed.Kill()
	stopped := start("pause ", "held") // takes over from the dead
	second := token(stopped)
	stopped.Signal(syscall.SIGSTOP)
	if other := start("other ", ""); !other.Wait() { // and another from the one that is stopped
		t.Fatal("a child that nobody disturbs failed")
	}
	stopped.Continue()
	var lines []string
	for line := range stopped.Lines {
		lines = append(lines, line)
	}
	if !stopped.Wait() {
		t.Errorf("the child that was stopped failed: %q", lines)
	}
	if len(lines) != 1 || lines[0] != fmt.Sprint("refused ", second) {
		t.Errorf("the write under token %d, which was stopped past its lease, was not refused: %q", second, lines)
	}
	written, err := client.LRange(t.Context(), prefix+"written", 0, -1).Result()
	if err != nil || len(written) == 0 {
		t.Fatalf("%v, %v", written, err)
	}
	last := max(first, second)
	for _, text := range written {
		if n, err := strconv.ParseInt(text, 10, 64); err != nil || n <= last {
			t.Errorf("a stale write: token %s after %d", text, last)
		}
	}
}

func TestCrashChild(t *testing.T) {
	c := crashtest.Current(t)
	client := redistest.Client(t)
	locker := lock.New(lockredis.New(client, &lockredis.Options{Prefix: c.Backend}), &lock.Options{TTL: crashTTL})
	lease, err := locker.Lock(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	c.At("held", fmt.Sprint(lease.Token()))
	lost := lease.Err()
	ctx := context.WithoutCancel(t.Context()) // one who does not look
	fence := c.Mode[strings.LastIndex(c.Mode, " ")+1:]
	n, err := fencedWrite.Run(ctx, client, []string{c.Backend + "written"}, lease.Token(), fence).Int()
	if err != nil {
		t.Fatal(err)
	}
	if n == 0 {
		c.Report("refused %d", lease.Token())
		if lost == nil {
			t.Error("the lease had passed on before its holder was told")
		}
	}
}

const crashMutantEnv = "LOCKREDIS_CRASH_MUTANT"

// TestCrashMutant runs the crash check without the fence; only
// TestCrashMutantIsCaught sets the environment.
func TestCrashMutant(t *testing.T) {
	if os.Getenv(crashMutantEnv) == "" {
		t.Skip("runs as a child of TestCrashMutantIsCaught")
	}
	crash(t, "unfenced")
}

func TestCrashMutantIsCaught(t *testing.T) {
	redistest.Client(t) // skips without a server
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrashMutant$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), crashMutantEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "was not refused") || !strings.Contains(string(out), "a stale write") {
		t.Errorf("the check did not notice:\n%s", out)
	}
}
