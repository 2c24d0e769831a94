package lockotel_test

import (
	"context"
	"errors"
	"testing"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/otel/lockotel"
)

func TestMetrics(t *testing.T) {
	reader := metric.NewManualReader()
	meter := metric.NewMeterProvider(metric.WithReader(reader)).Meter("test")
	observer, err := lockotel.Observer(meter)
	if err != nil {
		t.Fatal(err)
	}
	updates, err := lockotel.UpdateObserver(meter)
	if err != nil {
		t.Fatal(err)
	}
	store := new(lock.MemoryStore)
	locker := lock.New(store, &lock.Options{Observer: observer})
	lease, err := locker.Lock(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := locker.TryLock(t.Context(), "k"); !errors.Is(err, lock.ErrHeld) {
		t.Fatal(err)
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	observer.Lost(t.Context(), []string{"k"}, lock.ErrLost)

	r := &conflicting{}
	u := lock.NewUpdater[int](r, &lock.UpdateOptions{Observer: updates})
	if _, _, err := u.Update(t.Context(), "k", func(n int) (int, error) { return n + 1, nil }); err != nil {
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
			}
		}
	}
	for _, name := range []string{"acquired", "refused", "lost", "wait", "held", "updates", "stores", "conflicts"} {
		if got["lock."+name] != 1 {
			t.Errorf("lock.%s = %d, want 1", name, got["lock."+name])
		}
	}
}

// A conflicting register is overwritten once before it stores.
type conflicting struct {
	lock.MemoryRegister[int]
	done bool
}

func (r *conflicting) Store(ctx context.Context, key string, value int, version int64) (int64, error) {
	if !r.done {
		r.done = true
		if _, err := r.MemoryRegister.Store(ctx, key, 10, version); err != nil {
			return 0, err
		}
	}
	return r.MemoryRegister.Store(ctx, key, value, version)
}
