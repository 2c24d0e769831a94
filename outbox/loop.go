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

	lanes   [Lanes]*lane // nil where the lane is not held
	version int          // of the grant that lanes reflects
	atLeast int          // grants before it are out of date

	ahead    chan fetched // the fetch in flight, or nil
	settling chan settled // the settlement in flight, or nil
	retryAt  time.Time    // when to look for parked records that are due
	outage   bool         // the last publish got nothing through
	idles    int          // empty fetches in a row
	failures int          // errors of the store in a row
	parked   int          // keys with parked records, in all lanes
	leaving  [Lanes]bool  // lanes given up, until a grant confirms it
}

// A lane is the loop's view of a lane it holds.
type lane struct {
	Lane
	next int64 // Seq of the last record fetched
}

type fetched struct {
	recs   []Record
	epochs [Lanes]int64 // of the lanes when they were read
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
	before := l.held()
	var grants [Lanes]*Lane
	for i := range grant.Lanes {
		grants[grant.Lanes[i].Number] = &grant.Lanes[i]
	}
	for n, g := range grants {
		if ln := l.lanes[n]; ln != nil && (g == nil || g.Epoch != ln.Epoch) {
			l.lanes[n] = nil
		}
		switch {
		case g == nil:
			l.leaving[n] = false
		case l.leaving[n]:
		case l.lanes[n] == nil:
			l.lanes[n] = &lane{Lane: *g, next: g.Cursor}
			if g.Parked == nil {
				l.lanes[n].Parked = make(map[string]int64)
			}
			l.retryAt = time.Time{}
		default:
			// Without a key they end in any order, so the highest tells nothing.
			if seq, ok := g.Parked[""]; ok {
				l.lanes[n].Parked[""] = max(l.lanes[n].Parked[""], seq)
			}
		}
	}
	l.shed(grant.Share)
	l.count()
	if f := l.r.opts.Observer.Lanes; f != nil && l.held() != before {
		f(l.held())
	}
}

func (l *loop) held() (n int) {
	for _, ln := range l.lanes {
		if ln != nil {
			n++
		}
	}
	return n
}

// shed gives lanes up that other relays should have, after their last batch.
func (l *loop) shed(share int) {
	if l.held() <= share {
		return
	}
	if l.waitSettled() != nil {
		l.reset()
		return
	}
	var surplus []int
	for n := Lanes - 1; n >= 0 && l.held() > share; n-- {
		if l.lanes[n] != nil {
			surplus = append(surplus, n)
			l.lanes[n], l.leaving[n] = nil, true
		}
	}
	l.keeper.giveUp(surplus)
}

func (l *loop) count() {
	l.parked = 0
	for _, ln := range l.lanes {
		if ln != nil {
			l.parked += len(ln.Parked)
		}
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
		if err := l.waitSettled(); err != nil {
			return nil, err
		}
	}
	from, epochs := l.positions(retry)
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
	return l.accept(fetched{recs: recs, epochs: epochs}), nil
}

func (l *loop) readAhead(ctx context.Context) {
	from, epochs := l.positions(false)
	if len(from) == 0 {
		return
	}
	c := make(chan fetched, 1)
	l.ahead = c
	go func() {
		recs, err := l.r.store.Fetch(ctx, from, l.r.opts.BatchSize)
		c <- fetched{recs: recs, epochs: epochs, err: err}
	}()
}

func (l *loop) positions(retry bool) (from []Position, epochs [Lanes]int64) {
	for n, ln := range l.lanes {
		if ln != nil {
			from = append(from, Position{Lane: n, After: ln.next, Retry: retry && len(ln.Parked) > 0})
			epochs[n] = ln.Epoch
		}
	}
	return from, epochs
}

// accept drops the records of lanes that changed hands since they were read,
// and moves the positions past the rest.
func (l *loop) accept(f fetched) []Record {
	current := func(rec *Record) bool {
		ln := l.lanes[rec.Lane]
		return ln != nil && ln.Epoch == f.epochs[rec.Lane]
	}
	n := 0
	for i := range f.recs {
		rec := &f.recs[i]
		if !current(rec) {
			continue
		}
		if !rec.Parked {
			l.lanes[rec.Lane].next = rec.Seq
		}
		if n != i {
			f.recs[n] = *rec
		}
		n++
	}
	return f.recs[:n]
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
				l.lanes[n] = nil
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
	clear(l.lanes[:])
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
