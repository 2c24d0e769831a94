// Package kafkatest connects a test to the Kafka brokers that TEST_KAFKA_SEEDS
// names, a comma-separated list of host:port.
//
// Without the variable a test is skipped; with TEST_REQUIRE_BACKENDS=1 it fails.
package kafkatest

import (
	"context"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/ashlar-go/ashlar/internal/ids"
)

// Seeds returns the brokers' addresses.
func Seeds(tb testing.TB) []string {
	tb.Helper()
	seeds := os.Getenv("TEST_KAFKA_SEEDS")
	if seeds == "" {
		const remedy = "TEST_KAFKA_SEEDS is not set; run the tests with: go run ./examples/testenv -- go test ./..."
		if os.Getenv("TEST_REQUIRE_BACKENDS") == "1" {
			tb.Fatal("kafkatest: " + remedy)
		}
		tb.Skip("kafkatest: " + remedy)
	}
	list := strings.Split(seeds, ",")
	var err error
	for _, seed := range list {
		// A client would go on trying until its test times out.
		var conn net.Conn
		if conn, err = net.DialTimeout("tcp", seed, 10*time.Second); err == nil {
			conn.Close()
			return list
		}
	}
	tb.Fatalf("kafkatest: cannot reach the brokers that TEST_KAFKA_SEEDS names, host:port[,host:port]: %v\nStart one with: go run ./examples/testenv -- go test ./...", err)
	return nil
}

// Client returns a client with opts that is closed when the test ends.
func Client(tb testing.TB, opts ...kgo.Opt) *kgo.Client {
	tb.Helper()
	client, err := kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(Seeds(tb)...)}, opts...)...)
	if err != nil {
		tb.Fatalf("kafkatest: %v", err)
	}
	tb.Cleanup(client.Close)
	return client
}

// Topic creates a topic that no other test uses, with one replica, and deletes
// it when the test ends. Configs are pairs of name and value.
func Topic(tb testing.TB, partitions int32, configs ...string) string {
	tb.Helper()
	client := Client(tb)
	topic := "t-" + ids.New()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	req := kmsg.NewPtrCreateTopicsRequest()
	spec := kmsg.NewCreateTopicsRequestTopic()
	spec.Topic, spec.NumPartitions, spec.ReplicationFactor = topic, partitions, 1
	for i := 0; i+1 < len(configs); i += 2 {
		c := kmsg.NewCreateTopicsRequestTopicConfig()
		c.Name, c.Value = configs[i], &configs[i+1]
		spec.Configs = append(spec.Configs, c)
	}
	req.Topics = append(req.Topics, spec)
	resp, err := req.RequestWith(ctx, client)
	if err == nil {
		err = kerr.ErrorForCode(resp.Topics[0].ErrorCode)
	}
	if err != nil {
		tb.Fatalf("kafkatest: create topic %s at the brokers that TEST_KAFKA_SEEDS names: %v\nStart one with: go run ./examples/testenv -- go test ./...", topic, err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		del := kmsg.NewPtrDeleteTopicsRequest()
		del.TopicNames = []string{topic}
		t := kmsg.NewDeleteTopicsRequestTopic()
		t.Topic = &topic
		del.Topics = append(del.Topics, t)
		if _, err := del.RequestWith(ctx, client); err != nil {
			tb.Logf("kafkatest: delete topic %s: %v", topic, err)
		}
	})
	return topic
}
