// Package lockotel reports leases and optimistic updates to OpenTelemetry.
package lockotel

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/ashlar-go/ashlar/lock"
)

// Observer returns callbacks for the options of a lock.Locker that count with
// meter, and add an event to the current span:
//
//	lock.acquired  leases
//	lock.refused   callers that gave up because a key was held by another
//	lock.lost      leases that ended under their holder
//	lock.wait      seconds for which callers waited for their lease, as a histogram
//	lock.held      seconds for which leases were held, as a histogram
//
// Keys are no attributes: there would be as many series as keys.
func Observer(meter metric.Meter) (lock.Observer, error) {
	m := &instruments{meter: meter}
	acquired := m.counter("lock.acquired", "Leases.", "{lease}")
	refused := m.counter("lock.refused", "Callers that gave up because a key was held by another.", "{call}")
	lost := m.counter("lock.lost", "Leases that ended under their holder.", "{lease}")
	wait := m.seconds("lock.wait", "For how long callers waited for their lease.")
	held := m.seconds("lock.held", "For how long leases were held.")
	if m.err != nil {
		return lock.Observer{}, m.err
	}
	return lock.Observer{
		Acquired: func(ctx context.Context, keys []string, waited time.Duration) {
			acquired.Add(ctx, 1)
			wait.Record(ctx, waited.Seconds())
			event(ctx, "lock acquired", keys)
		},
		Refused: func(ctx context.Context, keys []string, _ error) {
			refused.Add(ctx, 1)
			event(ctx, "lock refused", keys)
		},
		Released: func(ctx context.Context, _ []string, d time.Duration) { held.Record(ctx, d.Seconds()) },
		Lost: func(ctx context.Context, keys []string, _ error) {
			lost.Add(ctx, 1)
			event(ctx, "lock lost", keys)
		},
	}, nil
}

// UpdateObserver returns callbacks for the options of a lock.Updater that count
// with meter:
//
//	lock.updates    changes that were stored
//	lock.stores     values that were stored, each with one change or more
//	lock.conflicts  values that were not stored because another had been
func UpdateObserver(meter metric.Meter) (lock.UpdateObserver, error) {
	m := &instruments{meter: meter}
	updates := m.counter("lock.updates", "Changes that were stored.", "{change}")
	stores := m.counter("lock.stores", "Values that were stored.", "{store}")
	conflicts := m.counter("lock.conflicts", "Values that were not stored because another had been.", "{store}")
	if m.err != nil {
		return lock.UpdateObserver{}, m.err
	}
	return lock.UpdateObserver{
		Stored: func(ctx context.Context, _ string, changes int) {
			stores.Add(ctx, 1)
			updates.Add(ctx, int64(changes))
		},
		Conflicted: func(ctx context.Context, _ string, _ int, _ error) { conflicts.Add(ctx, 1) },
	}, nil
}

// instruments are made of a meter, and keep its first error.
type instruments struct {
	meter metric.Meter
	err   error
}

func (m *instruments) keep(err error) {
	if m.err == nil {
		m.err = err
	}
}

func (m *instruments) counter(name, what, unit string) metric.Int64Counter {
	c, err := m.meter.Int64Counter(name, metric.WithDescription(what), metric.WithUnit(unit))
	m.keep(err)
	return c
}

func (m *instruments) seconds(name, what string) metric.Float64Histogram {
	h, err := m.meter.Float64Histogram(name, metric.WithDescription(what), metric.WithUnit("s"))
	m.keep(err)
	return h
}

func event(ctx context.Context, name string, keys []string) {
	trace.SpanFromContext(ctx).AddEvent(name, trace.WithAttributes(attribute.StringSlice("lock.keys", keys)))
}
