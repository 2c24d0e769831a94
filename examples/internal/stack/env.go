package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"
)

// The variables that name servers which run already.
var variables = map[string]string{
	Postgres: "TEST_POSTGRES_URL",
	Redis:    "TEST_REDIS_URL",
	Kafka:    "TEST_KAFKA_SEEDS",
}

func envPostgres(ctx context.Context, _ *run) (*Service, error) {
	return fromEnv(ctx, Postgres, pgVersion, func(v string) error { return atLeast("Postgres", v, 15, 0) })
}

func envRedis(ctx context.Context, _ *run) (*Service, error) {
	return fromEnv(ctx, Redis, func(ctx context.Context, addr string) (string, error) {
		v, _, err := redisVersion(ctx, addr)
		return v, err
	}, func(v string) error { return atLeast("Redis", v, 6, 2) })
}

func envKafka(ctx context.Context, _ *run) (*Service, error) {
	return fromEnv(ctx, Kafka, func(ctx context.Context, addr string) (string, error) {
		return kafkaVersion(ctx, strings.Split(addr, ",")...)
	}, func(string) error { return nil })
}

func fromEnv(ctx context.Context, name string, ask func(context.Context, string) (string, error), check func(string) error) (*Service, error) {
	key := variables[name]
	addr := os.Getenv(key)
	if addr == "" {
		return nil, fmt.Errorf("%s is not set: %w", key, errUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	version, err := ask(ctx, addr)
	if err != nil {
		return nil, fmt.Errorf("the server that %s names does not answer: %w\nStart it, correct the address, or unset %s to have one started", key, err, key)
	}
	if err := check(version); err != nil {
		return nil, fmt.Errorf("the server that %s names is too old: %w\nPoint %s at a newer one, or unset it to have one started", key, err, key)
	}
	return &Service{Version: version, Address: addr, Real: true}, nil
}

// atLeast compares the first two numbers of a version. A server that hides its
// version passes.
func atLeast(product, version string, major, minor int) error {
	if version == "" {
		return nil
	}
	var have [2]int
	for i, part := range strings.SplitN(version, ".", 3)[:min(2, strings.Count(version, ".")+1)] {
		digits := part[:len(part)-len(strings.TrimLeft(part, "0123456789"))]
		have[i], _ = strconv.Atoi(digits)
	}
	if have[0] > major || have[0] == major && have[1] >= minor {
		return nil
	}
	return fmt.Errorf("it is %s %s, needed is %d.%d or newer", product, version, major, minor)
}

func pgVersion(ctx context.Context, url string) (string, error) {
	return pgShow(ctx, url, "server_version")
}

func pgShow(ctx context.Context, url, setting string) (string, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return "", err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var value string
	err = conn.QueryRow(ctx, "SELECT current_setting($1)", setting).Scan(&value)
	if setting == "server_version" {
		value, _, _ = strings.Cut(value, " ") // "15.18 (Debian ...)"
	}
	return value, err
}

// redisVersion returns the version and the process id that the server tells,
// "" for a server that tells none.
func redisVersion(ctx context.Context, url string) (version, pid string, err error) {
	opts, err := redis.ParseURL(url)
	if err != nil {
		return "", "", err
	}
	// The client writes a line to stderr for every connection that is refused.
	conn, err := (&net.Dialer{}).DialContext(ctx, opts.Network, opts.Addr)
	if err != nil {
		return "", "", err
	}
	conn.Close()
	client := redis.NewClient(opts)
	defer func() { _ = client.Close() }()
	if err := client.Ping(ctx).Err(); err != nil {
		return "", "", err
	}
	info, err := client.Info(ctx, "server").Result()
	var reply redis.Error
	if err != nil && !errors.As(err, &reply) {
		return "", "", err
	}
	for line := range strings.Lines(info) {
		switch key, value, _ := strings.Cut(strings.TrimSpace(line), ":"); key {
		case "redis_version":
			version = value
		case "process_id":
			pid = value
		}
	}
	return version, pid, nil
}

func kafkaVersion(ctx context.Context, seeds ...string) (string, error) {
	client, err := kgo.NewClient(kgo.SeedBrokers(seeds...), kgo.RequestRetries(0))
	if err != nil {
		return "", err
	}
	defer client.Close()
	resp, err := kmsg.NewPtrApiVersionsRequest().RequestWith(ctx, client)
	if err != nil {
		return "", err
	}
	// Brokers are listed when they are ready to serve, under the addresses that
	// clients will use.
	meta, err := kmsg.NewPtrMetadataRequest().RequestWith(ctx, client)
	if err != nil {
		return "", err
	}
	if len(meta.Brokers) == 0 {
		return "", errors.New("the cluster has no broker yet")
	}
	for _, b := range meta.Brokers {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(b.Host, strconv.Itoa(int(b.Port))))
		if err != nil {
			return "", fmt.Errorf("the address that the broker advertises: %w", err)
		}
		conn.Close()
	}
	guess := kversion.FromApiVersionsResponse(resp).VersionGuess()
	return strings.TrimPrefix(strings.TrimPrefix(guess, "at least "), "v"), nil
}
