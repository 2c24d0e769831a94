package idempotencytest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/idempotency"
)

func claimCompleteReplay(_ *testing.T, s suite) {
	s.claim(key("k"), request("a", long))
	s.complete(key("k"), "a", "result")
	s.replayed(key("k"), "result")
	s.replayed(key("k"), "result")
	s.lost(key("k"), "b")
	if err := s.store.Release(s.Context(), key("k"), "a"); !errors.Is(err, idempotency.ErrLeaseLost) {
		s.Fatalf("Release of a completed key = %v, want ErrLeaseLost", err)
	}
	s.replayed(key("k"), "result")
}

func inProgress(_ *testing.T, s suite) {
	s.claim(key("k"), request("a", long))
	c, err := s.store.Claim(s.Context(), key("k"), request("b", long))
	if !errors.Is(err, idempotency.ErrInProgress) {
		s.Fatalf("Claim of a key in progress = %+v, %v", c, err)
	}
	if c.Lease <= 0 || c.Lease > long {
		s.Fatalf("the lease that is left is %v, want one in (0, %v]", c.Lease, long)
	}
	s.lost(key("k"), "b")
	s.complete(key("k"), "a", "result")
	s.replayed(key("k"), "result")
}

// A caller repeats what it got no reply to.
func repetitions(_ *testing.T, s suite) {
	s.claim(key("k"), request("a", long))
	s.claim(key("k"), request("a", long))
	s.refused(key("k"), request("b", long), idempotency.ErrInProgress)
	s.complete(key("k"), "a", "result")
	s.complete(key("k"), "a", "another")
	s.replayed(key("k"), "result")

	s.claim(key("r"), request("a", long))
	for range 2 {
		if err := s.store.Release(s.Context(), key("r"), "a"); err != nil {
			s.Fatalf("Release = %v", err)
		}
	}
	s.claim(key("r"), request("b", long))
}

func mismatch(_ *testing.T, s suite) {
	other := key("k")
	other.Fingerprint = []byte("print\x00")
	none := key("k")
	none.Fingerprint = nil

	sent := time.Now()
	s.claim(key("k"), request("a", short))
	s.refused(other, request("b", long), idempotency.ErrMismatch)
	s.refused(none, request("b", long), idempotency.ErrMismatch)
	s.takeOver(key("k"), request("b", short), sent.Add(short))
	sent = time.Now()
	// Also when the lease is over: the key still stands for the first request.
	for time.Since(sent) < 2*short {
		s.refused(other, request("c", long), idempotency.ErrMismatch)
		time.Sleep(short / 10)
	}
	s.complete(key("k"), "b", "result")
	s.refused(other, request("d", long), idempotency.ErrMismatch)
	s.replayed(key("k"), "result")

	// Empty is a fingerprint like any other, and nil is empty.
	bare := key("bare")
	bare.Fingerprint = nil
	s.claim(bare, request("a", long))
	bare.Fingerprint = []byte{}
	s.refused(bare, request("b", long), idempotency.ErrInProgress)
	s.refused(key("bare"), request("b", long), idempotency.ErrMismatch)
}

func releaseFrees(_ *testing.T, s suite) {
	s.claim(key("k"), request("a", long))
	if err := s.store.Release(s.Context(), key("k"), "a"); err != nil {
		s.Fatalf("Release = %v", err)
	}
	other := key("k")
	other.Fingerprint = []byte("other")
	s.claim(other, request("b", long)) // nothing was done, so nothing is remembered
	s.lost(key("k"), "a")
	s.complete(other, "b", "result")
}

func neverClaimed(_ *testing.T, s suite) {
	if err := s.store.Extend(s.Context(), key("k"), "a", long); !errors.Is(err, idempotency.ErrLeaseLost) {
		s.Fatalf("Extend of a key that was never claimed = %v, want ErrLeaseLost", err)
	}
	if err := s.store.Complete(s.Context(), key("k"), "a", nil); !errors.Is(err, idempotency.ErrLeaseLost) {
		s.Fatalf("Complete of a key that was never claimed = %v, want ErrLeaseLost", err)
	}
	if err := s.store.Release(s.Context(), key("k"), "a"); err != nil {
		s.Fatalf("Release of a key that was never claimed = %v, want nil", err)
	}
	s.claim(key("k"), request("b", long))
}

func keysAreSeparate(_ *testing.T, s suite) {
	keys := []idempotency.Key{
		{Scope: "a", ID: "bc"},
		{Scope: "ab", ID: "c"},
		{Scope: "a:b", ID: "c"},
		{Scope: "a", ID: "b:c"},
		{Scope: "1:a", ID: "c"},
		{Scope: "{a}", ID: "c"},
		{Scope: idempotency.Global, ID: "c"},
		{Scope: "%", ID: "_"},
		{Scope: "'; --", ID: `\x00"`},
		{Scope: "é", ID: "世界"},
		{Scope: "e\u0301", ID: "世界"},
		{Scope: "A", ID: "bc"},
		{Scope: strings.Repeat("s", 255), ID: strings.Repeat("i", 255), Fingerprint: []byte(strings.Repeat("\xff\x00", 127))},
	}
	for i, k := range keys {
		s.claim(k, request(fmt.Sprint("token ", i), long))
	}
	for i, k := range keys {
		s.complete(k, fmt.Sprint("token ", i), fmt.Sprint("result ", i))
	}
	for i, k := range keys {
		s.replayed(k, fmt.Sprint("result ", i))
	}
}

func payloads(_ *testing.T, s suite) {
	var all strings.Builder
	for i := range 1 << 20 {
		all.WriteByte(byte(i * 31))
	}
	for name, result := range map[string]string{"empty": "", "NUL": "\x00", "1 MiB": all.String()} {
		s.claim(key(name), request("a", long))
		s.complete(key(name), "a", result)
		s.replayed(key(name), result)
	}
	s.claim(key("nil"), request("a", long))
	if err := s.store.Complete(s.Context(), key("nil"), "a", nil); err != nil {
		s.Fatalf("Complete with nil = %v", err)
	}
	s.replayed(key("nil"), "")
}

func cancelledContext(t *testing.T, s suite) {
	ctx := cancelled(t)
	_, err := s.store.Claim(ctx, key("k"), request("a", long))
	s.claim(key("held"), request("a", long))
	for name, err := range map[string]error{
		"Claim":    err,
		"Extend":   s.store.Extend(ctx, key("held"), "a", long),
		"Complete": s.store.Complete(ctx, key("held"), "a", nil),
		"Release":  s.store.Release(ctx, key("held"), "a"),
	} {
		if !errors.Is(err, context.Canceled) {
			s.Errorf("%s with a cancelled context = %v, want context.Canceled", name, err)
		}
	}
	s.complete(key("held"), "a", "result")
}

func oneOfManyClaims(_ *testing.T, s suite) {
	for round := range 20 {
		if n := s.grants(16, key(fmt.Sprint("round ", round))); n != 1 {
			s.Fatalf("%d of 16 claims at once were granted, want 1", n)
		}
	}
}

func oneOfManyTakesOver(_ *testing.T, s suite) {
	keys := make([]idempotency.Key, 10)
	for i := range keys {
		keys[i] = key(fmt.Sprint("dead ", i))
		s.claim(keys[i], request("dead", short))
	}
	time.Sleep(2 * short)
	for _, k := range keys {
		won := 0
		s.poll("the lease to end", func() bool { won = s.grants(16, k); return won > 0 })
		if won != 1 {
			s.Fatalf("%d of 16 claims at once took a dead key over, want 1", won)
		}
		s.lost(k, "dead")
	}
}
