package stack

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	minPostgres = 15
	remedy      = "unset the variable to have a server started, or point it at one that runs"
)

func envPostgres(ctx context.Context, _ func(string, ...any)) (*Service, error) {
	return fromEnv("TEST_POSTGRES_URL", func(address string) (string, error) { return postgresVersion(ctx, address) })
}

func envRedis(ctx context.Context, _ func(string, ...any)) (*Service, error) {
	return fromEnv("TEST_REDIS_URL", func(address string) (string, error) { return redisVersion(ctx, address) })
}

func envKafka(ctx context.Context, _ func(string, ...any)) (*Service, error) {
	return fromEnv("TEST_KAFKA_SEEDS", func(address string) (string, error) { return "", kafkaReady(ctx, address) })
}

func fromEnv(variable string, check func(address string) (version string, err error)) (*Service, error) {
	address := os.Getenv(variable)
	if address == "" {
		return nil, fmt.Errorf("%s is not set: %w", variable, errUnavailable)
	}
	version, err := check(address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; %s", variable, err, remedy)
	}
	return &Service{Version: version, Address: address, Real: true}, nil
}

// postgresVersion connects and returns the server's version, or an error if it
// is too old.
func postgresVersion(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	version, _, _ := strings.Cut(conn.PgConn().ParameterStatus("server_version"), " ")
	major, _, _ := strings.Cut(version, ".")
	if n, err := strconv.Atoi(major); err == nil && n < minPostgres {
		return "", fmt.Errorf("the server is Postgres %s, ashlar needs %d or newer", version, minPostgres)
	}
	return version, nil
}

func redisVersion(ctx context.Context, url string) (string, error) {
	opts, err := redis.ParseURL(url)
	if err != nil {
		return "", err
	}
	client := redis.NewClient(opts)
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := client.Ping(ctx).Err(); err != nil {
		return "", err
	}
	for _, line := range strings.Split(client.Info(ctx, "server").Val(), "\n") {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "redis_version:"); ok {
			if major, _, _ := strings.Cut(v, "."); len(major) == 1 && major < "6" {
				return "", fmt.Errorf("the server is Redis %s, ashlar needs 6 or newer", v)
			}
			return v, nil
		}
	}
	return "", nil
}

func kafkaReady(ctx context.Context, seeds string) error {
	client, err := kgo.NewClient(kgo.SeedBrokers(strings.Split(seeds, ",")...))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return client.Ping(ctx)
}

// ready polls check until it succeeds, ctx ends, gone is closed or a minute has
// passed.
func ready(ctx context.Context, gone <-chan struct{}, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w", err)
		case <-gone:
			return fmt.Errorf("the server has exited: %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
