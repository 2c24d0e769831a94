// Package redistest connects a test to the Redis server that TEST_REDIS_URL names.
//
// Without the variable a test is skipped; with TEST_REQUIRE_BACKENDS=1 it fails.
package redistest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/internal/ids"
)

var minVersion = [2]int{6, 2}

// Client returns a client that is closed when the test ends. Tests share the
// server: keep every key under a Prefix.
func Client(tb testing.TB) *redis.Client {
	tb.Helper()
	dsn := os.Getenv("TEST_REDIS_URL")
	if dsn == "" {
		const remedy = "TEST_REDIS_URL is not set; run the tests with: go run ./examples/testenv -- go test ./..."
		if os.Getenv("TEST_REQUIRE_BACKENDS") == "1" {
			tb.Fatal("redistest: " + remedy)
		}
		tb.Skip("redistest: " + remedy)
	}
	opts, err := redis.ParseURL(dsn)
	if err != nil {
		tb.Fatal("redistest: TEST_REDIS_URL must be a URL such as redis://host:6379/0")
	}
	client := redis.NewClient(opts)
	tb.Cleanup(func() { _ = client.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := client.Ping(ctx).Err(); err != nil {
		tb.Fatalf("redistest: cannot reach the server that TEST_REDIS_URL names: %v\nStart one with: go run ./examples/testenv -- go test ./...", err)
	}
	if version := serverVersion(ctx, client); older(version, minVersion) {
		tb.Fatalf("redistest: the server is Redis %s, ashlar needs %d.%d or newer; point TEST_REDIS_URL at a newer server", version, minVersion[0], minVersion[1])
	}
	return client
}

// serverVersion returns "" for a server that does not tell.
func serverVersion(ctx context.Context, client *redis.Client) string {
	for line := range strings.Lines(client.Info(ctx, "server").Val()) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "redis_version:"); ok {
			return v
		}
	}
	return ""
}

func older(version string, least [2]int) bool {
	var have [2]int
	if n, _ := fmt.Sscanf(version, "%d.%d", &have[0], &have[1]); n < 2 {
		return false
	}
	return have[0] < least[0] || have[0] == least[0] && have[1] < least[1]
}

// Prefix returns a key prefix that no other test uses. Its keys are deleted
// when the test ends.
func Prefix(tb testing.TB, client *redis.Client) string {
	tb.Helper()
	prefix := "t:" + ids.New() + ":"
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		// An imitation of Redis may skip keys if some vanish during the scan.
		var keys []string
		iter := client.Scan(ctx, 0, prefix+"*", 1000).Iterator()
		for iter.Next(ctx) {
			keys = append(keys, iter.Val())
		}
		err := iter.Err()
		for batch := range slices.Chunk(keys, 1000) {
			err = errors.Join(err, client.Unlink(ctx, batch...).Err())
		}
		if err != nil {
			tb.Logf("redistest: clean up of %s: %v", prefix, err)
		}
	})
	return prefix
}

// Real skips a test that needs what only a real server has, and says what: the
// embedded imitation lacks commands, and ends a key up to a few milliseconds
// before its time. Where TEST_REDIS_REAL=1 says that the server is real, nothing is
// skipped.
func Real(tb testing.TB, client *redis.Client, what string) {
	tb.Helper()
	if os.Getenv("TEST_REDIS_REAL") == "1" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := client.ConfigGet(ctx, "maxmemory").Err(); err != nil && strings.Contains(err.Error(), "unknown command") {
		tb.Skip("redistest: needs a real Redis: " + what)
	}
}
