// Package idempotencycheck checks histories of an idempotency.Store with
// porcupine: whether there is an order in which the calls, each at one moment
// between its begin and its end, are what a single correct record would answer.
package idempotencycheck

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/ashlar-go/ashlar/idempotency"
)

// A call is the input of an operation.
type call struct {
	op     string // claim, extend, complete, release
	key    string
	token  string
	result string
	lease  time.Duration
	began  time.Duration
}

// An answer is its output.
type answer struct {
	verdict string // granted, done, busy; ok, lost
	result  string
	ended   time.Duration
}

// A record is the state of one key. The store's clock is not seen: its lease
// ends between minEnd and maxEnd.
type record struct {
	token          string
	done           bool
	result         string
	minEnd, maxEnd time.Duration
}

func step(state, input, output any) (bool, any) {
	r, c, a := state.(record), input.(call), output.(answer)
	holds := r.token == c.token && r.token != ""
	switch c.op {
	case "claim":
		switch a.verdict {
		case "done":
			return r.done && a.result == r.result, r
		case "busy":
			return r.token != "" && !r.done && !holds && c.began <= r.maxEnd, r
		}
		// A repetition does not tell whether it renews the lease, so it keeps the
		// earlier end as possible.
		next := record{token: c.token, minEnd: c.began + c.lease, maxEnd: a.ended + c.lease}
		if holds {
			next.minEnd = r.minEnd
		}
		return !r.done && (r.token == "" || holds || a.ended >= r.minEnd), next
	case "extend":
		if a.verdict == "lost" {
			return !holds || r.done, r
		}
		r.minEnd, r.maxEnd = c.began+c.lease, a.ended+c.lease
		return holds && !r.done, r
	case "complete":
		if a.verdict == "lost" {
			return !holds, r
		}
		if !r.done {
			r.done, r.result = true, c.result
		}
		return holds, r
	default: // release
		if a.verdict == "lost" {
			return r.token != "" && (!holds || r.done), r
		}
		return r.token == "" || holds && !r.done, record{}
	}
}

func model() porcupine.Model {
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
		Init: func() any { return record{} },
		Step: step,
	}
}

// A Recorder is a store that keeps the history of the calls to another.
type Recorder struct {
	Store idempotency.Store

	start   time.Time
	mu      sync.Mutex
	history []porcupine.Operation
	errs    []error
}

// NewRecorder returns a recorder of the calls to store.
func NewRecorder(store idempotency.Store) *Recorder {
	return &Recorder{Store: store, start: time.Now()}
}

// Check reports whether the history is linearizable. Errors that are not
// answers make it fail, for their effect is not known.
func (r *Recorder) Check(timeout time.Duration) (porcupine.CheckResult, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return porcupine.CheckOperationsTimeout(model(), r.history, timeout), errors.Join(r.errs...)
}

// Len returns how many calls were recorded.
func (r *Recorder) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.history)
}

func (r *Recorder) record(client int, c call, f func() (verdict, result string, err error)) {
	c.began = time.Since(r.start)
	verdict, result, err := f()
	a := answer{verdict, result, time.Since(r.start)}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.errs = append(r.errs, err)
		return
	}
	r.history = append(r.history, porcupine.Operation{
		ClientId: client, Input: c, Call: int64(c.began), Output: a, Return: int64(a.ended),
	})
}

// Claim claims the key as client.
func (r *Recorder) Claim(ctx context.Context, client int, key, token string, lease time.Duration) (granted bool) {
	r.record(client, call{op: "claim", key: key, token: token, lease: lease}, func() (string, string, error) {
		c, err := r.Store.Claim(ctx, idempotency.Key{Scope: "check", ID: key},
			idempotency.ClaimRequest{Token: token, Lease: lease, TTL: time.Hour})
		switch {
		case errors.Is(err, idempotency.ErrInProgress):
			return "busy", "", nil
		case err == nil && c.Done:
			return "done", string(c.Result), nil
		}
		granted = err == nil
		return "granted", "", err
	})
	return granted
}

// Extend extends the claim as client.
func (r *Recorder) Extend(ctx context.Context, client int, key, token string, lease time.Duration) {
	r.record(client, call{op: "extend", key: key, token: token, lease: lease}, func() (string, string, error) {
		return verdict(r.Store.Extend(ctx, idempotency.Key{Scope: "check", ID: key}, token, lease))
	})
}

// Complete completes the key as client.
func (r *Recorder) Complete(ctx context.Context, client int, key, token, result string) {
	r.record(client, call{op: "complete", key: key, token: token, result: result}, func() (string, string, error) {
		return verdict(r.Store.Complete(ctx, idempotency.Key{Scope: "check", ID: key}, token, []byte(result)))
	})
}

// Release releases the key as client.
func (r *Recorder) Release(ctx context.Context, client int, key, token string) {
	r.record(client, call{op: "release", key: key, token: token}, func() (string, string, error) {
		return verdict(r.Store.Release(ctx, idempotency.Key{Scope: "check", ID: key}, token))
	})
}

func verdict(err error) (string, string, error) {
	if errors.Is(err, idempotency.ErrLeaseLost) {
		return "lost", "", nil
	}
	return "ok", "", err
}
