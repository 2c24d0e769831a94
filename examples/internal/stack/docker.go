package stack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/testcontainers/testcontainers-go"
	tclog "github.com/testcontainers/testcontainers-go/log"
)

// image returns the image of a backend; ASHLAR_IMAGE_<NAME> overrides it.
func image(name, official string) string {
	return cmp.Or(os.Getenv("ASHLAR_IMAGE_"+strings.ToUpper(name)), official)
}

func dockerPostgres(ctx context.Context, logf func(string, ...any)) (*Service, error) {
	return runContainer(ctx, logf, image(Postgres, "postgres:17-alpine"), 5432,
		func(int) testcontainers.ContainerRequest {
			return testcontainers.ContainerRequest{
				Env: map[string]string{"POSTGRES_PASSWORD": "postgres", "POSTGRES_HOST_AUTH_METHOD": "trust"},
				Cmd: []string{"postgres", "-c", "max_connections=300", "-c", "max_prepared_transactions=20"},
			}
		},
		func(host string) string { return "postgres://postgres:postgres@" + host + "/postgres?sslmode=disable" },
		postgresVersion)
}

func dockerRedis(ctx context.Context, logf func(string, ...any)) (*Service, error) {
	return runContainer(ctx, logf, image(Redis, "redis:7-alpine"), 6379,
		func(int) testcontainers.ContainerRequest { return testcontainers.ContainerRequest{} },
		func(host string) string { return "redis://" + host + "/0" }, redisVersion)
}

func dockerKafka(ctx context.Context, logf func(string, ...any)) (*Service, error) {
	img := image(Kafka, "apache/kafka:3.9.1")
	return runContainer(ctx, logf, img, 9092,
		func(port int) testcontainers.ContainerRequest {
			return testcontainers.ContainerRequest{Env: map[string]string{
				"KAFKA_NODE_ID":                                  "1",
				"KAFKA_PROCESS_ROLES":                            "broker,controller",
				"KAFKA_CONTROLLER_QUORUM_VOTERS":                 "1@localhost:9093",
				"KAFKA_LISTENERS":                                "PLAINTEXT://:9092,CONTROLLER://:9093",
				"KAFKA_ADVERTISED_LISTENERS":                     "PLAINTEXT://" + hostPort(port),
				"KAFKA_CONTROLLER_LISTENER_NAMES":                "CONTROLLER",
				"KAFKA_LISTENER_SECURITY_PROTOCOL_MAP":           "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
				"KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR":         "1",
				"KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
				"KAFKA_TRANSACTION_STATE_LOG_MIN_ISR":            "1",
				"KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS":         "0",
				"KAFKA_NUM_PARTITIONS":                           "4",
				"KAFKA_HEAP_OPTS":                                "-Xmx512m",
			}}
		},
		func(host string) string { return host },
		func(ctx context.Context, address string) (string, error) {
			_, tag, _ := strings.Cut(img, ":")
			return cmp.Or(tag, "latest"), kafkaReady(ctx, address)
		})
}

// runContainer runs an image with its port bound to a free one on loopback,
// which is known before the start because Kafka must advertise it.
func runContainer(ctx context.Context, logf func(string, ...any), img string, inside int, request func(port int) testcontainers.ContainerRequest,
	address func(host string) string, version func(ctx context.Context, address string) (string, error),
) (*Service, error) {
	if os.Getenv("TESTCONTAINERS_LOG") == "" {
		tclog.SetDefault(log.New(io.Discard, "", 0))
	}
	if err := dockerAnswers(ctx); err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	req := request(port)
	req.Image = img
	exposed := fmt.Sprintf("%d/tcp", inside)
	req.ExposedPorts = []string{exposed}
	req.HostConfigModifier = func(hc *container.HostConfig) {
		hc.AutoRemove = true
		hc.PortBindings = network.PortMap{network.MustParsePort(exposed): {
			{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: strconv.Itoa(port)},
		}}
	}
	logf("%s: starting a container", img)
	c, err := testcontainers.GenericContainer(ctx, testcontainers.GenericContainerRequest{ContainerRequest: req, Started: true})
	stop := func() error {
		if c == nil {
			return nil
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err := c.Terminate(ctx, testcontainers.StopTimeout(2*time.Second))
		if err != nil && strings.Contains(err.Error(), "already in progress") {
			return nil // it removes itself when it stops
		}
		return err
	}
	if err != nil {
		return nil, errors.Join(err, stop())
	}
	svc := &Service{Address: address(hostPort(port)), Real: true, stop: stop}
	err = ready(ctx, nil, func(ctx context.Context) (err error) {
		svc.Version, err = version(ctx, svc.Address)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, stop())
	}
	return svc, nil
}

// dockerAnswers tells whether an engine runs, without waiting for one.
func dockerAnswers(ctx context.Context) (err error) {
	defer func() {
		if r := recover(); r != nil { // the library panics without a Docker host
			err = fmt.Errorf("no Docker engine answers: %w", errUnavailable)
		}
	}()
	provider, err := testcontainers.NewDockerProvider()
	if err == nil {
		defer provider.Close()
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		err = provider.Health(ctx)
	}
	if err != nil {
		return fmt.Errorf("no Docker engine answers: %w", errUnavailable)
	}
	return nil
}
