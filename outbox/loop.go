package outbox

import (
	"context"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// A loop is one run of a relay: it fetches a batch, publishes it while the next
// one is fetched and the outcome of the one before is stored.
type loop struct {
	r      *Relay
	keeper *keeper

	lanes   map[int]*lane
	version int // of the grant that lanes reflects
	atLeast int // grants before it are out of date

	ahead    chan fetched     // the fetch in flight, or nil
	settling chan settled     // the settlement in flight, or nil
	retryAt  time.Time        // when to look for parked records that are due
	outage   bool             // the last publish got nothing through
	idles    int              // empty fetches in a row
	failures int              // errors of the store in a row
	parked   int              // keys with parked records, in all lanes
	epochs   map[int]int64    // scratch of positions
	leaving  map[int]struct{} // lanes given up, until a grant confirms it
}

// A lane is the loop's view of a lane it holds.
type lane struct {
	Lane
	next int64 // Seq of the last record fetched
}

type fetched struct {
	recs   []Record
	epochs map[int]int64 // of the lanes when they were read
	err    error
}

type settled struct {
	advance []Lane
	lost    []int
	err     error
}

func (l *loop) run(ctx context.Context) {
	for ctx.Err() == nil {
		l.sync()
		recs, err := l.next(ctx)
		if err != nil {
			l.trouble(ctx, "fetch failed", err)
			continue
		}
		if len(recs) == 0 {
			l.idle(ctx)
			continue
		}
		l.idles, l.failures = 0, 0
		if !l.retryDue() {
			l.readAhead(ctx)
		}
		s, done := l.deliver(ctx, recs)
		if err := l.settle(ctx, s); err != nil {
			l.trouble(ctx, "outcome not stored", err)
		} else if !done {
			l.reset()
		}
	}
	l.reset()
}

// sync takes the newest grant over.
func (l *loop) sync() {
	grant, version := l.keeper.current()
	if version == l.version || version < l.atLeast {
		return
	}
	l.version = version
	before := len(l.lanes)
	held := make(map[int]Lane, len(grant.Lanes))
	for _, g := range grant.Lanes {
		held[g.Number] = g
	}
	for n, ln := range l.lanes {
		if g, ok := held[n]; !ok || g.Epoch != ln.Epoch {
			delete(l.lanes, n)
		}
	}
	for n := range l.leaving {
		if _, ok := held[n]; !ok {
			delete(l.leaving, n)
		}
	}
	for n, g := range held {
		if _, leaving := l.leaving[n]; l.lanes[n] == nil && !leaving {
			if g.Parked == nil {
				g.Parked = make(map[string]int64)
			}
			l.lanes[n] = &lane{Lane: g, next: g.Cursor}
			l.retryAt = time.Time{}
		} else if seq, ok := g.Parked[""]; ok && !leaving {
			// Without a key they end in any order, so the highest tells nothing.
			l.lanes[n].Parked[""] = max(l.lanes[n].Parked[""], seq)
		}
	}
	l.shed(grant.Share)
	l.count()
	if f := l.r.opts.Observer.Lanes; f != nil && len(l.lanes) != before {
		f(len(l.lanes))
	}
}

// shed gives lanes up that other relays should have, after their last batch.
func (l *loop) shed(share int) {
	var surplus []int
	for n := Lanes - 1; n >= 0 && len(l.lanes)-len(surplus) > share; n-- {
		if l.lanes[n] != nil {
			surplus = append(surplus, n)
		}
	}
	if len(surplus) == 0 {
		return
	}
	l.waitSettled()
	if l.leaving == nil {
		l.leaving = make(map[int]struct{})
	}
	for _, n := range surplus {
		delete(l.lanes, n)
		l.leaving[n] = struct{}{}
	}
	l.keeper.giveUp(surplus)
}

func (l *loop) count() {
	l.parked = 0
	for _, ln := range l.lanes {
		l.parked += len(ln.Parked)
	}
}

func (l *loop) retryDue() bool {
	return l.parked > 0 && !l.outage && !time.Now().Before(l.retryAt)
}

// next returns records to publish: those read ahead, or else fresh ones.
func (l *loop) next(ctx context.Context) ([]Record, error) {
	if l.ahead != nil {
		f := <-l.ahead
		l.ahead = nil
		if f.err != nil {
			return nil, f.err
		}
		if recs := l.accept(f); len(recs) > 0 {
			return recs, nil
		}
	}
	retry := l.retryDue()
	if retry {
		// What is being settled must not be read as parked again.
		l.waitSettled()
	}
	from := l.positions(retry)
	if len(from) == 0 {
		return nil, nil
	}
	recs, err := l.r.store.Fetch(ctx, from, l.r.opts.BatchSize)
	if err != nil {
		return nil, err
	}
	if retry {
		l.retryAt = time.Now().Add(l.r.opts.RetryBase)
		for _, rec := range recs {
			if rec.Parked {
				l.retryAt = time.Time{}
				break
			}
		}
	}
	return l.accept(fetched{recs: recs, epochs: l.epochs}), nil
}

func (l *loop) readAhead(ctx context.Context) {
	from := l.positions(false)
	if len(from) == 0 {
		return
	}
	epochs, c := l.epochs, make(chan fetched, 1)
	l.ahead = c
	go func() {
		recs, err := l.r.store.Fetch(ctx, from, l.r.opts.BatchSize)
		c <- fetched{recs: recs, epochs: epochs, err: err}
	}()
}

func (l *loop) positions(retry bool) []Position {
	from := make([]Position, 0, len(l.lanes))
	l.epochs = make(map[int]int64, len(l.lanes))
	for n := range Lanes {
		if ln := l.lanes[n]; ln != nil {
			from = append(from, Position{Lane: n, After: ln.next, Retry: retry && len(ln.Parked) > 0})
			l.epochs[n] = ln.Epoch
		}
	}
	return from
}

// accept drops the records of lanes that changed hands since they were read,
// and moves the positions past the rest.
func (l *loop) accept(f fetched) []Record {
	kept := f.recs[:0]
	for _, rec := range f.recs {
		ln := l.lanes[rec.Lane]
		if ln == nil || ln.Epoch != f.epochs[rec.Lane] {
			continue
		}
		if !rec.Parked {
			ln.next = rec.Seq
		}
		kept = append(kept, rec)
	}
	return kept
}

// settle stores s while the loop goes on, after what is being stored now.
func (l *loop) settle(ctx context.Context, s Settlement) error {
	if err := l.waitSettled(); err != nil {
		return err
	}
	if len(s.Advance) == 0 {
		return nil
	}
	c := make(chan settled, 1)
	l.settling = c
	go func() {
		ctx, cancel := drainable(ctx, l.r.opts.DrainTimeout)
		defer cancel()
		for attempt := 0; ; attempt++ {
			// Storing the same outcome twice is harmless, so a lost reply is
			// simply asked for again, as long as the lease holds.
			lost, err := l.r.store.Settle(ctx, s)
			if err == nil || !l.keeper.held() || backoff.Sleep(ctx, backoff.Policy{}.Next(attempt)) != nil {
				c <- settled{advance: s.Advance, lost: lost, err: err}
				return
			}
		}
	}()
	return nil
}

// waitSettled waits for the settlement in flight and drops the lanes whose
// fence refused it.
func (l *loop) waitSettled() error {
	if l.settling == nil {
		return nil
	}
	res := <-l.settling
	l.settling = nil
	for _, n := range res.lost {
		for _, a := range res.advance {
			if ln := l.lanes[n]; ln != nil && a.Number == n && a.Epoch == ln.Epoch {
				delete(l.lanes, n)
			}
		}
	}
	l.count()
	return res.err
}

// reset forgets everything but what a new grant will tell.
func (l *loop) reset() {
	if l.ahead != nil {
		<-l.ahead
		l.ahead = nil
	}
	_ = l.waitSettled() // everything is read anew in any case
	clear(l.lanes)
	l.parked = 0
	_, version := l.keeper.current()
	l.atLeast = version + 1
	signal(l.keeper.kick)
}

func (l *loop) trouble(ctx context.Context, what string, err error) {
	if ctx.Err() == nil {
		l.r.opts.Logger.WarnContext(ctx, "outbox: "+what, "error", err)
	}
	l.reset()
	_ = backoff.Sleep(ctx, backoff.Policy{}.Next(l.failures)) // run sees that ctx ended
	l.failures++
}

// idle waits for a wake-up, a new grant or the next poll.
func (l *loop) idle(ctx context.Context) {
	wait := l.r.opts.Poll
	if l.idles < 20 {
		wait = min(wait, time.Millisecond<<l.idles)
		l.idles++
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-l.r.wake:
		l.idles = 0
	case <-l.keeper.changed:
	case <-t.C:
	}
}

// drainable returns a context that outlives ctx by timeout.
func drainable(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		t := time.AfterFunc(timeout, cancel)
		context.AfterFunc(out, func() { t.Stop() })
	})
	return out, func() { stop(); cancel() }
}
