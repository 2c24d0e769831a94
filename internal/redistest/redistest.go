// Package redistest connects a test to the Redis server that TEST_REDIS_URL names.
//
// Without the variable a test is skipped; with TEST_REQUIRE_BACKENDS=1 it fails.
package redistest

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/internal/ids"
)

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
		tb.Fatalf("redistest: TEST_REDIS_URL must be a redis:// URL: %v", err)
	}
	client := redis.NewClient(opts)
	tb.Cleanup(func() { _ = client.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := client.Ping(ctx).Err(); err != nil {
		tb.Fatalf("redistest: cannot reach the server that TEST_REDIS_URL names: %v\nStart one with: go run ./examples/testenv -- go test ./...", err)
	}
	return client
}

// Prefix returns a key prefix that no other test uses. Its keys are deleted
// when the test ends.
func Prefix(tb testing.TB, client *redis.Client) string {
	tb.Helper()
	prefix := "t:" + ids.New() + ":"
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		iter := client.Scan(ctx, 0, prefix+"*", 1000).Iterator()
		for iter.Next(ctx) {
			client.Del(ctx, iter.Val())
		}
		if err := iter.Err(); err != nil {
			tb.Logf("redistest: clean up of %s: %v", prefix, err)
		}
	})
	return prefix
}
