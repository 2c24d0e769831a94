package outboxkafka_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/internal/kafkatest"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxkafka"
	"github.com/ashlar-go/ashlar/outbox/outboxtest"
)

func TestPublisher(t *testing.T) {
	outboxtest.TestPublisher(t, func(t *testing.T) outboxtest.Broker {
		topic := kafkatest.Topic(t, 4, "max.message.bytes", "2097152")
		client := kafkatest.Client(t, kgo.ProducerBatchMaxBytes(2<<20), kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)))
		return outboxtest.Broker{
			Publisher: outboxkafka.New(client), Topic: topic, MaxPayload: 2 << 20,
			Read: func(t *testing.T, n int) []outbox.Message { return read(t, topic, n) },
		}
	})
}

func read(t *testing.T, topic string, n int) []outbox.Message {
	t.Helper()
	client := kafkatest.Client(t, kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var msgs []outbox.Message
	for len(msgs) < n {
		fetches := client.PollFetches(ctx)
		if ctx.Err() != nil {
			t.Fatalf("received %d of %d messages", len(msgs), n)
		}
		fetches.EachRecord(func(r *kgo.Record) {
			m := outbox.Message{ID: outboxkafka.MessageID(r), Topic: r.Topic, Key: string(r.Key), Payload: r.Value}
			for _, h := range r.Headers {
				if h.Key != outboxkafka.HeaderID {
					if m.Headers == nil {
						m.Headers = make(map[string]string)
					}
					m.Headers[h.Key] = string(h.Value)
				}
			}
			msgs = append(msgs, m)
		})
	}
	return msgs
}

func TestUnknownTopicIsRejected(t *testing.T) {
	client := kafkatest.Client(t, kgo.UnknownTopicRetries(1))
	err := outboxkafka.New(client).Publish(t.Context(), []outbox.Message{{ID: "1", Topic: "no/such topic"}})
	var pe *outbox.PublishError
	if !asRejected(err, &pe) {
		t.Errorf("Publish to a topic that cannot exist = %v, want ErrRejected", err)
	}
}

func TestMessageID(t *testing.T) {
	if id := outboxkafka.MessageID(&kgo.Record{}); id != "" {
		t.Errorf("MessageID of a foreign record = %q", id)
	}
}

func asRejected(err error, pe **outbox.PublishError) bool {
	return errors.As(err, pe) && errors.Is((*pe).Errs[0], outbox.ErrRejected)
}
