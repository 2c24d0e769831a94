package schedule

import (
	"cmp"
	"context"
	"slices"
	"time"
)

// Claim implements [Store].
func (s *MemoryStore) Claim(ctx context.Context, req ClaimRequest) (Claim, error) {
	if err := ctx.Err(); err != nil {
		return Claim{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	claim := Claim{Now: now}
	for _, d := range req.Decisions {
		s.carryOut(&claim, &req, d, now)
	}
	s.grant(&claim, &req, now)
	s.plan(&claim, &req, now)
	return claim, nil
}

// carryOut makes rows of the ticks, if the schedule is as it was.
func (s *MemoryStore) carryOut(claim *Claim, req *ClaimRequest, d Decision, now time.Time) {
	def := s.definitions[d.Name]
	if def == nil || def.Version != d.Version || def.paused || def.ended || !def.Next.Equal(d.From) ||
		slices.ContainsFunc(d.Ticks, func(t Tick) bool { return t.Due.After(now) }) {
		return
	}
	def.Next, def.due, def.ended = d.Next, d.NextDue, d.Next.IsZero()
	def.missed += int64(d.Missed)
	waiting, running := s.active(d.Name)
	for i, t := range d.Ticks {
		if slices.ContainsFunc(s.runs, func(r *memoryRun) bool { return r.Name == d.Name && !r.Manual && r.Tick.Equal(t.At) }) {
			continue
		}
		r := &memoryRun{Record: Record{ID: t.ID, Name: d.Name, Tick: t.At, Due: t.Due, Missed: t.Missed, State: Waiting}}
		s.runs = append(s.runs, r)
		allow := def.Overlap == OverlapAllow
		switch {
		case !t.Late && def.Overlap == OverlapSkip && waiting+running > 0,
			!t.Late && def.Overlap == OverlapQueue && (waiting > 0 || running > 0 && i > 0):
			r.State, r.Finished = Skipped, now
		case (allow && i < req.PerSchedule || i == 0 && waiting+running == 0) && len(claim.Runs) < req.Slots && slices.Contains(req.Handlers, def.Handler):
			s.take(claim, req, r, now)
		}
	}
}

func (s *MemoryStore) active(name string) (waiting, running int) {
	for _, r := range s.runs {
		switch {
		case r.Name == name && r.State == Waiting:
			waiting++
		case r.Name == name && r.State == Running:
			running++
		}
	}
	return waiting, running
}

func (s *MemoryStore) take(claim *Claim, req *ClaimRequest, r *memoryRun, now time.Time) {
	if r.State == Running {
		r.deaths++
	}
	r.State, r.Instance, r.Started, r.lease = Running, req.Instance, now, now.Add(req.Lease)
	r.Attempt++
	d := s.definitions[r.Name].Definition
	run := Run{
		ID: r.ID, Schedule: d, Tick: r.Tick, Due: r.Due, Claimed: now, Manual: r.Manual,
		Payload: d.Payload, Attempt: r.Attempt, Failures: r.failures, Missed: r.Missed,
	}
	if r.payload != nil {
		run.Payload = r.payload
	}
	claim.Runs = append(claim.Runs, run)
}

// grant hands out runs that wait and runs whose lease has ended.
func (s *MemoryStore) grant(claim *Claim, req *ClaimRequest, now time.Time) {
	var due []*memoryRun
	for _, r := range s.runs {
		d := s.definitions[r.Name]
		if d == nil || !slices.Contains(req.Handlers, d.Handler) || slices.Contains(req.Busy, r.Name) {
			continue
		}
		switch {
		case r.State == Running && !r.lease.After(now) && (d.AtMostOnce || r.deaths >= maxDeaths):
			r.State, r.Finished, r.Err = Lost, now, "its instance died"
		case r.State == Running && !r.lease.After(now), r.State == Waiting && !r.Due.After(now):
			due = append(due, r)
		}
	}
	slices.SortStableFunc(due, func(a, b *memoryRun) int {
		return cmp.Or(cmp.Compare(a.State, b.State), a.Due.Compare(b.Due)) // "running" before "waiting"
	})
	taken := make(map[string]int)
	for _, r := range due {
		limit := req.PerSchedule
		if s.definitions[r.Name].Overlap != OverlapAllow {
			limit = 1
			if _, running := s.active(r.Name); running > 0 && r.State == Waiting {
				continue
			}
		}
		if len(claim.Runs) < req.Slots && taken[r.Name] < limit {
			taken[r.Name]++
			s.take(claim, req, r, now)
		}
	}
}

func (s *MemoryStore) plan(claim *Claim, req *ClaimRequest, now time.Time) {
	for _, d := range s.definitions {
		if !d.paused && !d.ended && slices.Contains(req.Handlers, d.Handler) && !slices.Contains(req.Unknown, d.Name) &&
			!d.due.After(now.Add(req.Ahead)) {
			claim.Plans = append(claim.Plans, d.Plan)
		}
	}
	slices.SortFunc(claim.Plans, func(a, b Plan) int {
		return cmp.Or(s.definitions[a.Name].due.Compare(s.definitions[b.Name].due), cmp.Compare(a.Name, b.Name))
	})
	claim.Plans = claim.Plans[:min(len(claim.Plans), 1000)]
	for _, r := range s.runs {
		at := r.Due
		if r.State == Running {
			at = r.lease
		}
		d := s.definitions[r.Name]
		if d != nil && slices.Contains(req.Handlers, d.Handler) && at.After(now) && (claim.Next.IsZero() || at.Before(claim.Next)) &&
			(r.State == Waiting || r.State == Running && r.Instance != req.Instance) {
			claim.Next = at
		}
	}
}

func (s *MemoryStore) find(ref Ref) *memoryRun {
	for _, r := range s.runs {
		if r.ID == ref.ID && r.Attempt == ref.Attempt {
			return r
		}
	}
	return nil
}

// Extend implements [Store].
func (s *MemoryStore) Extend(ctx context.Context, runs []Ref, lease time.Duration) (kept, lost []Ref, err error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ref := range runs {
		if r := s.find(ref); r != nil && r.State == Running {
			r.lease = s.now().Add(lease)
			kept = append(kept, ref)
		} else {
			lost = append(lost, ref)
		}
	}
	return kept, lost, nil
}

// Finish implements [Store].
func (s *MemoryStore) Finish(ctx context.Context, ref Ref, o Outcome) (more bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r, now := s.find(ref), s.now()
	if r == nil || r.State != Running && r.State != o.State {
		return false, ErrLeaseLost
	}
	if r.State == Running {
		r.State, r.Err = o.State, cmp.Or(o.Err, r.Err)
		if o.State == Waiting {
			r.Due = now.Add(o.RetryIn)
			if o.Err != "" {
				r.failures++
			}
		} else {
			r.Finished = now
		}
	}
	return slices.ContainsFunc(s.runs, func(other *memoryRun) bool {
		return other.Name == r.Name && other.State == Waiting && !other.Due.After(now)
	}), nil
}

// Prune implements [Store].
func (s *MemoryStore) Prune(ctx context.Context, keep time.Duration, limit int) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.now().Add(-keep)
	latest := make(map[string]*memoryRun)
	for _, r := range s.runs {
		if last := latest[r.Name]; last == nil || !r.Tick.Before(last.Tick) {
			latest[r.Name] = r
		}
	}
	n := 0
	s.runs = slices.DeleteFunc(s.runs, func(r *memoryRun) bool {
		orphan := s.definitions[r.Name] == nil && r.State == Running && !r.lease.After(before)
		old := !r.active() && !r.Finished.After(before) && (latest[r.Name] != r || s.definitions[r.Name] == nil)
		if n < limit && (old || orphan) {
			n++
			return true
		}
		return false
	})
	return n, nil
}
