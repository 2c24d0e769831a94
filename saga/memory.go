package saga

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// A MemoryStore is a [Store] in memory, for tests, examples and processes that
// need no durability. It keeps every rule of the durable ones except that its
// content ends with the process. The zero value is empty and ready to use; it is
// safe for concurrent use.
type MemoryStore struct {
	mu      sync.Mutex
	sagas   map[string]*Instance
	runners map[string]time.Time // when their leases end
	dead    map[string]bool      // runners whose lease was found to be over
	audits  map[string][]Audit
}

func (s *MemoryStore) lock(ctx context.Context) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	s.mu.Lock()
	if s.sagas == nil {
		s.sagas, s.runners = make(map[string]*Instance), make(map[string]time.Time)
		s.dead, s.audits = make(map[string]bool), make(map[string][]Audit)
	}
	return s.mu.Unlock, nil
}

// Create implements [Store].
func (s *MemoryStore) Create(ctx context.Context, sagas []Instance) ([]string, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	existing := make([]string, len(sagas))
	for i, in := range sagas {
		if old := s.sagas[in.ID]; old != nil {
			existing[i] = old.Saga
			continue
		}
		n := in.clone()
		n.StartedAt = time.Now()
		if n.WakeAt = n.StartedAt; s.runners[n.Owner].IsZero() {
			n.Owner = ""
		}
		s.sagas[n.ID] = &n
	}
	return existing, nil
}

// Lease implements [Store].
func (s *MemoryStore) Lease(ctx context.Context, req LeaseRequest) (Grant, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return Grant{}, err
	}
	defer unlock()
	now := time.Now()
	if req.TTL <= 0 {
		for _, in := range s.sagas {
			if in.Owner == req.Runner {
				in.Owner, in.WakeAt = "", now
			}
		}
		delete(s.runners, req.Runner)
		return Grant{Now: now}, nil
	}
	for runner, until := range s.runners {
		if runner != req.Runner && until.Before(now) {
			delete(s.runners, runner)
			s.dead[runner] = true
		}
	}
	if s.dead[req.Runner] {
		return Grant{}, ErrLeaseLost
	}
	if req.Beat || s.runners[req.Runner].IsZero() {
		s.runners[req.Runner] = now.Add(req.TTL)
	}
	g := Grant{Now: now, Next: -1}
	var due []*Instance
	for _, in := range s.sagas {
		version, known := req.Sagas[in.Saga]
		orphan := in.Owner != "" && s.dead[in.Owner]
		switch {
		case in.Owner == req.Runner && in.Cancel != "":
			g.Cancel = append(g.Cancel, in.ID)
		case !known || in.Version > version || in.Owner != "" && !orphan || in.Owner == "" && in.WakeAt.IsZero():
		case orphan || !in.WakeAt.After(now):
			due = append(due, in)
		case g.Next < 0 || in.WakeAt.Sub(now) < g.Next:
			g.Next = in.WakeAt.Sub(now)
		}
	}
	slices.SortFunc(due, func(a, b *Instance) int { return cmp.Or(a.WakeAt.Compare(b.WakeAt), cmp.Compare(a.ID, b.ID)) })
	for _, in := range due[:min(len(due), max(req.Limit, 0))] {
		if in.Owner != "" {
			in.Deaths++
		}
		in.Owner = req.Runner
		g.Taken = append(g.Taken, in.clone())
	}
	return g, nil
}

// Save implements [Store].
func (s *MemoryStore) Save(ctx context.Context, runner string, cs []Checkpoint) ([]Ack, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	acks := make([]Ack, len(cs))
	for i, c := range cs {
		in := s.sagas[c.ID]
		if in == nil || in.Owner != runner || s.dead[runner] {
			continue
		}
		copied := (&Instance{Steps: c.Steps}).clone()
		in.Version, in.Status, in.State, in.Steps = c.Version, c.Status, slices.Clone(c.State), copied.Steps
		in.Cause, in.Reason, in.Deaths = c.Cause, c.Reason, 0
		if c.Release {
			in.Owner, in.WakeAt = "", c.WakeAt
			if c.Cancel != in.Cancel && c.Status == Running || slices.ContainsFunc(c.Await, func(name string) bool { _, here := in.Signals[name]; return here }) {
				in.WakeAt = time.Now()
			}
		}
		if c.Status.Ended() {
			in.EndedAt = time.Now()
		}
		acks[i] = Ack{Held: true, Cancel: in.Cancel, Signals: in.Signals}
	}
	return acks, nil
}

// Maintain implements [Store]. There is nothing to do.
func (s *MemoryStore) Maintain(ctx context.Context) error { return ctx.Err() }

// Get implements [Registry].
func (s *MemoryStore) Get(ctx context.Context, id string) (Instance, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return Instance{}, err
	}
	defer unlock()
	in := s.sagas[id]
	if in == nil {
		return Instance{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	c := in.clone()
	c.Audit = slices.Clone(s.audits[id])
	return c, nil
}

// List implements [Registry].
func (s *MemoryStore) List(ctx context.Context, q Query) ([]Instance, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	setDefault(&q.Limit, 100)
	var out []Instance
	for _, id := range slices.Sorted(maps.Keys(s.sagas)) {
		in := s.sagas[id]
		if id > q.After && (q.Saga == "" || q.Saga == in.Saga) && (q.Status == "" || q.Status == in.Status) {
			if out = append(out, in.clone()); len(out) == q.Limit {
				break
			}
		}
	}
	return out, nil
}

// Edit implements [Registry].
func (s *MemoryStore) Edit(ctx context.Context, id string, f func(*Instance) (*Audit, error)) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	in := s.sagas[id]
	if in == nil {
		return fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	n := in.clone()
	audit, err := f(&n)
	if err != nil {
		return err
	}
	if in.Cancel, in.Signals = n.Cancel, n.Signals; in.Owner == "" {
		if n.Status.Ended() && !in.Status.Ended() {
			n.EndedAt = time.Now()
		}
		*in = n
	}
	if audit != nil {
		audit.At = time.Now()
		s.audits[id] = append(s.audits[id], *audit)
	}
	return nil
}

// Sample implements [Registry].
func (s *MemoryStore) Sample(ctx context.Context) (Sample, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return Sample{}, err
	}
	defer unlock()
	var sample Sample
	now := time.Now()
	for _, in := range s.sagas {
		switch in.Status {
		case Running:
			sample.Running++
		case Compensating:
			sample.Compensating++
		case Stuck:
			sample.Stuck++
		}
		if in.Owner != "" && !s.dead[in.Owner] {
			sample.InHand++
		} else if !in.WakeAt.IsZero() && !in.WakeAt.After(now) {
			sample.Due++
			sample.Lag = max(sample.Lag, now.Sub(in.WakeAt))
		}
	}
	return sample, nil
}
