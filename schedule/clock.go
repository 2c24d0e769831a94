package schedule

import (
	"sync"
	"time"
)

// A clock knows the store's clock from the times that the store has told. It
// reckons with the local monotonic clock only, so what the local wall clock says
// or does does not matter.
//
// A time that was told between the sending of a request and its answer is past
// by the answer; so it is a lower bound, and the best is the greatest. It is
// kept for a while only, for clocks drift.
type clock struct {
	mu    sync.Mutex
	best  reading
	older reading
}

// A reading is the store's clock at a local moment.
type reading struct {
	local time.Time // with its monotonic part
	store time.Time
}

const readingAge = 30 * time.Second

func (r reading) at(local time.Time) time.Time { return r.store.Add(local.Sub(r.local)) }

// told takes over what the store said. A clock that was put back is believed:
// then all that it said before is void.
func (c *clock) told(store, sent, received time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := reading{local: received, store: store}
	upper := reading{local: sent, store: store}
	switch {
	case c.best.local.IsZero():
		c.best, c.older = r, r
	case upper.at(received).Before(c.best.at(received)) || upper.at(received).Before(c.older.at(received)):
		c.best, c.older = r, r // even its upper bound is before the lower bound of another
	case received.Sub(c.best.local) > readingAge:
		c.older, c.best = c.best, r
	case !r.at(received).Before(c.best.at(received)):
		c.best.store = r.at(c.best.local) // as old as it was
	}
}

// now returns a time that the store's clock has reached; zero before the store
// told any.
func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.best.local.IsZero() {
		return time.Time{}
	}
	local := time.Now()
	a, b := c.best.at(local), c.older.at(local)
	if b.After(a) {
		return b
	}
	return a
}
