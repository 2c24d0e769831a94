package stack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/twmb/franz-go/pkg/kfake"
)

// kafkaSettings are the properties of a single KRaft node whose clients come
// in at the loopback address and the given port. Kafka's other listeners are
// for the node itself, which cannot reach that port from inside a container.
func kafkaSettings(client, advertised, internal, controller int) map[string]string {
	return map[string]string{
		"node.id":                        "1",
		"process.roles":                  "broker,controller",
		"listeners":                      fmt.Sprintf("CLIENT://:%d,INTERNAL://127.0.0.1:%d,CONTROLLER://127.0.0.1:%d", client, internal, controller),
		"advertised.listeners":           fmt.Sprintf("CLIENT://127.0.0.1:%d,INTERNAL://127.0.0.1:%d", advertised, internal),
		"listener.security.protocol.map": "CLIENT:PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
		"inter.broker.listener.name":     "INTERNAL",
		"controller.listener.names":      "CONTROLLER",
		"controller.quorum.voters":       fmt.Sprintf("1@127.0.0.1:%d", controller),

		"offsets.topic.replication.factor":                 "1",
		"offsets.topic.num.partitions":                     "4",
		"transaction.state.log.replication.factor":         "1",
		"transaction.state.log.min.isr":                    "1",
		"transaction.state.log.num.partitions":             "4",
		"share.coordinator.state.topic.replication.factor": "1",
		"share.coordinator.state.topic.min.isr":            "1",
		"group.initial.rebalance.delay.ms":                 "0",
		"num.partitions":                                   "4",
	}
}

const kafkaClusterID = "4L6g3nShT-eMCtK--X86sw"

func localKafka(ctx context.Context, r *run) (*Service, error) {
	bin, err := findKafka()
	if err != nil {
		return nil, err
	}
	p, err := newProgram(r, Kafka, nil)
	if err != nil {
		return nil, err
	}
	version, err := func() (string, error) {
		internal, err := freePort()
		if err != nil {
			return "", err
		}
		controller, err := freePort()
		if err != nil {
			return "", err
		}
		config := filepath.Join(p.dir, "server.properties")
		// The port is a part of the configuration; the data does not know it.
		write := func(port int) error {
			settings := kafkaSettings(port, port, internal, controller)
			settings["listeners"] = strings.Replace(settings["listeners"], "CLIENT://:", "CLIENT://127.0.0.1:", 1)
			settings["log.dirs"] = filepath.Join(p.dir, "data")
			lines := make([]string, 0, len(settings))
			for key, value := range settings {
				lines = append(lines, key+"="+value+"\n")
			}
			slices.Sort(lines)
			return os.WriteFile(config, []byte(strings.Join(lines, "")), 0o600)
		}
		if err := write(0); err != nil {
			return "", err
		}
		if err := command(ctx, nil, p.dir, filepath.Join(bin, "kafka-storage.sh"), "format", "--cluster-id", kafkaClusterID, "--config", config); err != nil {
			return "", err
		}
		p.env = []string{"KAFKA_HEAP_OPTS=-Xmx512m -Xms256m", "LOG_DIR=" + filepath.Join(p.dir, "logs"), "JAVA_HOME=" + os.Getenv("JAVA_HOME")}
		p.argv = func(port int) []string {
			_ = write(port) // a failure shows when the server does not answer
			return []string{filepath.Join(bin, "kafka-server-start.sh"), config}
		}
		p.probe = func(ctx context.Context, port int) (string, error) {
			return kafkaVersion(ctx, hostPort(port))
		}
		return p.launch(ctx)
	}()
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	return &Service{Real: true, Version: version, Address: hostPort(p.port), inst: p}, nil
}

// findKafka returns the folder of Kafka's start scripts.
func findKafka() (string, error) {
	if home := os.Getenv("KAFKA_HOME"); home != "" {
		bin := filepath.Join(home, "bin")
		if _, err := os.Stat(filepath.Join(bin, "kafka-server-start.sh")); err != nil {
			return "", fmt.Errorf("KAFKA_HOME=%s has no bin/kafka-server-start.sh", home)
		}
		return bin, nil
	}
	path, err := exec.LookPath("kafka-server-start.sh")
	if err != nil {
		return "", fmt.Errorf("kafka-server-start.sh is neither on PATH nor under KAFKA_HOME: %w", errUnavailable)
	}
	path, err = filepath.EvalSymlinks(path)
	return filepath.Dir(path), err
}

// fake is an embedded Kafka. Its data is on disk, for stop and start.
type fake struct {
	dir     string
	port    int
	cluster *kfake.Cluster
}

func embeddedKafka(ctx context.Context, r *run) (*Service, error) {
	f := &fake{dir: filepath.Join(r.dir, "kfake")}
	if err := f.start(ctx); err != nil {
		return nil, err
	}
	return &Service{Version: "kfake", Address: f.cluster.ListenAddrs()[0], inst: f}, nil
}

func (f *fake) start(context.Context) error {
	cluster, err := kfake.NewCluster(kfake.AllowAutoTopicCreation(), kfake.DefaultNumPartitions(4), kfake.Ports(f.port), kfake.DataDir(f.dir), kfake.ClusterID(kafkaClusterID))
	if err != nil {
		return err
	}
	f.cluster = cluster
	_, port, err := net.SplitHostPort(cluster.ListenAddrs()[0])
	if err == nil {
		f.port, err = strconv.Atoi(port)
	}
	return err
}

func (f *fake) stop(context.Context, bool) error {
	f.cluster.Close()
	return nil
}

func (f *fake) close() error {
	f.cluster.Close()
	return os.RemoveAll(f.dir)
}
