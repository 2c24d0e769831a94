// Package outboxotel reports an outbox to OpenTelemetry: traces that go on from
// the writer to the consumer, and metrics of the relay and its backlog.
package outboxotel

import (
	"context"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"

	"github.com/ashlar-go/ashlar/outbox"
)

// Inject returns the trace context of ctx as headers, by the global propagator.
// It is made for outboxpg.Writer:
//
//	w := &outboxpg.Writer{Inject: outboxotel.Inject}
func Inject(ctx context.Context) map[string]string {
	carrier := propagation.MapCarrier{}
	otel.GetTextMapPropagator().Inject(ctx, carrier)
	return carrier
}

// Extract returns ctx with the trace context of a delivered message's headers,
// so that what a consumer does continues the writer's trace.
func Extract(ctx context.Context, headers map[string]string) context.Context {
	return otel.GetTextMapPropagator().Extract(ctx, propagation.MapCarrier(headers))
}

// Observer returns callbacks for [outbox.RelayOptions] that count with meter:
//
//	outbox.delivered         messages that the broker acknowledged
//	outbox.failed            failures charged to messages; dead=true for the last of one
//	outbox.outages           publishes that got nothing through
//	outbox.publish.duration  seconds for which one publish took, as a histogram
//	outbox.lanes             lanes that the relay holds
func Observer(meter metric.Meter) (outbox.Observer, error) {
	var b instruments
	delivered := b.counter(meter, "outbox.delivered", "Messages that the broker acknowledged.", "{message}")
	failed := b.counter(meter, "outbox.failed", "Failures charged to messages.", "{failure}")
	outages := b.counter(meter, "outbox.outages", "Publishes that got nothing through.", "{publish}")
	duration, err := meter.Float64Histogram("outbox.publish.duration",
		metric.WithDescription("For how long one publish of a batch took."), metric.WithUnit("s"))
	b.keep(err)
	lanes, err := meter.Int64Gauge("outbox.lanes", metric.WithDescription("Lanes that the relay holds."), metric.WithUnit("{lane}"))
	b.keep(err)
	if b.err != nil {
		return outbox.Observer{}, b.err
	}
	return outbox.Observer{
		Delivered: func(ctx context.Context, recs []outbox.Record, took time.Duration) {
			delivered.Add(ctx, int64(len(recs)))
			duration.Record(ctx, took.Seconds())
		},
		Failed: func(ctx context.Context, rec outbox.Record, _ error, dead bool) {
			failed.Add(ctx, 1, metric.WithAttributes(attribute.String("topic", rec.Topic), attribute.Bool("dead", dead)))
		},
		Outage: func(ctx context.Context, _ []outbox.Record, _ error) { outages.Add(ctx, 1) },
		Lanes:  func(held int) { lanes.Record(context.Background(), int64(held)) },
	}, nil
}

// A Sampler tells the state of an outbox, as every store does.
type Sampler interface {
	Sample(ctx context.Context) (outbox.Sample, error)
}

// Watch registers gauges that sample the outbox whenever metrics are collected:
//
//	outbox.pending      records not yet delivered
//	outbox.oldest_age   seconds since the oldest of them was appended
//	outbox.delayed      messages whose delay is not over
//	outbox.parked       records set aside
//	outbox.dead         dead letters
//
// One process per outbox is enough. Unregister the result to stop.
func Watch(meter metric.Meter, s Sampler) (metric.Registration, error) {
	var b instruments
	pending := b.gauge(meter, "outbox.pending", "Records not yet delivered.", "{message}")
	delayed := b.gauge(meter, "outbox.delayed", "Messages whose delay is not over.", "{message}")
	parked := b.gauge(meter, "outbox.parked", "Records set aside.", "{message}")
	dead := b.gauge(meter, "outbox.dead", "Dead letters.", "{message}")
	age, err := meter.Float64ObservableGauge("outbox.oldest_age",
		metric.WithDescription("Age of the oldest record not yet delivered."), metric.WithUnit("s"))
	b.keep(err)
	if b.err != nil {
		return nil, b.err
	}
	return meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		sample, err := s.Sample(ctx)
		if err != nil {
			return err
		}
		o.ObserveInt64(pending, sample.Pending)
		o.ObserveInt64(delayed, sample.Delayed)
		o.ObserveInt64(parked, sample.Parked)
		o.ObserveInt64(dead, sample.Dead)
		o.ObserveFloat64(age, sample.OldestAge.Seconds())
		return nil
	}, pending, delayed, parked, dead, age)
}

// instruments keeps the first error of many.
type instruments struct{ err error }

func (b *instruments) keep(err error) {
	if b.err == nil {
		b.err = err
	}
}

func (b *instruments) counter(m metric.Meter, name, what, unit string) metric.Int64Counter {
	c, err := m.Int64Counter(name, metric.WithDescription(what), metric.WithUnit(unit))
	b.keep(err)
	return c
}

func (b *instruments) gauge(m metric.Meter, name, what, unit string) metric.Int64ObservableGauge {
	g, err := m.Int64ObservableGauge(name, metric.WithDescription(what), metric.WithUnit(unit))
	b.keep(err)
	return g
}
