// Package lockcheck checks histories of a lock.Store and of a lock.Register with
// porcupine: whether there is an order in which the calls, each at one moment
// between its begin and its end, are what a single correct one would answer.
package lockcheck

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/ashlar-go/ashlar/lock"
)

// A call is the input of an operation on a lease.
type call struct {
	op    string // acquire, extend, release
	key   string
	owner string
	ttl   time.Duration
	began time.Duration
	// hesitant means that it may be refused although the key is free.
	hesitant bool
}

// An answer is its output.
type answer struct {
	verdict string // ok, held, lost
	token   int64
	ended   time.Duration
}

// late is by how much a store may round up a lease.
const late = 2 * time.Millisecond

// A hold is the state of one key. The store's clock is not seen: the lease ends
// between minEnd and maxEnd. lastToken is the highest that was granted.
type hold struct {
	owner          string
	lastToken      int64
	minEnd, maxEnd time.Duration
}

func stepLease(state, input, output any) (bool, any) {
	h, c, a := state.(hold), input.(call), output.(answer)
	own := h.owner == c.owner && h.owner != ""
	switch c.op {
	case "acquire":
		if a.verdict == "held" {
			return c.hesitant || h.owner != "" && !own && c.began <= h.maxEnd, h
		}
		if own && a.token == h.lastToken { // a repetition, while it lasts
			return c.began <= h.maxEnd, h
		}
		free := h.owner == "" || a.ended >= h.minEnd // also its own that has ended
		return free && a.token > h.lastToken, hold{c.owner, a.token, c.began + c.ttl, a.ended + c.ttl + late}
	case "extend":
		if a.verdict == "lost" {
			return !own || a.ended >= h.minEnd, h
		}
		ok := own && c.began <= h.maxEnd
		h.minEnd, h.maxEnd = c.began+c.ttl, a.ended+c.ttl+late
		return ok, h
	default: // release
		if a.verdict == "lost" {
			return h.owner != "" && !own && c.began <= h.maxEnd, h
		}
		switch {
		case own:
			h.owner = ""
		case h.owner != "":
			return a.ended >= h.minEnd, h // that of another has ended
		}
		return true, h
	}
}

func leaseModel() porcupine.Model {
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			byKey := make(map[string][]porcupine.Operation)
			for _, op := range history {
				k := op.Input.(call).key
				byKey[k] = append(byKey[k], op)
			}
			var parts [][]porcupine.Operation
			for _, ops := range byKey {
				parts = append(parts, ops)
			}
			return parts
		},
		Init: func() any { return hold{} },
		Step: stepLease,
	}
}

// A history is what clients have called and been answered.
type history struct {
	start time.Time
	mu    sync.Mutex
	ops   []porcupine.Operation
	errs  []error
}

func (h *history) add(client int, began time.Duration, input, output any, ended time.Duration, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil { // its effect is not known
		h.errs = append(h.errs, err)
		return
	}
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: input, Call: int64(began), Output: output, Return: int64(ended)})
}

func (h *history) check(model porcupine.Model, timeout time.Duration) (porcupine.CheckResult, int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return porcupine.CheckOperationsTimeout(model, h.ops, timeout), len(h.ops), errors.Join(h.errs...)
}

// Leases is a store that keeps the history of the calls to another, of one key
// each.
type Leases struct {
	lock.Store
	// Hesitant stores refuse a key also while another call on it is under way, so
	// that it is not checked whether what was refused was held.
	Hesitant bool
	history  history
}

// NewLeases returns a recorder of the calls to store.
func NewLeases(store lock.Store) *Leases {
	return &Leases{Store: store, history: history{start: time.Now()}}
}

// Check reports whether the history is linearizable, and how many calls it has.
// Errors that are not answers make it fail, for their effect is not known.
func (l *Leases) Check(timeout time.Duration) (porcupine.CheckResult, int, error) {
	return l.history.check(leaseModel(), timeout)
}

func (l *Leases) record(client int, c call, f func(lock.Request) (int64, error)) bool {
	c.began = time.Since(l.history.start)
	token, err := f(lock.Request{Keys: []string{c.key}, Owner: c.owner, TTL: c.ttl})
	a := answer{verdict: "ok", token: token, ended: time.Since(l.history.start)}
	switch {
	case errors.Is(err, lock.ErrHeld):
		a.verdict, err = "held", nil
	case errors.Is(err, lock.ErrLost):
		a.verdict, err = "lost", nil
	}
	l.history.add(client, c.began, c, a, a.ended, err)
	return a.verdict == "ok" && err == nil
}

// Acquire asks for the key as client.
func (l *Leases) Acquire(ctx context.Context, client int, key, owner string, ttl time.Duration) bool {
	return l.record(client, call{op: "acquire", key: key, owner: owner, ttl: ttl, hesitant: l.Hesitant}, func(r lock.Request) (int64, error) {
		return l.Store.Acquire(ctx, r)
	})
}

// Extend extends the lease as client.
func (l *Leases) Extend(ctx context.Context, client int, key, owner string, ttl time.Duration) {
	l.record(client, call{op: "extend", key: key, owner: owner, ttl: ttl}, func(r lock.Request) (int64, error) {
		return 0, l.Store.Extend(ctx, r)
	})
}

// Release releases the key as client.
func (l *Leases) Release(ctx context.Context, client int, key, owner string) {
	l.record(client, call{op: "release", key: key, owner: owner}, func(r lock.Request) (int64, error) {
		return 0, l.Store.Release(ctx, r)
	})
}
