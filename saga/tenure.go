package saga

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/internal/ids"
)

var (
	errNotDrained = errors.New("saga: steps go on although their contexts have ended")
	errDrained    = errors.New("saga: the runner is shut down")
)

// A tenure is a runner under one name: from the first lease until the lease is
// lost or Run ends. What it stores is fenced by that name.
type tenure struct {
	r       *Runner
	id      string
	ctx     context.Context // of the steps: ends with the lease, or with the drain
	end     context.CancelCauseFunc
	creates *group[Instance, string]
	saves   *group[Checkpoint, Ack]
	wg      sync.WaitGroup

	mu       sync.Mutex
	execs    map[string]*exec // in hand; nil while it is being started
	until    time.Time        // the lease surely holds before it
	draining bool
	epoch    time.Time // a moment by the store's clock,
	seen     time.Time // and when it was, by this process's
}

func newTenure(r *Runner) *tenure {
	t := &tenure{r: r, id: ids.New(), execs: make(map[string]*exec)}
	t.ctx, t.end = context.WithCancelCause(context.Background())
	t.creates = &group[Instance, string]{ctx: t.ctx, max: 256, call: r.store.Create}
	t.saves = &group[Checkpoint, Ack]{ctx: t.ctx, max: 256, call: t.save}
	return t
}

// now is the store's clock, as far as it is known here.
func (t *tenure) now() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.epoch.Add(time.Since(t.seen)).Round(time.Microsecond)
}

func (t *tenure) run(ctx context.Context) error {
	next, err := t.lease(ctx, true, true)
	if err != nil {
		t.end(err)
		return err
	}
	t.r.mu.Lock()
	t.r.tenure = t
	t.r.mu.Unlock()
	beats := make(chan error, 1)
	stop := make(chan struct{})
	go func() {
		err := t.beat(stop)
		if err != nil {
			t.end(err)
		}
		beats <- err
	}()
	err = t.look(ctx, next, beats)
	t.r.mu.Lock()
	t.r.tenure = nil
	t.r.mu.Unlock()
	if err != nil { // the lease is lost
		t.r.lost(t.inHand())
		t.end(err)
		t.wg.Wait()
		return err
	}
	drained := t.drain()
	close(stop)
	t.end(errDrained)
	leave, cancel := context.WithTimeout(context.WithoutCancel(ctx), t.r.opts.DrainTimeout)
	defer cancel()
	if _, err := t.r.store.Lease(leave, LeaseRequest{Runner: t.id}); err != nil {
		t.r.opts.Logger.WarnContext(ctx, "saga: sagas not given up, they are taken up when the lease ends", "error", err)
	}
	if !drained {
		return fmt.Errorf("%w: %d sagas", errNotDrained, t.inHand())
	}
	return nil
}

// lease renews the lease if beat is set, and asks for sagas that are due if take
// is.
func (t *tenure) lease(ctx context.Context, beat, take bool) (next time.Duration, err error) {
	o := &t.r.opts
	req := LeaseRequest{Runner: t.id, TTL: o.Lease, Beat: beat, Sagas: make(map[string]int)}
	for name, d := range t.r.defs {
		req.Sagas[name] = d.version
	}
	if take {
		req.Limit = o.Concurrency - t.inHand()
	}
	ctx, cancel := context.WithTimeout(ctx, o.Lease)
	defer cancel()
	sent := time.Now()
	g, err := t.r.store.Lease(ctx, req)
	if err != nil {
		return 0, err
	}
	t.mu.Lock()
	if beat {
		t.until = sent.Add(o.Lease - o.Lease/10) // in time for steps to notice before others begin
	}
	t.epoch, t.seen = g.Now, time.Now()
	t.mu.Unlock()
	for _, in := range g.Taken {
		if f := o.Observer.Taken; f != nil {
			f(ctx, in)
		}
		t.put(in.ID)
		t.launch(in)
	}
	for _, id := range g.Cancel {
		if x := t.exec(id); x != nil {
			go x.news()
		}
	}
	if len(g.Taken) == req.Limit && req.Limit > 0 && req.Limit < o.Concurrency {
		return o.Poll, nil
	}
	return g.Next, nil
}

// beat renews the lease until stop is closed. It returns an error that wraps
// ErrLeaseLost when others may have the sagas.
func (t *tenure) beat(stop chan struct{}) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { <-stop; cancel() }()
	ttl := t.r.opts.Lease
	wait := ttl / 3
	for {
		if backoff.Sleep(ctx, wait) != nil {
			return nil
		}
		t.mu.Lock()
		until := t.until
		t.mu.Unlock()
		attempt, done := context.WithDeadline(ctx, until)
		_, err := t.lease(attempt, true, false)
		done()
		switch {
		case err == nil:
			wait = ttl / 3
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrLeaseLost):
			return err
		case !time.Now().Before(until):
			return fmt.Errorf("%w: not renewed in time: %w", ErrLeaseLost, err)
		default:
			wait = min(ttl/20, time.Until(until))
		}
	}
}

// look takes sagas in hand as they become due, until ctx ends or the lease is
// lost.
func (t *tenure) look(ctx context.Context, next time.Duration, beats chan error) error {
	for failures := 0; ; {
		wait := t.r.opts.Poll
		if next >= 0 {
			wait = min(wait, max(next, time.Millisecond))
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case err := <-beats:
			timer.Stop()
			return err
		case <-t.r.wake:
			timer.Stop()
		case <-timer.C:
		}
		var err error
		if next, err = t.lease(ctx, false, true); err != nil && ctx.Err() == nil {
			if errors.Is(err, ErrLeaseLost) {
				return err
			}
			failures++
			next = backoff.Policy{Max: t.r.opts.Lease / 3}.Next(failures)
			t.r.opts.Logger.WarnContext(ctx, "saga: cannot look for sagas that are due", "error", err)
		} else {
			failures = 0
		}
	}
}

// drain waits until nothing is in hand. When DrainTimeout has passed it ends the
// contexts of the steps, and after another it gives up.
func (t *tenure) drain() bool {
	t.mu.Lock()
	t.draining = true
	for _, x := range t.execs {
		if x != nil {
			x.kick()
		}
	}
	t.mu.Unlock()
	done := make(chan struct{})
	go func() { t.wg.Wait(); close(done) }()
	for range 2 {
		timer := time.NewTimer(t.r.opts.DrainTimeout)
		select {
		case <-done:
			timer.Stop()
			return true
		case <-timer.C:
			t.end(errDrained)
		}
	}
	return false
}

// reserve keeps a place for a saga that is about to be started.
func (t *tenure) reserve(id string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, there := t.execs[id]; there || t.draining || len(t.execs) >= t.r.opts.Concurrency || !time.Now().Before(t.until) {
		return false
	}
	t.execs[id] = nil
	t.wg.Add(1)
	return true
}

// put is reserve for a saga that the store has given this tenure.
func (t *tenure) put(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.execs[id] = nil
	t.wg.Add(1)
}

func (t *tenure) free(id string) {
	t.mu.Lock()
	delete(t.execs, id)
	t.mu.Unlock()
	t.wg.Done()
}

// launch runs a saga that is in hand and has its place.
func (t *tenure) launch(in Instance) {
	x := &exec{t: t, d: t.r.defs[in.Saga], id: in.ID, in: in, kicked: make(chan struct{}, 1), results: make(chan result), running: make(map[string]context.CancelCauseFunc)}
	t.mu.Lock()
	t.execs[in.ID] = x
	t.mu.Unlock()
	go x.run()
}

// adopt finds out whether a saga was stored as this tenure's.
func (t *tenure) adopt(id string) {
	for attempt := 0; ; attempt++ {
		in, err := t.r.store.Get(t.ctx, id)
		switch {
		case err == nil && in.Owner == t.id:
			t.launch(in)
			return
		case err == nil, errors.Is(err, ErrNotFound):
			t.free(id)
			return
		}
		if backoff.Sleep(t.ctx, backoff.Policy{}.Next(attempt)) != nil {
			t.free(id)
			return
		}
	}
}

func (t *tenure) exec(id string) *exec {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.execs[id]
}

func (t *tenure) inHand() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.execs)
}

func (t *tenure) isDraining() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.draining
}

// save stores checkpoints, again and again until it is known that they are
// stored or the tenure ends. If they cannot be stored together, each is by
// itself.
func (t *tenure) save(ctx context.Context, cs []Checkpoint) ([]Ack, error) {
	for attempt := 0; ; attempt++ {
		acks, err := t.r.store.Save(ctx, t.id, cs)
		switch {
		case err == nil:
			return acks, nil
		case errors.Is(err, ErrInvalid) && len(cs) == 1:
			return []Ack{{Held: true, invalid: err}}, nil
		case errors.Is(err, ErrInvalid):
			var acks []Ack
			for i := range cs {
				one, err := t.save(ctx, cs[i:i+1])
				if err != nil {
					return nil, err
				}
				acks = append(acks, one...)
			}
			return acks, nil
		}
		t.r.opts.Logger.WarnContext(ctx, "saga: checkpoint not stored yet", "sagas", len(cs), "error", err)
		if err := backoff.Sleep(ctx, backoff.Policy{Max: time.Second}.Next(attempt)); err != nil {
			return nil, err
		}
	}
}
