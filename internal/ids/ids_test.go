package ids

import (
	"regexp"
	"testing"
	"time"
)

func TestNew(t *testing.T) {
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := make(map[string]bool)
	for range 10_000 {
		id := New()
		if !form.MatchString(id) {
			t.Fatalf("New() = %q, want a UUIDv7", id)
		}
		if seen[id] {
			t.Fatalf("New() returned %q twice", id)
		}
		seen[id] = true
	}
}

func TestNewIsTimeOrdered(t *testing.T) {
	first := New()
	time.Sleep(2 * time.Millisecond)
	if second := New(); second <= first {
		t.Errorf("%q does not sort after %q, made 2 ms earlier", second, first)
	}
}

func BenchmarkNew(b *testing.B) {
	for b.Loop() {
		New()
	}
}
