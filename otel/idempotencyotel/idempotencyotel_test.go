package idempotencyotel_test

import (
	"context"
	"errors"
	"testing"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/otel/idempotencyotel"
)

func TestMetrics(t *testing.T) {
	reader := metric.NewManualReader()
	observer, err := idempotencyotel.Observer(metric.NewMeterProvider(metric.WithReader(reader)).Meter("test"))
	if err != nil {
		t.Fatal(err)
	}
	store := &idempotency.MemoryStore{}
	opts := &idempotency.Options{Observer: observer}
	do := func(id, fingerprint string, fail error) {
		key := idempotency.Key{Scope: idempotency.Global, ID: id, Fingerprint: []byte(fingerprint)}
		_, _, _ = idempotency.Do(t.Context(), store, key, opts, func(context.Context) (int, error) { return 1, fail }) // the metrics tell
	}
	do("a", "x", nil)
	do("a", "x", nil)
	do("a", "y", nil)
	do("b", "x", errors.New("no"))

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
			}
		}
	}
	for _, name := range []string{"completed", "replayed", "refused", "failed", "duration"} {
		if got["idempotency."+name] != 1 {
			t.Errorf("idempotency.%s = %d, want 1", name, got["idempotency."+name])
		}
	}
}
