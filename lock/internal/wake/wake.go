// Package wake is what the stores of package lock share to tell those who wait
// that a key is free.
package wake

import "sync"

// A Hub knows who waits for which key. The zero value is empty; it is safe for
// concurrent use.
type Hub struct {
	mu    sync.Mutex
	byKey map[string]map[*watch]struct{}
}

type watch struct{ wake func() }

// Add has wake called for each of the keys until remove is called, which may be
// done more than once. wake must not block.
func (h *Hub) Add(keys []string, wake func()) (remove func()) {
	w := &watch{wake}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.byKey == nil {
		h.byKey = make(map[string]map[*watch]struct{})
	}
	for _, key := range keys {
		if h.byKey[key] == nil {
			h.byKey[key] = make(map[*watch]struct{})
		}
		h.byKey[key][w] = struct{}{}
	}
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, key := range keys {
			delete(h.byKey[key], w)
			if len(h.byKey[key]) == 0 {
				delete(h.byKey, key)
			}
		}
	}
}

// Wake wakes all who wait for key.
func (h *Hub) Wake(key string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.byKey[key] {
		w.wake()
	}
}

// WakeAll wakes everybody.
func (h *Hub) WakeAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, watches := range h.byKey {
		for w := range watches {
			w.wake()
		}
	}
}

// Waited reports whether somebody waits for key.
func (h *Hub) Waited(key string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.byKey[key]) > 0
}

// Empty reports whether nobody waits for anything.
func (h *Hub) Empty() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.byKey) == 0
}
