package outboxtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/ashlar-go/ashlar/outbox"
)

// A Broker is a publisher under test.
type Broker struct {
	Publisher outbox.Publisher
	// Topic is where the messages of the test go.
	Topic string
	// Read returns the first n messages that a consumer of Topic receives, in
	// the order of their keys: messages of one key in the order received.
	Read func(t *testing.T, n int) []outbox.Message
	// MaxPayload is the size of a payload that is surely refused; zero if none is.
	MaxPayload int
}

// TestPublisher checks a publisher. open returns an empty topic for each subtest.
func TestPublisher(t *testing.T, open func(t *testing.T) Broker) {
	t.Run("Content", func(t *testing.T) {
		b := open(t)
		want := []outbox.Message{
			{ID: "1", Topic: b.Topic, Key: "k", Payload: []byte{0, 255}, Headers: map[string]string{"a": "b", "c": ""}},
			{ID: "2", Topic: b.Topic, Key: "k", Payload: nil},
			{ID: "3", Topic: b.Topic, Key: "k", Payload: bytes.Repeat([]byte("x"), 1<<20)},
		}
		must(t, b.Publisher.Publish(t.Context(), want))
		for i, got := range b.Read(t, len(want)) {
			w := want[i]
			if got.ID != w.ID || got.Key != w.Key || !bytes.Equal(got.Payload, w.Payload) || !maps.Equal(got.Headers, w.Headers) {
				t.Errorf("message %d: got %.200q, want %.200q", i, fmt.Sprint(got), fmt.Sprint(w))
			}
		}
		must(t, b.Publisher.Publish(t.Context(), nil))
	})
	t.Run("OrderOfKeys", func(t *testing.T) {
		b := open(t)
		want := make(map[string][]string)
		n := 0
		for range 5 {
			var batch []outbox.Message
			for range 400 {
				m := outbox.Message{ID: fmt.Sprint(n), Topic: b.Topic, Key: fmt.Sprint("k", n%7)}
				want[m.Key] = append(want[m.Key], m.ID)
				batch = append(batch, m)
				n++
			}
			must(t, b.Publisher.Publish(t.Context(), batch))
		}
		got := make(map[string][]string)
		for _, m := range b.Read(t, n) {
			got[m.Key] = append(got[m.Key], m.ID)
		}
		for key := range want {
			if !slices.Equal(got[key], want[key]) {
				t.Errorf("key %s: received in another order than published", key)
			}
		}
	})
	t.Run("RejectedMessage", func(t *testing.T) {
		b := open(t)
		if b.MaxPayload == 0 {
			t.Skip("this publisher refuses no size")
		}
		err := b.Publisher.Publish(t.Context(), []outbox.Message{
			{ID: "a1", Topic: b.Topic, Key: "a"},
			{ID: "a2", Topic: b.Topic, Key: "a", Payload: make([]byte, b.MaxPayload)},
			{ID: "b1", Topic: b.Topic, Key: "b"},
			{ID: "a3", Topic: b.Topic, Key: "a"},
		})
		var pe *outbox.PublishError
		if !errors.As(err, &pe) || len(pe.Errs) != 4 {
			t.Fatalf("Publish = %v, want a PublishError of 4", err)
		}
		if pe.Errs[0] != nil || pe.Errs[2] != nil || !errors.Is(pe.Errs[1], outbox.ErrRejected) || pe.Errs[3] == nil {
			t.Errorf("errors %q, want the second rejected, the last held back, the others delivered", pe.Errs)
		}
		must(t, b.Publisher.Publish(t.Context(), []outbox.Message{{ID: "end", Topic: b.Topic, Key: "a"}}))
		got := make(map[string][]string)
		for _, m := range b.Read(t, 3) {
			got[m.Key] = append(got[m.Key], m.ID)
		}
		if !slices.Equal(got["a"], []string{"a1", "end"}) || !slices.Equal(got["b"], []string{"b1"}) {
			t.Errorf("received %v, want a1, end and b1: a3 must not overtake a2", got)
		}
	})
	t.Run("CancelledContext", func(t *testing.T) {
		b := open(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := b.Publisher.Publish(ctx, []outbox.Message{{ID: "x", Topic: b.Topic}}); err == nil {
			t.Error("Publish on a cancelled context = nil")
		}
		must(t, b.Publisher.Publish(t.Context(), []outbox.Message{{ID: "y", Topic: b.Topic}}))
	})
}
