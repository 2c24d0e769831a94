package stack

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/twmb/franz-go/pkg/kfake"
)

const kafkaCluster = "ashlarashlarashlarashQ" // 16 bytes in base64

// localKafka runs the Kafka whose scripts are on PATH or under KAFKA_HOME, as a
// single KRaft node.
func localKafka(ctx context.Context, _ func(string, ...any)) (*Service, error) {
	script, err := exec.LookPath("kafka-server-start.sh")
	if home := os.Getenv("KAFKA_HOME"); home != "" {
		script, err = filepath.Join(home, "bin", "kafka-server-start.sh"), nil
	}
	if err != nil {
		return nil, fmt.Errorf("kafka-server-start.sh is neither on PATH nor under KAFKA_HOME: %w", errUnavailable)
	}
	dir, err := tempDir(nil, "ashlar-kafka-")
	if err != nil {
		return nil, err
	}
	svc, err := runKafka(ctx, dir, script)
	if err != nil {
		os.RemoveAll(dir)
	}
	return svc, err
}

func runKafka(ctx context.Context, dir, script string) (*Service, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	controller, err := freePort()
	if err != nil {
		return nil, err
	}
	properties := filepath.Join(dir, "server.properties")
	config := fmt.Sprintf(`process.roles=broker,controller
node.id=1
controller.quorum.voters=1@%[2]s
listeners=PLAINTEXT://%[1]s,CONTROLLER://%[2]s
advertised.listeners=PLAINTEXT://%[1]s
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=%[3]s
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
`, hostPort(port), hostPort(controller), filepath.Join(dir, "log"))
	if err := os.WriteFile(properties, []byte(config), 0o600); err != nil {
		return nil, err
	}
	env := []string{"LOG_DIR=" + dir, "KAFKA_HEAP_OPTS=-Xmx512m -Xms256m"}
	format := exec.CommandContext(ctx, filepath.Join(filepath.Dir(script), "kafka-storage.sh"), "format", "-t", kafkaCluster, "-c", properties)
	format.Env = append(os.Environ(), env...)
	if out, err := format.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("format storage: %w\n%s", err, out)
	}
	svc := &Service{Address: hostPort(port), Real: true, Version: kafkaVersion(script)}
	var p *process
	start := func(ctx context.Context) (err error) {
		if p, err = spawn(nil, dir, env, script, properties); err != nil {
			return err
		}
		if err := ready(ctx, p.gone, func(ctx context.Context) error { return kafkaReady(ctx, svc.Address) }); err != nil {
			return fmt.Errorf("%w\n%s", err, p.output)
		}
		return nil
	}
	svc.stop = func() error {
		defer os.RemoveAll(dir)
		return p.stop(syscall.SIGTERM)
	}
	svc.restart = func(ctx context.Context, immediate bool) error {
		sig := syscall.SIGTERM
		if immediate {
			sig = syscall.SIGKILL
		}
		if err := p.stop(sig); err != nil {
			return err
		}
		return start(ctx)
	}
	if err := start(ctx); err != nil {
		if p != nil {
			_ = p.stop(syscall.SIGKILL) // the error that matters is the one above
		}
		return nil, err
	}
	return svc, nil
}

func kafkaVersion(script string) string {
	jars, _ := filepath.Glob(filepath.Join(filepath.Dir(script), "..", "libs", "kafka-clients-*.jar")) // well-formed
	if len(jars) == 0 {
		return "unknown"
	}
	return strings.TrimSuffix(strings.TrimPrefix(filepath.Base(jars[0]), "kafka-clients-"), ".jar")
}

// embeddedKafka runs an imitation of Kafka in this process.
func embeddedKafka(context.Context, func(string, ...any)) (*Service, error) {
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.AllowAutoTopicCreation(), kfake.DefaultNumPartitions(4))
	if err != nil {
		return nil, err
	}
	return &Service{
		Version: "kfake", Address: strings.Join(c.ListenAddrs(), ","),
		stop: func() error { c.Close(); return nil },
	}, nil
}
