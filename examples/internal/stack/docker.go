package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	tclog "github.com/testcontainers/testcontainers-go/log"
)

// The official images. ASHLAR_IMAGE_POSTGRES, ASHLAR_IMAGE_REDIS and
// ASHLAR_IMAGE_KAFKA name others that read the same environment.
var images = map[string]string{
	Postgres: "postgres:17-alpine",
	Redis:    "redis:7-alpine",
	Kafka:    "apache/kafka:3.9.1",
}

func image(name string) string {
	if override := os.Getenv("ASHLAR_IMAGE_" + strings.ToUpper(name)); override != "" {
		return override
	}
	return images[name]
}

// box is a server in a container. Its port on the host is fixed when it is
// created, so that it comes back on the same address, and so that Kafka can be
// told beforehand what to advertise.
type box struct {
	run  *run
	name string
	port int
	ctr  *testcontainers.DockerContainer
	// crash is the signal of an immediate stop.
	crash string
	// finish, if set, lets the server save its data before a gentle stop.
	finish func(ctx context.Context, port int) error
	probe  probe
}

func dockerPostgres(ctx context.Context, r *run) (*Service, error) {
	b := &box{run: r, name: Postgres, crash: "SIGQUIT", probe: func(ctx context.Context, port int) (string, error) {
		return pgVersion(ctx, postgresURL(port))
	}}
	version, err := b.launch(ctx, 5432, func(int) []testcontainers.ContainerCustomizer {
		return []testcontainers.ContainerCustomizer{
			testcontainers.WithEnv(map[string]string{
				"POSTGRES_USER": "postgres", "POSTGRES_DB": "postgres",
				"POSTGRES_PASSWORD": "postgres", "POSTGRES_HOST_AUTH_METHOD": "trust",
			}),
			testcontainers.WithCmd(append([]string{"postgres"}, postgresSettings...)...),
		}
	})
	if err != nil {
		return nil, err
	}
	return &Service{Real: true, Version: version, Address: postgresURL(b.port), inst: b}, nil
}

func dockerRedis(ctx context.Context, r *run) (*Service, error) {
	b := &box{run: r, name: Redis, crash: "SIGKILL", finish: saveRedis, probe: func(ctx context.Context, port int) (string, error) {
		version, _, err := redisVersion(ctx, redisURL(port))
		return version, err
	}}
	version, err := b.launch(ctx, 6379, func(int) []testcontainers.ContainerCustomizer {
		return []testcontainers.ContainerCustomizer{testcontainers.WithCmd("redis-server", "--save", "", "--databases", "64")}
	})
	if err != nil {
		return nil, err
	}
	return &Service{Real: true, Version: version, Address: redisURL(b.port), inst: b}, nil
}

func dockerKafka(ctx context.Context, r *run) (*Service, error) {
	b := &box{run: r, name: Kafka, crash: "SIGKILL", probe: func(ctx context.Context, port int) (string, error) {
		return kafkaVersion(ctx, hostPort(port))
	}}
	version, err := b.launch(ctx, 9092, func(port int) []testcontainers.ContainerCustomizer {
		env := map[string]string{"CLUSTER_ID": kafkaClusterID, "KAFKA_HEAP_OPTS": "-Xmx512m -Xms256m"}
		for key, value := range kafkaSettings(9092, port, 19092, 9093) {
			env["KAFKA_"+strings.ToUpper(strings.ReplaceAll(key, ".", "_"))] = value
		}
		return []testcontainers.ContainerCustomizer{testcontainers.WithEnv(env)}
	})
	if err != nil {
		return nil, err
	}
	return &Service{Real: true, Version: version, Address: hostPort(b.port), inst: b}, nil
}

// launch creates and starts the container and waits until the server answers.
func (b *box) launch(ctx context.Context, inside int, options func(port int) []testcontainers.ContainerCustomizer) (string, error) {
	if err := engineAnswers(ctx); err != nil {
		return "", err
	}
	img := image(b.name)
	b.run.logf("%s: starting a container from %s (downloaded the first time)", b.name, img)
	// The watchdog has to know the name before the container exists.
	if err := os.WriteFile(filepath.Join(b.run.dir, b.name+".container"), []byte(b.container()), 0o600); err != nil {
		return "", err
	}
	var err error
	for range 4 {
		if b.port, err = freePort(); err != nil {
			return "", err
		}
		internal := network.MustParsePort(strconv.Itoa(inside) + "/tcp")
		b.ctr, err = testcontainers.Run(ctx, img, append(options(b.port),
			testcontainers.WithName(b.container()),
			testcontainers.WithExposedPorts(internal.String()),
			testcontainers.WithHostConfigModifier(func(hc *container.HostConfig) {
				hc.PortBindings = network.PortMap{internal: {{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: strconv.Itoa(b.port)}}}
			}))...)
		if err == nil {
			break
		}
		err = fmt.Errorf("image %s (ASHLAR_IMAGE_%s names another): %w", img, strings.ToUpper(b.name), errors.Join(err, b.close()))
		if !portTaken(err) {
			return "", err
		}
	}
	if err != nil {
		return "", err
	}
	version, err := b.ready(ctx)
	if err != nil {
		return "", errors.Join(fmt.Errorf("image %s (ASHLAR_IMAGE_%s names another): %w", img, strings.ToUpper(b.name), err), b.close())
	}
	return version, nil
}

func (b *box) ready(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, b.run.timeout)
	defer cancel()
	version, err := ready(ctx, nil, b.port, func(ctx context.Context, port int) (string, error) {
		if state, err := b.ctr.State(ctx); err == nil && !state.Running {
			cancel()
			return "", fmt.Errorf("the container ended with status %d\n%s", state.ExitCode, b.output())
		}
		return b.probe(ctx, port)
	})
	return version, err
}

// output returns the last lines that the server wrote.
func (b *box) output() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	logs, err := b.ctr.Logs(ctx)
	if err != nil {
		return ""
	}
	defer logs.Close()
	text, _ := io.ReadAll(logs)
	return lastLines(string(text))
}

func (b *box) stop(ctx context.Context, immediate bool) error {
	if !immediate {
		if b.finish != nil {
			if err := b.finish(ctx, b.port); err != nil {
				return err
			}
		}
		grace := 20 * time.Second
		return b.ctr.Stop(ctx, &grace)
	}
	engine, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = engine.Close() }()
	id := b.ctr.GetContainerID()
	if _, err := engine.ContainerKill(ctx, id, client.ContainerKillOptions{Signal: b.crash}); err != nil {
		return err
	}
	ended := engine.ContainerWait(ctx, id, client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
	select {
	case err := <-ended.Error:
		return err
	case <-ended.Result:
		return nil
	}
}

func (b *box) start(ctx context.Context) error {
	if err := b.ctr.Start(ctx); err != nil {
		return err
	}
	_, err := b.ready(ctx)
	return err
}

// close removes the container by its name: a start that was interrupted may have
// created it without telling.
func (b *box) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	engine, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = engine.Close() }()
	_, err = engine.ContainerRemove(ctx, b.container(), client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func (b *box) container() string { return filepath.Base(b.run.dir) + "-" + b.name }

// configure sets what testcontainers keeps once for a program.
var configure = sync.OnceFunc(func() {
	tclog.SetDefault(log.New(io.Discard, "", 0)) // Options.Log tells what matters
	// Close and the watchdog clean up, so no second container has to be
	// downloaded and started for that. Without a docker command the watchdog
	// could not, and testcontainers' own reaper stays on.
	if _, err := exec.LookPath("docker"); err == nil && os.Getenv("TESTCONTAINERS_RYUK_DISABLED") == "" {
		os.Setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
	}
})

// engineAnswers tells quickly and without a panic whether there is an engine.
func engineAnswers(ctx context.Context) (err error) {
	defer func() {
		if p := recover(); p != nil { // testcontainers panics when it finds no engine
			err = fmt.Errorf("no Docker engine answers: %w", errUnavailable)
		}
	}()
	configure()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	engine, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		return fmt.Errorf("no Docker engine answers: %w", errUnavailable)
	}
	defer func() { _ = engine.Close() }()
	if _, err := engine.Ping(ctx, client.PingOptions{}); err != nil {
		return fmt.Errorf("no Docker engine answers: %w", errUnavailable)
	}
	return nil
}
