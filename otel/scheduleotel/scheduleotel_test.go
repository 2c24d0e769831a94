package scheduleotel_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/ashlar-go/ashlar/otel/scheduleotel"
	"github.com/ashlar-go/ashlar/schedule"
)

func TestMetrics(t *testing.T) {
	reader := metric.NewManualReader()
	meter := metric.NewMeterProvider(metric.WithReader(reader)).Meter("test")
	observer, err := scheduleotel.Observer(meter)
	if err != nil {
		t.Fatal(err)
	}
	store := new(schedule.MemoryStore)
	watch, err := scheduleotel.Watch(meter, store)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watch.Unregister() }() // the test is over
	for _, name := range []string{"good", "bad"} {
		if _, err := store.Define(t.Context(), schedule.Definition{Name: name, Spec: "@yearly"}); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Trigger(t.Context(), schedule.Trigger{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan struct{}, 2)
	record := observer.Finished
	observer.Finished = func(ctx context.Context, run schedule.Run, state schedule.State, err error, took time.Duration) {
		record(ctx, run, state, err, took)
		ended <- struct{}{}
	}
	r := schedule.New(store, &schedule.Options{Observer: observer, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	spans := &counting{}
	r.Handle("good", scheduleotel.Trace(spans, func(context.Context, schedule.Run) error { return nil }))
	r.Handle("bad", scheduleotel.Trace(spans, func(context.Context, schedule.Run) error { return errors.New("no") }))
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error)
	go func() { stopped <- r.Run(ctx) }()
	<-ended
	<-ended
	cancel()
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}

	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					got[m.Name] += float64(p.Value)
				}
			case metricdata.Histogram[float64]:
				for _, p := range d.DataPoints {
					got[m.Name] += float64(p.Count)
				}
			case metricdata.Gauge[int64]:
				for _, p := range d.DataPoints {
					got[m.Name] += float64(p.Value)
				}
			case metricdata.Gauge[float64]:
				got[m.Name] += float64(len(d.DataPoints))
			}
		}
	}
	for name, want := range map[string]float64{
		"started": 2, "finished": 2, "lateness": 2, "duration": 2, "failing": 1, "running": 0, "waiting": 0, "missed": 0, "lag": 2,
	} {
		if n, ok := got["schedule."+name]; !ok || n != want {
			t.Errorf("schedule.%s = %v (there: %v), want %v", name, n, ok, want)
		}
	}
	if spans.n != 2 {
		t.Errorf("%d spans of two runs", spans.n)
	}
}

type counting struct {
	noop.Tracer
	mu sync.Mutex
	n  int
}

func (c *counting) Start(ctx context.Context, name string, opts ...trace.SpanStartOption) (context.Context, trace.Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	return c.Tracer.Start(ctx, name, opts...)
}
