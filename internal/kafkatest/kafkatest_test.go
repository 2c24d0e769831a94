package kafkatest

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// fakeTB records how a test that uses the package would end.
type fakeTB struct {
	testing.TB
	failed, skipped string
}

func (f *fakeTB) Helper()        {}
func (f *fakeTB) Cleanup(func()) {}

func (f *fakeTB) Fatal(args ...any) {
	f.failed = fmt.Sprint(args...)
	runtime.Goexit()
}

func (f *fakeTB) Fatalf(format string, args ...any) { f.Fatal(fmt.Sprintf(format, args...)) }

func (f *fakeTB) Skip(args ...any) {
	f.skipped = fmt.Sprint(args...)
	runtime.Goexit()
}

// outcome runs what a test would call.
func outcome(t *testing.T, call func(tb testing.TB)) *fakeTB {
	t.Helper()
	f := &fakeTB{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		call(f)
	}()
	<-done
	return f
}

func says(t *testing.T, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%q lacks %q", got, w)
		}
	}
}

// nobody is an address at which no server listens.
func nobody(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestUnset(t *testing.T) {
	t.Setenv("TEST_KAFKA_SEEDS", "")
	t.Setenv("TEST_REQUIRE_BACKENDS", "")
	says(t, outcome(t, use).skipped, "kafkatest:", "TEST_KAFKA_SEEDS is not set", "go run ./examples/testenv -- go test")
	t.Setenv("TEST_REQUIRE_BACKENDS", "1")
	says(t, outcome(t, use).failed, "kafkatest:", "TEST_KAFKA_SEEDS is not set", "go run ./examples/testenv -- go test")
}

func use(tb testing.TB) { Topic(tb, 1) }

func TestUnusableBrokers(t *testing.T) {
	const remedy = "go run ./examples/testenv"
	for _, tt := range []struct {
		name, seeds string
		want        []string
	}{
		{"no server", nobody(t) + "," + nobody(t), []string{"cannot reach the brokers that TEST_KAFKA_SEEDS names", remedy}},
		{"no port", "127.0.0.1", []string{"cannot reach the brokers", "host:port", "missing port", remedy}},
		{"a URL", "kafka://127.0.0.1:9092", []string{"cannot reach the brokers", "host:port", remedy}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("TEST_KAFKA_SEEDS", tt.seeds)
			for _, call := range []func(testing.TB){use, func(tb testing.TB) { Client(tb) }} {
				says(t, outcome(t, call).failed, append(tt.want, "kafkatest:")...)
			}
		})
	}
}

// One broker that is down does not hide the others.
func TestSomeSeedsAreEnough(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("TEST_KAFKA_SEEDS", nobody(t)+","+l.Addr().String())
	if got := Seeds(t); len(got) != 2 {
		t.Errorf("got %v", got)
	}
}

func TestTopicsAreOwn(t *testing.T) {
	if os.Getenv("TEST_KAFKA_SEEDS") == "" {
		use(t) // skips or fails
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client := Client(t)
	var topics []string
	t.Run("use", func(t *testing.T) {
		for partitions := range int32(3) {
			topic := Topic(t, partitions+1, "cleanup.policy", "compact")
			topics = append(topics, topic)
			got := 0
			for got == 0 && ctx.Err() == nil { // brokers learn of a creation in a moment
				got = len(metadata(t, ctx, client, topic))
			}
			if got != int(partitions)+1 {
				t.Errorf("%d partitions, want %d", got, partitions+1)
			}
		}
	})
	if topics[0] == topics[1] || topics[1] == topics[2] {
		t.Errorf("shared: %v", topics)
	}
	for _, topic := range topics {
		for len(metadata(t, ctx, client, topic)) > 0 { // a deletion takes a moment
			if ctx.Err() != nil {
				t.Fatalf("topic %s is left behind", topic)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func metadata(t *testing.T, ctx context.Context, client *kgo.Client, topic string) []kmsg.MetadataResponseTopicPartition {
	t.Helper()
	req := kmsg.NewPtrMetadataRequest()
	rt := kmsg.NewMetadataRequestTopic()
	rt.Topic = &topic
	req.Topics = append(req.Topics, rt)
	resp, err := req.RequestWith(ctx, client)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Topics[0].Partitions
}
