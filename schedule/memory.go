package schedule

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/internal/ids"
)

// A MemoryStore is a [Store] in memory, for tests, examples and processes that
// need no durability. It keeps every rule of the durable ones except that its
// content ends with the process. The zero value is empty and ready to use; it is
// safe for concurrent use.
type MemoryStore struct {
	mu          sync.Mutex
	skew        time.Duration // of its clock, for tests
	definitions map[string]*memoryDefinition
	runs        []*memoryRun // in the order in which they were made
}

type memoryDefinition struct {
	Plan
	paused bool
	due    time.Time
	ended  bool
	missed int64
}

type memoryRun struct {
	Record
	key      string
	payload  []byte
	failures int
	deaths   int
	lease    time.Time
}

func (r *memoryRun) active() bool { return r.State == Waiting || r.State == Running }

// maxDeaths is how many instances may die of a run.
const maxDeaths = 5

// now is cut to what the durable stores keep, and begins the call's lock.
func (s *MemoryStore) now() time.Time {
	return time.Now().Add(s.skew).Truncate(time.Microsecond).UTC()
}

// Define adds the schedule, or changes it if it is not the same, and reports
// whether it did either. To define the same again changes nothing, so that every
// instance may do so whenever it starts. A changed spec, zone or jitter takes
// effect from then on; any other change keeps the next tick. A paused schedule
// stays paused.
func (s *MemoryStore) Define(ctx context.Context, d Definition) (changed bool, err error) {
	if d, err = Prepare(d); err != nil {
		return false, err
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d.Payload = bytes.Clone(d.Payload)
	if s.definitions == nil {
		s.definitions = make(map[string]*memoryDefinition)
	}
	old := s.definitions[d.Name]
	if old == nil {
		s.definitions[d.Name] = &memoryDefinition{Plan: Plan{Definition: d, Version: 1, Since: s.now()}}
		return true, nil
	}
	if d.Revision < old.Revision || reflect.DeepEqual(normal(d), normal(old.Definition)) {
		return false, nil
	}
	if d.Spec != old.Spec || d.Zone != old.Zone || d.Jitter != old.Jitter {
		old.replan(s.now())
	}
	old.Definition = d
	old.Version++
	return true, nil
}

func normal(d Definition) Definition {
	if len(d.Payload) == 0 {
		d.Payload = nil
	}
	return d
}

func (d *memoryDefinition) replan(now time.Time) {
	d.Next, d.due, d.Since, d.ended = time.Time{}, time.Time{}, now, false
}

// Remove ends the schedule. Its runs that wait are dropped; one that is executed
// goes on, and its history stays until it is pruned.
func (s *MemoryStore) Remove(ctx context.Context, name string) error {
	return s.change(ctx, name, func(*memoryDefinition) {
		delete(s.definitions, name)
		s.runs = slices.DeleteFunc(s.runs, func(r *memoryRun) bool { return r.Name == name && r.State == Waiting })
	})
}

// Pause holds the schedule back: it has no ticks until it is resumed. Manual
// runs and retries go on.
func (s *MemoryStore) Pause(ctx context.Context, name string) error {
	return s.change(ctx, name, func(d *memoryDefinition) {
		if !d.paused {
			d.paused = true
			d.Version++
		}
	})
}

// Resume ends a pause. The ticks of the pause are not missed: the next is the
// first from now on.
func (s *MemoryStore) Resume(ctx context.Context, name string) error {
	return s.change(ctx, name, func(d *memoryDefinition) {
		if d.paused {
			d.paused = false
			d.Version++
			d.replan(s.now())
		}
	})
}

func (s *MemoryStore) change(ctx context.Context, name string, f func(*memoryDefinition)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.definitions[name]
	if d == nil {
		return fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	f(d)
	return nil
}

// Trigger asks for a run now and returns its ID. It waits for the end of other
// runs unless the overlap policy allows them, and is never skipped.
func (s *MemoryStore) Trigger(ctx context.Context, t Trigger) (id string, err error) {
	if err := t.Validate(); err != nil {
		return "", err
	}
	err = s.change(ctx, t.Name, func(*memoryDefinition) {
		for _, r := range s.runs {
			if t.Key != "" && r.Name == t.Name && r.key == t.Key {
				id = r.ID
				return
			}
		}
		id = ids.New()
		now := s.now()
		s.runs = append(s.runs, &memoryRun{
			Record: Record{ID: id, Name: t.Name, Tick: now, Due: now, Manual: true, State: Waiting}, key: t.Key, payload: bytes.Clone(t.Payload),
		})
	})
	return id, err
}

// List returns how the schedules are doing, by name.
func (s *MemoryStore) List(ctx context.Context) ([]Status, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	var out []Status
	for _, name := range slices.Sorted(maps.Keys(s.definitions)) {
		d := s.definitions[name]
		st := Status{Definition: d.Definition, Paused: d.paused, Next: d.Next, Missed: d.missed}
		late := func(due time.Time) { st.Lag = max(st.Lag, now.Sub(due)) }
		if !d.paused && !d.Next.IsZero() {
			late(d.due)
		}
		counting := true
		for _, r := range s.history(name) { // the latest first
			switch r.State {
			case Waiting:
				st.Waiting++
				late(r.Due)
			case Running:
				st.Running++
			case Done, Failed, Lost:
				if st.Last == "" {
					st.Last, st.LastRun = r.State, r.Tick
				}
				if counting = counting && r.State != Done; counting {
					st.Failing++
				}
			}
		}
		out = append(out, st)
	}
	return out, nil
}

// Runs returns at most limit runs of the schedule, the latest tick first.
func (s *MemoryStore) Runs(ctx context.Context, name string, limit int) ([]Record, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Record
	for _, r := range s.history(name) {
		if len(out) < limit {
			out = append(out, r.Record)
		}
	}
	return out, nil
}

func (s *MemoryStore) history(name string) []*memoryRun {
	var runs []*memoryRun
	for _, r := range s.runs {
		if r.Name == name {
			runs = append(runs, r)
		}
	}
	slices.SortStableFunc(runs, func(a, b *memoryRun) int {
		return cmp.Or(b.Tick.Compare(a.Tick), cmp.Compare(b.ID, a.ID))
	})
	return runs
}
