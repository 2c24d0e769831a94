package lock

import (
	"sync"
	"time"
)

// renewals are the leases of a Locker in the order in which they are due to be
// extended, which is that in which they were added, for all have one TTL. One
// timer serves them all: it is left alone when leases come and go, because to
// start and stop one for each costs more than a lease does otherwise. The zero
// value is empty.
type renewals struct {
	mu          sync.Mutex
	first, last *Lease
	timer       *time.Timer
	armed       bool
}

// add has the lease extended after pause.
func (r *renewals) add(l *Lease, pause time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l.due, l.queued = time.Now().Add(pause), true
	if l.prev = r.last; r.last != nil {
		r.last.next = l
	} else {
		r.first = l
	}
	r.last = l
	if !r.armed {
		r.arm(pause)
	}
}

func (r *renewals) arm(pause time.Duration) {
	if r.armed = true; r.timer == nil {
		r.timer = time.AfterFunc(pause, r.fire)
	} else {
		r.timer.Reset(pause)
	}
}

// remove is for a lease that has ended.
func (r *renewals) remove(l *Lease) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unlink(l)
}

func (r *renewals) unlink(l *Lease) {
	if !l.queued {
		return
	}
	l.queued = false
	if l.prev != nil {
		l.prev.next = l.next
	} else {
		r.first = l.next
	}
	if l.next != nil {
		l.next.prev = l.prev
	} else {
		r.last = l.prev
	}
	l.prev, l.next = nil, nil
}

func (r *renewals) fire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	for r.first != nil && !now.Before(r.first.due) {
		l := r.first
		r.unlink(l)
		go l.extend()
	}
	if r.armed = false; r.first != nil {
		r.arm(r.first.due.Sub(now))
	}
}
