package outbox

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"
)

// A MemoryStore is a [Store] in memory, for tests, examples and processes that
// need no durability. It keeps every rule of the durable ones except that its
// content ends with the process. It is safe for concurrent use.
type MemoryStore struct {
	mu      sync.Mutex
	lanes   [Lanes]memoryLane
	relays  map[string]time.Time // when each one's membership ends
	delayed []delayedMessage
	dead    []DeadLetter
}

type memoryLane struct {
	last    int64 // last Seq handed out
	log     []Record
	open    map[int64]bool // Seqs of transactions that have not ended
	owner   string
	epoch   int64
	expires time.Time
	cursor  int64
	parked  []parkedRecord
}

type parkedRecord struct {
	Record
	next time.Time
}

type delayedMessage struct {
	Message
	lane int
	due  time.Time
}

var errTxDone = errors.New("outbox: transaction has already ended")

// NewMemoryStore returns an empty store.
func NewMemoryStore() *MemoryStore {
	return &MemoryStore{relays: make(map[string]time.Time)}
}

// Append adds msgs at once, all or none.
func (s *MemoryStore) Append(_ context.Context, msgs ...Message) error {
	tx := s.Begin()
	if err := tx.Append(msgs...); err != nil {
		tx.Rollback()
		return err
	}
	return tx.Commit()
}

// Begin starts a transaction, which behaves as one of a database: its messages
// take their places when they are appended and appear when it commits.
func (s *MemoryStore) Begin() *MemoryTx { return &MemoryTx{store: s} }

// A MemoryTx is a transaction of a [MemoryStore].
type MemoryTx struct {
	store   *MemoryStore
	recs    []Record
	delayed []delayedMessage
	done    bool
}

// Append adds msgs to the transaction.
func (tx *MemoryTx) Append(msgs ...Message) error {
	s := tx.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if tx.done {
		return errTxDone
	}
	for _, m := range msgs {
		m, n, err := Prepare(m)
		if err != nil {
			return err
		}
		m.Payload, m.Headers = slices.Clone(m.Payload), maps.Clone(m.Headers)
		if m.Delay > 0 {
			tx.delayed = append(tx.delayed, delayedMessage{Message: m, lane: n, due: time.Now().Add(m.Delay)})
			continue
		}
		tx.recs = append(tx.recs, s.place(m, n))
	}
	return nil
}

// place gives m the next place of lane n, which stays open.
func (s *MemoryStore) place(m Message, n int) Record {
	ln := &s.lanes[n]
	ln.last++
	if ln.open == nil {
		ln.open = make(map[int64]bool)
	}
	ln.open[ln.last] = true
	return Record{Message: m, Lane: n, Seq: ln.last, CreatedAt: time.Now()}
}

// Commit makes the messages visible.
func (tx *MemoryTx) Commit() error { return tx.end(true) }

// Rollback drops the messages. After Commit it does nothing.
func (tx *MemoryTx) Rollback() { _ = tx.end(false) }

func (tx *MemoryTx) end(commit bool) error {
	s := tx.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if tx.done {
		return errTxDone
	}
	tx.done = true
	for _, rec := range tx.recs {
		s.settleOpen(rec, commit)
	}
	if commit {
		s.delayed = append(s.delayed, tx.delayed...)
	}
	return nil
}

func (s *MemoryStore) settleOpen(rec Record, commit bool) {
	ln := &s.lanes[rec.Lane]
	delete(ln.open, rec.Seq)
	if commit {
		at, _ := slices.BinarySearchFunc(ln.log, rec.Seq, func(r Record, seq int64) int { return cmp.Compare(r.Seq, seq) })
		ln.log = slices.Insert(ln.log, at, rec)
	}
}

// Lease implements [Store].
func (s *MemoryStore) Lease(_ context.Context, req LeaseRequest) (Grant, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.relays[req.Relay] = now.Add(req.TTL)
	maps.DeleteFunc(s.relays, func(_ string, until time.Time) bool { return !until.After(now) })
	share := (Lanes + max(1, len(s.relays)) - 1) / max(1, len(s.relays))

	var grant Grant
	held := 0
	for n := range s.lanes {
		ln := &s.lanes[n]
		if ln.owner != req.Relay {
			continue
		}
		if req.TTL <= 0 || slices.Contains(req.Release, n) {
			ln.owner = ""
			continue
		}
		ln.expires = now.Add(req.TTL)
		held++
	}
	if req.TTL <= 0 {
		return grant, nil
	}
	for n := range s.lanes {
		ln := &s.lanes[n]
		if held < share && (ln.owner == "" || !ln.expires.After(now)) && !slices.Contains(req.Release, n) {
			ln.owner, ln.expires = req.Relay, now.Add(req.TTL)
			ln.epoch++
			held++
		}
		if ln.owner == req.Relay {
			parked := make(map[string]int64)
			for _, p := range ln.parked {
				parked[p.Key] = p.Seq // ln.parked is sorted
			}
			grant.Lanes = append(grant.Lanes, Lane{Number: n, Epoch: ln.epoch, Cursor: ln.cursor, Parked: parked})
		}
	}
	grant.Share = share
	return grant, nil
}

// Fetch implements [Store].
func (s *MemoryStore) Fetch(_ context.Context, from []Position, limit int) ([]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var recs []Record
	for i, p := range from {
		ln := &s.lanes[p.Lane]
		if p.Retry {
			recs = append(recs, ln.due(limit-len(recs))...)
		}
		fair := max(1, (limit-len(recs))/(len(from)-i))
		for _, rec := range ln.log {
			if ln.openBefore(rec.Seq) || fair == 0 || len(recs) >= limit {
				break
			}
			if rec.Seq > p.After {
				recs = append(recs, rec)
				fair--
			}
		}
	}
	return recs, nil
}

func (ln *memoryLane) openBefore(seq int64) bool {
	for open := range ln.open {
		if open < seq {
			return true
		}
	}
	return false
}

// due returns the first parked record of each key that is due, and those behind
// it if it has not failed itself.
func (ln *memoryLane) due(limit int) []Record {
	now := time.Now()
	heads := make(map[string]*parkedRecord)
	var recs []Record
	for i := range ln.parked {
		p := &ln.parked[i]
		head := heads[p.Key]
		if head == nil || p.Key == "" {
			heads[p.Key], head = p, p
		} else if head.Attempts > 0 {
			continue
		}
		if !head.next.After(now) && len(recs) < limit {
			recs = append(recs, p.Record)
		}
	}
	return recs
}

// Settle implements [Store].
func (s *MemoryStore) Settle(_ context.Context, st Settlement) (lost []int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := make(map[int]bool)
	for _, a := range st.Advance {
		ln := &s.lanes[a.Number]
		if held[a.Number] = ln.epoch == a.Epoch; !held[a.Number] {
			lost = append(lost, a.Number)
			continue
		}
		ln.cursor = a.Cursor
	}
	for _, rec := range st.Delivered {
		if held[rec.Lane] {
			s.lanes[rec.Lane].unpark(rec.Seq)
		}
	}
	for _, f := range st.Park {
		if !held[f.Lane] {
			continue
		}
		ln := &s.lanes[f.Lane]
		f.Parked = true
		p := parkedRecord{Record: f.Record, next: time.Now().Add(f.RetryIn)}
		at, found := slices.BinarySearchFunc(ln.parked, f.Seq, func(p parkedRecord, seq int64) int { return cmp.Compare(p.Seq, seq) })
		switch {
		case !found:
			ln.parked = slices.Insert(ln.parked, at, p)
		case p.Attempts > ln.parked[at].Attempts:
			ln.parked[at] = p
		}
	}
	for _, f := range st.Dead {
		if held[f.Lane] {
			s.lanes[f.Lane].unpark(f.Seq)
			s.dead = append(s.dead, DeadLetter{Record: f.Record, Err: f.Err, FailedAt: time.Now()})
		}
	}
	return lost, nil
}

func (ln *memoryLane) unpark(seq int64) {
	ln.parked = slices.DeleteFunc(ln.parked, func(p parkedRecord) bool { return p.Seq == seq })
}

// Maintain implements [Store].
func (s *MemoryStore) Maintain(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	slices.SortStableFunc(s.delayed, func(a, b delayedMessage) int { return a.due.Compare(b.due) })
	for len(s.delayed) > 0 && !s.delayed[0].due.After(now) {
		d := s.delayed[0]
		s.delayed = s.delayed[1:]
		d.Delay = 0
		s.settleOpen(s.place(d.Message, d.lane), true)
	}
	for n := range s.lanes {
		ln := &s.lanes[n]
		ln.log = slices.DeleteFunc(ln.log, func(r Record) bool { return r.Seq <= ln.cursor })
	}
	return nil
}

// Sample returns the store's state.
func (s *MemoryStore) Sample(context.Context) (Sample, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sample := Sample{Delayed: int64(len(s.delayed)), Dead: int64(len(s.dead))}
	for n := range s.lanes {
		ln := &s.lanes[n]
		sample.Parked += int64(len(ln.parked))
		for _, rec := range ln.log {
			if rec.Seq > ln.cursor {
				sample.Pending++
				sample.OldestAge = max(sample.OldestAge, time.Since(rec.CreatedAt))
			}
		}
	}
	return sample, nil
}

// DeadLetters returns at most limit dead letters, the oldest first.
func (s *MemoryStore) DeadLetters(_ context.Context, limit int) ([]DeadLetter, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.dead[:min(limit, len(s.dead))]), nil
}

// Replay appends the dead letters with the given message IDs anew, with no
// attempts charged, and returns how many there were.
func (s *MemoryStore) Replay(_ context.Context, ids ...string) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	s.dead = slices.DeleteFunc(s.dead, func(d DeadLetter) bool {
		if !slices.Contains(ids, d.ID) {
			return false
		}
		s.settleOpen(s.place(d.Message, d.Lane), true)
		n++
		return true
	})
	return n, nil
}
