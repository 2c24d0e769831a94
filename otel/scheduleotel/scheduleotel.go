// Package scheduleotel reports schedules to OpenTelemetry: a span for each run,
// metrics of the runs, and gauges of how the schedules are doing.
package scheduleotel

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/ashlar-go/ashlar/schedule"
)

// Trace returns h with a span around each attempt, of the name of the schedule
// and with the tick, the attempt and the ID of the run.
func Trace(tracer trace.Tracer, h schedule.Handler) schedule.Handler {
	return func(ctx context.Context, run schedule.Run) error {
		ctx, span := tracer.Start(ctx, run.Schedule.Name, trace.WithSpanKind(trace.SpanKindConsumer), trace.WithAttributes(
			attribute.String("schedule.run", run.ID),
			attribute.String("schedule.tick", run.Tick.Format(time.RFC3339Nano)),
			attribute.Int("schedule.attempt", run.Attempt),
			attribute.Bool("schedule.manual", run.Manual),
		))
		defer span.End()
		err := h(ctx, run)
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, err.Error())
		}
		return err
	}
}

// Observer returns callbacks for [schedule.Options] that count with meter, all
// by handler:
//
//	schedule.started   attempts that were started
//	schedule.finished  attempts whose outcome was recorded, by state
//	schedule.lost      attempts whose outcome was not recorded
//	schedule.lateness  seconds from when a run was due to its claim, as a histogram
//	schedule.duration  seconds for which an attempt took, as a histogram
func Observer(meter metric.Meter) (schedule.Observer, error) {
	var b instruments
	started := b.counter(meter, "schedule.started", "Attempts that were started.")
	finished := b.counter(meter, "schedule.finished", "Attempts whose outcome was recorded.")
	lost := b.counter(meter, "schedule.lost", "Attempts whose outcome was not recorded.")
	lateness := b.histogram(meter, "schedule.lateness", "From when a run was due to its claim.")
	duration := b.histogram(meter, "schedule.duration", "For how long an attempt took.")
	if b.err != nil {
		return schedule.Observer{}, b.err
	}
	return schedule.Observer{
		Started: func(ctx context.Context, run schedule.Run) {
			started.Add(ctx, 1, by(run))
			lateness.Record(ctx, max(0, run.Claimed.Sub(run.Due).Seconds()), by(run))
		},
		Finished: func(ctx context.Context, run schedule.Run, state schedule.State, _ error, took time.Duration) {
			finished.Add(ctx, 1, by(run), metric.WithAttributes(attribute.String("state", string(state))))
			duration.Record(ctx, took.Seconds(), by(run))
		},
		Lost: func(ctx context.Context, run schedule.Run, _ error) { lost.Add(ctx, 1, by(run)) },
	}, nil
}

// by is the attribute of a run: a program has few handlers, and perhaps many
// schedules.
func by(run schedule.Run) metric.MeasurementOption {
	return metric.WithAttributes(attribute.String("handler", run.Schedule.Handler))
}

// A Lister has the state of schedules: a *schedulepg.Store.
type Lister interface {
	List(ctx context.Context) ([]schedule.Status, error)
}

// Watch registers gauges that list the schedules whenever metrics are collected,
// each by schedule:
//
//	schedule.lag       seconds by which the next tick or a waiting run is overdue
//	schedule.next      seconds until the next tick, where one is planned
//	schedule.running   runs that are executed
//	schedule.waiting   runs that wait
//	schedule.failing   runs since the last that was done that failed or were lost
//	schedule.missed    ticks that were not run, since the schedule was defined
//
// There are as many series as schedules, so it is for programs that have few.
// One process per store is enough. Unregister the result to stop.
func Watch(meter metric.Meter, l Lister) (metric.Registration, error) {
	var b instruments
	lag := b.seconds(meter, "schedule.lag", "By how much the next tick or a waiting run is overdue.")
	next := b.seconds(meter, "schedule.next", "Until the next tick.")
	running := b.gauge(meter, "schedule.running", "Runs that are executed.")
	waiting := b.gauge(meter, "schedule.waiting", "Runs that wait.")
	failing := b.gauge(meter, "schedule.failing", "Runs since the last that was done that failed or were lost.")
	missed := b.gauge(meter, "schedule.missed", "Ticks that were not run.")
	if b.err != nil {
		return nil, b.err
	}
	return meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		all, err := l.List(ctx)
		if err != nil {
			return err
		}
		for _, st := range all {
			name := metric.WithAttributes(attribute.String("schedule", st.Name))
			o.ObserveFloat64(lag, st.Lag.Seconds(), name)
			if !st.Next.IsZero() && !st.Paused {
				o.ObserveFloat64(next, time.Until(st.Next).Seconds(), name)
			}
			o.ObserveInt64(running, int64(st.Running), name)
			o.ObserveInt64(waiting, int64(st.Waiting), name)
			o.ObserveInt64(failing, int64(st.Failing), name)
			o.ObserveInt64(missed, st.Missed, name)
		}
		return nil
	}, lag, next, running, waiting, failing, missed)
}

// instruments keeps the first error of many.
type instruments struct{ err error }

func (b *instruments) keep(err error) {
	if b.err == nil {
		b.err = err
	}
}

func (b *instruments) counter(m metric.Meter, name, what string) metric.Int64Counter {
	c, err := m.Int64Counter(name, metric.WithDescription(what), metric.WithUnit("{attempt}"))
	b.keep(err)
	return c
}

func (b *instruments) histogram(m metric.Meter, name, what string) metric.Float64Histogram {
	h, err := m.Float64Histogram(name, metric.WithDescription(what), metric.WithUnit("s"))
	b.keep(err)
	return h
}

func (b *instruments) gauge(m metric.Meter, name, what string) metric.Int64ObservableGauge {
	g, err := m.Int64ObservableGauge(name, metric.WithDescription(what), metric.WithUnit("{run}"))
	b.keep(err)
	return g
}

func (b *instruments) seconds(m metric.Meter, name, what string) metric.Float64ObservableGauge {
	g, err := m.Float64ObservableGauge(name, metric.WithDescription(what), metric.WithUnit("s"))
	b.keep(err)
	return g
}
