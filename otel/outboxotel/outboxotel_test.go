package outboxotel_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/trace"

	"github.com/ashlar-go/ashlar/otel/outboxotel"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxtest"
)

func TestTraceGoesOnAtTheConsumer(t *testing.T) {
	otel.SetTextMapPropagator(propagation.TraceContext{})
	id, _ := trace.TraceIDFromHex("0af7651916cd43dd8448eb211c80319c")
	span, _ := trace.SpanIDFromHex("b7ad6b7169203331")
	writer := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{TraceID: id, SpanID: span, TraceFlags: trace.FlagsSampled}))
	headers := outboxotel.Inject(writer)
	got := trace.SpanContextFromContext(outboxotel.Extract(context.Background(), headers))
	if got.TraceID() != id || got.SpanID() != span || !got.IsRemote() || !got.IsSampled() {
		t.Errorf("consumer's span context = %v, from headers %v", got, headers)
	}
	if h := outboxotel.Inject(context.Background()); len(h) != 0 {
		t.Errorf("headers without a trace = %v", h)
	}
}

// collect returns the metrics by name: sums and gauges as their total.
func collect(t *testing.T, r *metric.ManualReader) map[string]float64 {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := r.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	out := make(map[string]float64)
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					out[m.Name] += float64(p.Value)
				}
			case metricdata.Gauge[int64]:
				for _, p := range d.DataPoints {
					out[m.Name] += float64(p.Value)
				}
			case metricdata.Gauge[float64]:
				for _, p := range d.DataPoints {
					out[m.Name] += p.Value
				}
			case metricdata.Histogram[float64]:
				for _, p := range d.DataPoints {
					out[m.Name] += float64(p.Count)
				}
			}
		}
	}
	return out
}

func TestMetrics(t *testing.T) {
	reader := metric.NewManualReader()
	meter := metric.NewMeterProvider(metric.WithReader(reader)).Meter("test")
	store := outbox.NewMemoryStore()
	registration, err := outboxotel.Watch(meter, store)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = registration.Unregister() }()
	observer, err := outboxotel.Observer(meter)
	if err != nil {
		t.Fatal(err)
	}
	err = store.Append(t.Context(), outbox.Message{ID: "good", Topic: "t"}, outbox.Message{ID: "bad", Topic: "t"}, outbox.Message{Topic: "t", Delay: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	before := collect(t, reader)
	if before["outbox.pending"] != 2 || before["outbox.delayed"] != 1 || before["outbox.oldest_age"] <= 0 {
		t.Errorf("before: %v, want 2 pending of some age and 1 delayed", before)
	}
	broker := &outboxtest.Recorder{Fail: func(m outbox.Message) error {
		if m.ID == "bad" {
			return errors.New("poison")
		}
		return nil
	}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- outbox.NewRelay(store, broker, &outbox.RelayOptions{
			Observer: observer, MaxAttempts: 1, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)),
		}).Run(ctx)
	}()
	for len(done) == 0 && collect(t, reader)["outbox.dead"] == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	after := collect(t, reader)
	for name, want := range map[string]float64{
		"outbox.delivered": 1, "outbox.failed": 1, "outbox.dead": 1, "outbox.pending": 0, "outbox.lanes": outbox.Lanes,
	} {
		if after[name] != want {
			t.Errorf("%s = %v, want %v", name, after[name], want)
		}
	}
	if after["outbox.publish.duration"] < 1 {
		t.Error("no publish was timed")
	}
}
