// Package outboxkafka publishes outbox messages to Kafka with franz-go.
package outboxkafka

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/outbox"
)

// HeaderID is the record header that carries a message's ID.
const HeaderID = "message-id"

// A Publisher is an [outbox.Publisher] that produces to Kafka: a message's topic,
// key and payload become those of a record, its ID and headers the record's
// headers. It is safe for concurrent use.
//
// The client must use franz-go's defaults for what order rests on: idempotent
// production with acks from all replicas, and a partitioner that sends equal
// keys to the same partition. Its ProducerBatchMaxBytes must not be above the
// topic's max.message.bytes. A RecordDeliveryTimeout is not needed: the relay
// bounds each call.
type Publisher struct {
	client   *kgo.Client
	maxBytes int
	inflight chan struct{} // held while records of a call are with the client
}

var _ outbox.Publisher = (*Publisher)(nil)

// New returns a publisher that uses client, which stays the caller's.
func New(client *kgo.Client) *Publisher {
	if client == nil {
		panic("outboxkafka: New needs a client")
	}
	p := &Publisher{client: client, maxBytes: 1 << 20, inflight: make(chan struct{}, 1)}
	if n, ok := client.OptValue(kgo.ProducerBatchMaxBytes).(int32); ok {
		p.maxBytes = int(n)
	}
	return p
}

// rejections are the broker's answers that lie in the message or its topic.
var rejections = []error{
	kerr.MessageTooLarge, kerr.RecordListTooLarge, kerr.InvalidRecord, kerr.CorruptMessage, kerr.InvalidTopicException,
	kerr.UnknownTopicOrPartition, kerr.UnknownTopicID, kerr.TopicAuthorizationFailed, kerr.InvalidTimestamp, kerr.PolicyViolation,
}

// Publish implements [outbox.Publisher]. It returns when every record is
// acknowledged or has failed, or when ctx ends; a record that is still under way
// then may be delivered nevertheless, and the next call waits for it first.
func (p *Publisher) Publish(ctx context.Context, msgs []outbox.Message) error {
	select {
	case p.inflight <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("outboxkafka: records of an earlier call are still under way: %w", context.Cause(ctx))
	}
	var mu sync.Mutex
	errs := make([]error, len(msgs))
	returned := false
	var wg sync.WaitGroup
	stopped := make(map[string]error)
	for i, m := range msgs {
		if m.Key != "" {
			if err := stopped[m.Key]; err != nil {
				errs[i] = fmt.Errorf("outboxkafka: after a failure of its key: %w", err)
				continue
			}
		}
		if size := wireSize(m); size > p.maxBytes {
			err := fmt.Errorf("outboxkafka: %w: %d bytes, the client's ProducerBatchMaxBytes is %d", outbox.ErrRejected, size, p.maxBytes)
			errs[i], stopped[m.Key] = err, err
			continue
		}
		wg.Add(1)
		p.client.Produce(ctx, record(m), func(_ *kgo.Record, err error) {
			if err != nil {
				mu.Lock()
				if !returned {
					errs[i] = classify(err)
				}
				mu.Unlock()
			}
			wg.Done()
		})
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		<-p.inflight
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		select {
		case <-done:
		default:
			mu.Lock()
			returned = true
			mu.Unlock()
			return fmt.Errorf("outboxkafka: outcome unknown: %w", context.Cause(ctx))
		}
	}
	if slices.ContainsFunc(errs, func(err error) bool { return err != nil }) {
		return &outbox.PublishError{Errs: errs}
	}
	return nil
}

func classify(err error) error {
	for _, r := range rejections {
		if errors.Is(err, r) {
			return fmt.Errorf("outboxkafka: %w: %w", outbox.ErrRejected, err)
		}
	}
	return fmt.Errorf("outboxkafka: %w", err)
}

func record(m outbox.Message) *kgo.Record {
	r := &kgo.Record{Topic: m.Topic, Value: m.Payload, Headers: make([]kgo.RecordHeader, 0, 1+len(m.Headers))}
	if m.Key != "" {
		r.Key = []byte(m.Key)
	}
	r.Headers = append(r.Headers, kgo.RecordHeader{Key: HeaderID, Value: []byte(m.ID)})
	if len(m.Headers) > 0 {
		for _, name := range slices.Sorted(maps.Keys(m.Headers)) {
			r.Headers = append(r.Headers, kgo.RecordHeader{Key: name, Value: []byte(m.Headers[name])})
		}
	}
	return r
}

// wireSize is an upper bound of the size of a batch of m alone.
func wireSize(m outbox.Message) int {
	const batch, field = 61 + 4 + 4, 5 + 1
	n := batch + 4*field + len(m.Key) + len(m.Payload) + len(HeaderID) + len(m.ID) + 2*field
	for name, value := range m.Headers {
		n += len(name) + len(value) + 2*field
	}
	return n
}

// MessageID returns the ID of the message that r was produced from, or "" if it
// came from elsewhere.
func MessageID(r *kgo.Record) string {
	for _, h := range r.Headers {
		if h.Key == HeaderID {
			return string(h.Value)
		}
	}
	return ""
}
