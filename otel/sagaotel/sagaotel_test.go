package sagaotel_test

import (
	"context"
	"errors"
	"testing"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/ashlar-go/ashlar/otel/sagaotel"
	"github.com/ashlar-go/ashlar/saga"
)

func TestMetrics(t *testing.T) {
	reader := metric.NewManualReader()
	meter := metric.NewMeterProvider(metric.WithReader(reader)).Meter("test")
	observer, err := sagaotel.Observer(meter, nil)
	if err != nil {
		t.Fatal(err)
	}
	store := &saga.MemoryStore{}
	if _, err := sagaotel.Watch(meter, store); err != nil {
		t.Fatal(err)
	}
	nothing := func(context.Context, *int) error { return nil }
	s := saga.New[int]("s", 1).
		Step("one", nothing, nothing, nil).
		Step("two", func(context.Context, *int) error { return saga.Abort(errors.New("no")) }, nil, nil).
		Build()
	r := saga.NewRunner(store, []saga.Definition{s}, &saga.Options{Observer: observer})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	if _, err := s.Start(ctx, r, "1", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Wait(ctx, "1"); err != nil {
		t.Fatal(err)
	}
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	got := make(map[string]int64)
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					got[m.Name] += p.Value
				}
			case metricdata.Histogram[float64]:
				for _, p := range d.DataPoints {
					got[m.Name] += int64(p.Count)
				}
			case metricdata.Gauge[int64]:
				got[m.Name] += 100 + d.DataPoints[0].Value
			}
		}
	}
	for name, want := range map[string]int64{"saga.started": 1, "saga.settled": 1, "saga.step.duration": 3, "saga.stuck": 100, "saga.running": 100} {
		if got[name] != want {
			t.Errorf("%s = %d, want %d", name, got[name], want)
		}
	}
}
