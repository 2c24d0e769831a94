package idempotency

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/ashlar-go/ashlar/idempotency/internal/execution"
	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/internal/ids"
)

// Options tunes [Do]. The zero value of each field means its default.
type Options struct {
	// Lease is how long a key stays taken after its owner has died. A running
	// owner extends it every third of its length. Default 5 s.
	Lease time.Duration
	// TTL is how long a key is remembered, counted from its claim. It must
	// exceed the time within which anyone still retries. Default 24 h.
	TTL time.Duration
	// Wait is how long a duplicate waits for the execution in progress before it
	// gives up with [ErrInProgress]. Default 0: not at all.
	Wait time.Duration
	// AtMostOnce never repeats work of which it is not known whether it was done:
	// until the TTL ends, such a key answers [ErrUnknown]. Default: it is
	// retried when the lease has ended.
	AtMostOnce bool
	// Release reports whether an error of the work means that nothing was done,
	// so that the key is free at once. Otherwise the outcome is unknown and the
	// key keeps its lease. Default: true, except when the context of the work has
	// ended or the error wraps a context's error, a net.Error, io.EOF or
	// io.ErrUnexpectedEOF.
	Release func(error) bool
	// FinishTimeout bounds the recording of the outcome, which goes on when the
	// caller's context has ended. Default 5 s.
	FinishTimeout time.Duration
	// Logger reports what no caller is told. Default slog.Default().
	Logger *slog.Logger
	// Observer is told what happens.
	Observer Observer
}

// An Observer is a set of callbacks, each of which may be nil. They run within
// the call they tell of and must not block.
type Observer struct {
	// Completed is told of work that was done and recorded.
	Completed func(ctx context.Context, key Key, took time.Duration)
	// Replayed is told of a result that was returned from the record.
	Replayed func(ctx context.Context, key Key)
	// Refused is told of a duplicate that got ErrInProgress, ErrMismatch or ErrUnknown.
	Refused func(ctx context.Context, key Key, err error)
	// Failed is told of work that failed; released means that the key is free at
	// once. The error is nil where the work panicked.
	Failed func(ctx context.Context, key Key, err error, released bool)
	// Lost is told of work that was done but not recorded, with the reason.
	Lost func(ctx context.Context, key Key, err error)
}

func (o *Options) withDefaults() *Options {
	var d Options
	if o != nil {
		d = *o
	}
	setDefault(&d.Lease, 5*time.Second)
	setDefault(&d.TTL, 24*time.Hour)
	setDefault(&d.FinishTimeout, 5*time.Second)
	d.TTL = max(d.TTL, d.Lease)
	if d.Logger == nil {
		d.Logger = slog.Default()
	}
	return &d
}

func setDefault[T int | int64 | time.Duration](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}

// Do runs fn unless the operation that key names was completed before; then it
// returns the recorded result, and replayed is true. A []byte is recorded as it
// is, any other T as JSON.
//
// Of concurrent duplicates one runs; the others get [ErrInProgress], or wait
// (see [Options].Wait). Another fingerprint gets [ErrMismatch]. When fn fails,
// its error is returned as it is and the key is free again, at once or when the
// lease ends (see [Options].Release). When fn succeeds and that cannot be
// recorded, Do returns its value and an error that wraps [ErrNotRecorded].
//
// The context given to fn is cancelled with the cause [ErrLeaseLost] when the
// claim can no longer be extended, before another may take the key over. If the
// process dies, if fn panics or calls [runtime.Goexit], the key is taken until
// the lease ends and can then be run again (see [Options].AtMostOnce): an effect
// outside of the store's own transactions may then happen twice. What must not,
// belongs in one transaction with the record (idempotencypg.DoTx and CompleteTx).
//
// Do is safe for concurrent use. opts may be nil.
func Do[T any](ctx context.Context, store Store, key Key, opts *Options, fn func(ctx context.Context) (T, error)) (v T, replayed bool, err error) {
	x := &call{store: store, key: key, opts: opts.withDefaults()}
	result, replayed, err := x.do(ctx, func(ctx context.Context, _ *execution.Execution) ([]byte, error) {
		var err error
		if v, err = fn(ctx); err != nil {
			return nil, err
		}
		b, err := execution.Encode(v)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotRecorded, err)
		}
		return b, nil
	})
	if err != nil || !replayed {
		return v, false, err
	}
	if v, err = execution.Decode[T](result); err != nil {
		return v, true, fmt.Errorf("idempotency: %w", err)
	}
	return v, true, nil
}

// A busyError is an ErrInProgress that knows when to come back.
type busyError struct{ lease time.Duration }

func (e *busyError) Error() string { return ErrInProgress.Error() }
func (e *busyError) Unwrap() error { return ErrInProgress }

// A call is one use of a key.
type call struct {
	store Store
	key   Key
	opts  *Options
	exec  *execution.Execution
}

type workFunc func(ctx context.Context, e *execution.Execution) ([]byte, error)

func (x *call) do(ctx context.Context, work workFunc) (result []byte, replayed bool, err error) {
	if err := x.key.Validate(); err != nil {
		return nil, false, err
	}
	if ctx.Err() != nil {
		return nil, false, context.Cause(ctx)
	}
	x.exec = &execution.Execution{Scope: x.key.Scope, ID: x.key.ID, Token: ids.New()}
	claim, claimed, err := x.claim(ctx)
	if err != nil {
		return nil, false, err
	}
	if claim.Done {
		if f := x.opts.Observer.Replayed; f != nil {
			f(ctx, x.key)
		}
		return claim.Result, true, nil
	}

	held, drop := keep(execution.With(ctx, x.exec), x, claimed.Add(x.opts.Lease))
	ended := false
	defer func() {
		drop()
		if f := x.opts.Observer.Failed; f != nil && !ended {
			f(ctx, x.key, nil, false) // a panic: it goes on, and the lease ends by itself
		}
	}()
	result, err = work(held, x.exec)
	ended = true
	if err != nil {
		return nil, false, x.fail(ctx, held, err)
	}
	if err := x.record(ctx, result); err != nil {
		return nil, false, x.lost(ctx, err)
	}
	if f := x.opts.Observer.Completed; f != nil {
		f(ctx, x.key, time.Since(claimed))
	}
	return result, false, nil
}

// claim takes the key, waiting as the options say. It returns a time from which
// the lease counts at the latest.
func (x *call) claim(ctx context.Context) (Claim, time.Time, error) {
	req := ClaimRequest{Token: x.exec.Token, Lease: x.opts.Lease, TTL: x.opts.TTL, AtMostOnce: x.opts.AtMostOnce}
	start := time.Now()
	for attempt := 0; ; attempt++ {
		now := time.Now()
		claim, err := x.store.Claim(ctx, x.key, req)
		switch {
		case err == nil:
			return claim, now, nil
		case errors.Is(err, ErrInProgress):
			err = &busyError{claim.Lease}
			if left := x.opts.Wait - time.Since(start); left > 0 {
				if err := execution.Poll(ctx, attempt, left); err != nil {
					return Claim{}, now, err
				}
				continue
			}
		case !errors.Is(err, ErrMismatch) && !errors.Is(err, ErrUnknown):
			// The claim may have been granted all the same.
			x.release(ctx)
			return Claim{}, now, fmt.Errorf("idempotency: claim: %w", err)
		}
		if f := x.opts.Observer.Refused; f != nil {
			f(ctx, x.key, err)
		}
		return Claim{}, now, err
	}
}

// record stores the result, unless the work has seen to that itself.
func (x *call) record(ctx context.Context, result []byte) error {
	if x.exec.Completed() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), x.opts.FinishTimeout)
	defer cancel()
	for attempt := 0; ; attempt++ {
		err := x.store.Complete(ctx, x.key, x.exec.Token, result)
		if err == nil {
			x.exec.SetCompleted()
			return nil
		}
		if errors.Is(err, ErrLeaseLost) || backoff.Sleep(ctx, backoff.Policy{Max: 500 * time.Millisecond}.Next(attempt)) != nil {
			return err
		}
	}
}

func (x *call) lost(ctx context.Context, err error) error {
	if f := x.opts.Observer.Lost; f != nil {
		f(ctx, x.key, err)
	}
	return fmt.Errorf("%w: %w", ErrNotRecorded, err)
}

// fail ends a claim whose work failed.
func (x *call) fail(ctx, held context.Context, err error) error {
	if errors.Is(err, ErrNotRecorded) {
		return x.lost(ctx, err)
	}
	clean := held.Err() == nil && isClean(err)
	if x.opts.Release != nil {
		clean = x.opts.Release(err)
	}
	released := clean && x.release(ctx)
	if f := x.opts.Observer.Failed; f != nil {
		f(ctx, x.key, err, released)
	}
	return err
}

// isClean reports whether err leaves no doubt that something was done after all.
func isClean(err error) bool {
	var network net.Error
	return !errors.As(err, &network) && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) &&
		!errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF)
}

func (x *call) release(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), x.opts.FinishTimeout)
	defer cancel()
	err := x.store.Release(ctx, x.key, x.exec.Token)
	if err != nil && !errors.Is(err, ErrLeaseLost) {
		x.opts.Logger.WarnContext(ctx, "idempotency: a key stays taken until its lease ends",
			"scope", x.key.Scope, "id", x.key.ID, "error", err)
	}
	return err == nil
}
