// Package sagaotel reports sagas to OpenTelemetry: a span for each attempt of a
// step, and metrics of the runner and of all sagas.
package sagaotel

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/ashlar-go/ashlar/saga"
)

// Observer returns callbacks for [saga.Options] that count with meter and, if
// tracer is not nil, make a span of each attempt with saga.id, saga.name,
// saga.step and saga.compensating:
//
//	saga.started        instances started here, by saga
//	saga.settled        instances that ended or are stuck, by saga and status
//	saga.taken          instances taken in hand; died=true after a runner's death
//	saga.step.duration  seconds of each attempt, by saga, step, compensating and ok, as a histogram
//	saga.leases.lost    leases lost
//
// IDs are attributes of spans only: there would be as many series as sagas.
func Observer(meter metric.Meter, tracer trace.Tracer) (saga.Observer, error) {
	var firstErr error
	counter := func(name, what, unit string) metric.Int64Counter {
		c, err := meter.Int64Counter(name, metric.WithDescription(what), metric.WithUnit(unit))
		if firstErr == nil {
			firstErr = err
		}
		return c
	}
	started := counter("saga.started", "Instances started.", "{saga}")
	settled := counter("saga.settled", "Instances that ended or are stuck.", "{saga}")
	taken := counter("saga.taken", "Instances taken in hand.", "{saga}")
	lost := counter("saga.leases.lost", "Leases lost.", "{lease}")
	duration, err := meter.Float64Histogram("saga.step.duration",
		metric.WithDescription("For how long one attempt of a step took."), metric.WithUnit("s"))
	if firstErr == nil {
		firstErr = err
	}
	if firstErr != nil {
		return saga.Observer{}, firstErr
	}
	return saga.Observer{
		Started: func(ctx context.Context, in saga.Instance) {
			started.Add(ctx, 1, metric.WithAttributes(attribute.String("saga", in.Saga)))
		},
		Settled: func(ctx context.Context, in saga.Instance) {
			settled.Add(ctx, 1, metric.WithAttributes(attribute.String("saga", in.Saga), attribute.String("status", string(in.Status))))
		},
		Taken: func(ctx context.Context, in saga.Instance) {
			taken.Add(ctx, 1, metric.WithAttributes(attribute.String("saga", in.Saga), attribute.Bool("died", in.Deaths > 0)))
		},
		Lost: func(int) { lost.Add(context.Background(), 1) },
		Stepped: func(ctx context.Context, in saga.Instance, call saga.Call, err error, took time.Duration) {
			duration.Record(ctx, took.Seconds(), metric.WithAttributes(attribute.String("saga", in.Saga),
				attribute.String("step", call.Step), attribute.Bool("compensating", call.Compensating), attribute.Bool("ok", err == nil)))
			if tracer != nil {
				span(ctx, tracer, in, call, err, took)
			}
		},
	}, nil
}

func span(ctx context.Context, tracer trace.Tracer, in saga.Instance, call saga.Call, err error, took time.Duration) {
	name := call.Step
	if call.Compensating {
		name = "compensate " + name
	}
	end := time.Now()
	_, s := tracer.Start(ctx, name, trace.WithTimestamp(end.Add(-took)), trace.WithAttributes(
		attribute.String("saga.id", in.ID), attribute.String("saga.name", in.Saga), attribute.String("saga.step", call.Step),
		attribute.Bool("saga.compensating", call.Compensating), attribute.Int("saga.attempt", call.Attempt),
	))
	if err != nil {
		s.RecordError(err)
		s.SetStatus(codes.Error, err.Error())
	}
	s.End(trace.WithTimestamp(end))
}

// A Sampler tells the state of all sagas, as every store does.
type Sampler interface {
	Sample(ctx context.Context) (saga.Sample, error)
}

// Watch registers gauges that sample the sagas whenever metrics are collected:
//
//	saga.running       running, in hand or waiting
//	saga.compensating  being compensated
//	saga.stuck         in need of a person: alert on it
//	saga.in_hand       in a runner's hand
//	saga.due           should be in a runner's hand and are not
//	saga.lag           seconds for which the oldest of these has been due
//
// One process per store is enough. Unregister the result to stop.
func Watch(meter metric.Meter, s Sampler) (metric.Registration, error) {
	var firstErr error
	keep := func(err error) {
		if firstErr == nil {
			firstErr = err
		}
	}
	values := map[string]func(saga.Sample) int64{
		"saga.running":      func(s saga.Sample) int64 { return s.Running },
		"saga.compensating": func(s saga.Sample) int64 { return s.Compensating },
		"saga.stuck":        func(s saga.Sample) int64 { return s.Stuck },
		"saga.in_hand":      func(s saga.Sample) int64 { return s.InHand },
		"saga.due":          func(s saga.Sample) int64 { return s.Due },
	}
	gauges := make(map[string]metric.Int64ObservableGauge)
	lag, err := meter.Float64ObservableGauge("saga.lag", metric.WithDescription("For how long the oldest saga has been due."), metric.WithUnit("s"))
	keep(err)
	all := []metric.Observable{lag}
	for name := range values {
		g, err := meter.Int64ObservableGauge(name, metric.WithDescription("Sagas by state."), metric.WithUnit("{saga}"))
		keep(err)
		gauges[name], all = g, append(all, g)
	}
	if firstErr != nil {
		return nil, firstErr
	}
	return meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		sample, err := s.Sample(ctx)
		if err != nil {
			return err
		}
		for name, value := range values {
			o.ObserveInt64(gauges[name], value(sample))
		}
		o.ObserveFloat64(lag, sample.Lag.Seconds())
		return nil
	}, all...)
}
