package outbox

import (
	"context"
	"errors"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// deliver publishes recs until each is delivered, parked or dead. It returns
// what became of them; done is false if it had to stop before, because ctx
// ended or the lease was lost.
func (l *loop) deliver(ctx context.Context, recs []Record) (s Settlement, done bool) {
	b := &batch{l: l, recs: recs, settled: make([]bool, len(recs))}
	pubCtx, cancel := drainable(ctx, l.r.opts.DrainTimeout)
	defer cancel()
	pubCtx, release := l.keeper.guard(pubCtx)
	defer release()

	todo := b.divert()
	for attempt := 0; len(todo) > 0; attempt++ {
		if attempt > 0 {
			if backoff.Sleep(ctx, backoff.Policy{}.Next(attempt-1)) != nil || pubCtx.Err() != nil {
				break
			}
		}
		todo = b.publish(pubCtx, todo)
	}
	return b.settlement(), len(todo) == 0
}

// A batch is the records of one deliver call and what became of them.
type batch struct {
	l       *loop
	recs    []Record
	settled []bool // by index: delivered, parked or dead
	s       Settlement
}

// keyed names a key within its lane.
type keyed struct {
	lane int
	key  string
}

// divert parks the records whose key already has parked ones, and returns the
// indexes of the rest.
func (b *batch) divert() []int {
	todo := make([]int, 0, len(b.recs))
	for i := range b.recs {
		rec := &b.recs[i]
		if parked := b.l.lanes[rec.Lane].Parked; len(parked) > 0 && !rec.Parked && rec.Key != "" && parked[rec.Key] > 0 {
			b.park(i, nil, 0)
			continue
		}
		todo = append(todo, i)
	}
	return todo
}

// publish makes one attempt at todo and returns what remains of it.
func (b *batch) publish(ctx context.Context, todo []int) []int {
	o := &b.l.r.opts
	msgs := make([]Message, len(todo))
	for j, i := range todo {
		msgs[j] = b.recs[i].Message
	}
	callCtx, cancel := context.WithTimeout(ctx, o.PublishTimeout)
	start := time.Now()
	err := b.l.r.pub.Publish(callCtx, msgs)
	took := time.Since(start)
	cancel()

	if err == nil && len(todo) == len(b.recs) {
		for i := range b.recs {
			b.deliver(i)
		}
		b.published(ctx, b.recs, took)
		return nil
	}
	errs := make([]error, len(todo))
	if err != nil {
		if pe := (*PublishError)(nil); errors.As(err, &pe) && len(pe.Errs) == len(todo) {
			copy(errs, pe.Errs)
		} else {
			for j := range errs {
				errs[j] = err
			}
		}
	}
	var delivered []Record
	for j, i := range todo {
		if errs[j] == nil {
			b.deliver(i)
			delivered = append(delivered, b.recs[i])
		}
	}
	if len(delivered) > 0 {
		b.published(ctx, delivered, took)
	}
	if err == nil {
		return nil
	}
	return b.failed(ctx, todo, errs, len(delivered) > 0)
}

func (b *batch) published(ctx context.Context, recs []Record, took time.Duration) {
	b.l.outage = false
	if f := b.l.r.opts.Observer.Delivered; f != nil {
		f(ctx, recs, took)
	}
}

// failed sorts out the failures of one attempt. A failure is the message's own
// if the publisher says so, or if others got through; else it is the broker's,
// and the message stays in line.
func (b *batch) failed(ctx context.Context, todo []int, errs []error, others bool) (remain []int) {
	o := &b.l.r.opts
	stopped := make(map[keyed]bool) // keys whose earlier record failed by itself
	waiting := false
	for j, i := range todo {
		rec, err := b.recs[i], errs[j]
		if err == nil {
			continue
		}
		k := keyed{rec.Lane, rec.Key}
		behind := rec.Key != "" && stopped[k]
		own := errors.Is(err, ErrRejected) || others || rec.Parked && !b.l.outage && ctx.Err() == nil
		switch {
		case behind && rec.Parked, rec.Parked && !own:
			b.settled[i] = true // stays parked as it is
		case behind:
			b.park(i, nil, 0)
		case !own:
			waiting = true
			remain = append(remain, i)
		default:
			stopped[k] = true
			b.charge(ctx, i, err)
		}
	}
	if waiting {
		b.l.outage = true
		first := firstError(errs)
		if o.Observer.Outage != nil {
			recs := make([]Record, len(remain))
			for j, i := range remain {
				recs[j] = b.recs[i]
			}
			o.Observer.Outage(ctx, recs, first)
		}
		o.Logger.WarnContext(ctx, "outbox: nothing could be published, will try again", "messages", len(remain), "error", first)
	}
	return remain
}

func firstError(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// charge counts a failure of record i, which is then parked or dead.
func (b *batch) charge(ctx context.Context, i int, err error) {
	o := &b.l.r.opts
	rec := &b.recs[i]
	rec.Attempts++
	dead := rec.Attempts >= o.MaxAttempts
	if dead {
		b.s.Dead = append(b.s.Dead, Failure{Record: *rec, Err: err.Error()})
		b.settled[i] = true
		if rec.Parked {
			b.unpark(rec)
		}
	} else {
		b.park(i, err, backoff.Policy{Base: o.RetryBase, Max: o.RetryMax}.Next(rec.Attempts-1))
	}
	if o.Observer.Failed != nil {
		o.Observer.Failed(ctx, *rec, err, dead)
	}
	o.Logger.WarnContext(ctx, "outbox: message failed", "id", rec.ID, "topic", rec.Topic, "key", rec.Key,
		"attempts", rec.Attempts, "dead", dead, "error", err)
}

// park sets record i aside: because of its own failure, or with a nil error
// behind another of its key.
func (b *batch) park(i int, err error, retryIn time.Duration) {
	rec := b.recs[i]
	f := Failure{Record: rec, RetryIn: retryIn}
	if err != nil {
		f.Err = err.Error()
	}
	b.s.Park = append(b.s.Park, f)
	b.settled[i] = true
	if at := time.Now().Add(retryIn); b.l.parked == 0 || at.Before(b.l.retryAt) {
		b.l.retryAt = at
	}
	parked := b.l.lanes[rec.Lane].Parked
	parked[rec.Key] = max(parked[rec.Key], rec.Seq)
	b.l.count()
}

func (b *batch) deliver(i int) {
	b.settled[i] = true
	if rec := &b.recs[i]; rec.Parked {
		b.s.Delivered = append(b.s.Delivered, *rec)
		b.unpark(rec)
	}
}

func (b *batch) unpark(rec *Record) {
	// Those of a key end in their order, so after the highest there is none.
	if parked := b.l.lanes[rec.Lane].Parked; rec.Seq >= parked[rec.Key] {
		delete(parked, rec.Key)
		b.l.count()
	}
}

// settlement returns the outcomes, with each lane's cursor before its first
// record without one.
func (b *batch) settlement() Settlement {
	var seen, stop [Lanes]bool
	for i := range b.recs {
		rec := &b.recs[i]
		ln := b.l.lanes[rec.Lane]
		seen[rec.Lane] = true
		switch {
		case rec.Parked || stop[rec.Lane]:
		case b.settled[i]:
			ln.Cursor = rec.Seq
		default:
			stop[rec.Lane] = true
		}
	}
	for n, ln := range b.l.lanes {
		if seen[n] {
			b.s.Advance = append(b.s.Advance, Lane{Number: n, Epoch: ln.Epoch, Cursor: ln.Cursor})
		}
	}
	return b.s
}
