// Package idempotencyotel reports idempotent work to OpenTelemetry.
package idempotencyotel

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/ashlar-go/ashlar/idempotency"
)

// Observer returns callbacks for the options of package idempotency that count
// with meter and mark the current span with idempotency.outcome:
//
//	idempotency.completed  work that was done and recorded
//	idempotency.replayed   duplicates that got the recorded result
//	idempotency.refused    duplicates that were refused, by reason
//	idempotency.failed     work that failed; released=true where the key is free at once
//	idempotency.lost       work that was done but not recorded
//	idempotency.duration   seconds for which completed work took, as a histogram
//
// Keys are no attributes: there would be as many series as keys.
func Observer(meter metric.Meter) (idempotency.Observer, error) {
	var firstErr error
	keep := func(err error) {
		if firstErr == nil {
			firstErr = err
		}
	}
	counter := func(name, what string) metric.Int64Counter {
		c, err := meter.Int64Counter(name, metric.WithDescription(what), metric.WithUnit("{operation}"))
		keep(err)
		return c
	}
	completed := counter("idempotency.completed", "Work that was done and recorded.")
	replayed := counter("idempotency.replayed", "Duplicates that got the recorded result.")
	refused := counter("idempotency.refused", "Duplicates that were refused.")
	failed := counter("idempotency.failed", "Work that failed.")
	lost := counter("idempotency.lost", "Work that was done but not recorded.")
	duration, err := meter.Float64Histogram("idempotency.duration",
		metric.WithDescription("For how long completed work took."), metric.WithUnit("s"))
	keep(err)
	if firstErr != nil {
		return idempotency.Observer{}, firstErr
	}
	return idempotency.Observer{
		Completed: func(ctx context.Context, _ idempotency.Key, took time.Duration) {
			completed.Add(ctx, 1)
			duration.Record(ctx, took.Seconds())
			mark(ctx, "completed")
		},
		Replayed: func(ctx context.Context, _ idempotency.Key) {
			replayed.Add(ctx, 1)
			mark(ctx, "replayed")
		},
		Refused: func(ctx context.Context, _ idempotency.Key, err error) {
			refused.Add(ctx, 1, metric.WithAttributes(attribute.String("reason", reason(err))))
			mark(ctx, "refused")
		},
		Failed: func(ctx context.Context, _ idempotency.Key, _ error, released bool) {
			failed.Add(ctx, 1, metric.WithAttributes(attribute.Bool("released", released)))
			mark(ctx, "failed")
		},
		Lost: func(ctx context.Context, _ idempotency.Key, _ error) {
			lost.Add(ctx, 1)
			mark(ctx, "lost")
		},
	}, nil
}

func mark(ctx context.Context, outcome string) {
	trace.SpanFromContext(ctx).SetAttributes(attribute.String("idempotency.outcome", outcome))
}

func reason(err error) string {
	switch {
	case errors.Is(err, idempotency.ErrInProgress):
		return "in progress"
	case errors.Is(err, idempotency.ErrMismatch):
		return "mismatch"
	case errors.Is(err, idempotency.ErrUnknown):
		return "unknown outcome"
	default:
		return "other"
	}
}
