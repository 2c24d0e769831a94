package idempotencytest

import (
	"errors"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/idempotency"
)

func leaseEndsThenTakeover(_ *testing.T, s suite) {
	sent := time.Now()
	s.claim(key("k"), request("a", short))
	s.takeOver(key("k"), request("b", long), sent.Add(short))
	s.lost(key("k"), "a")
	s.refused(key("k"), request("c", long), idempotency.ErrInProgress)
	s.complete(key("k"), "b", "of b")
	s.lost(key("k"), "a")
	s.replayed(key("k"), "of b")
}

// An owner that comes late, while nobody has taken the key over, did its work
// all the same; to refuse its result would only have the work done again.
func lateOwnerMayComplete(_ *testing.T, s suite) {
	sent := time.Now()
	for _, id := range []string{"complete", "extend", "release", "over"} { // "over" is the last to end
		s.claim(key(id), request("a", short))
	}
	s.takeOver(key("over"), request("b", long), sent.Add(short)) // so all leases are over
	s.complete(key("complete"), "a", "result")
	s.replayed(key("complete"), "result")
	if err := s.store.Extend(s.Context(), key("extend"), "a", long); err != nil {
		s.Fatalf("Extend of a claim that nobody has taken over = %v", err)
	}
	s.refused(key("extend"), request("b", long), idempotency.ErrInProgress)
	if err := s.store.Release(s.Context(), key("release"), "a"); err != nil {
		s.Fatalf("Release of a claim that nobody has taken over = %v", err)
	}
	s.lost(key("over"), "a")
}

func extendKeepsTheClaim(_ *testing.T, s suite) {
	s.claim(key("k"), request("a", short))
	if err := s.store.Extend(s.Context(), key("k"), "a", long); err != nil {
		s.Fatal(err)
	}
	for start := time.Now(); time.Since(start) < 2*short; time.Sleep(short / 10) {
		s.refused(key("k"), request("b", long), idempotency.ErrInProgress)
	}
	// An extension may also shorten the lease.
	sent := time.Now()
	if err := s.store.Extend(s.Context(), key("k"), "a", short); err != nil {
		s.Fatal(err)
	}
	s.takeOver(key("k"), request("b", long), sent.Add(short))
	s.lost(key("k"), "a")
}

func atMostOnce(_ *testing.T, s suite) {
	once := request("b", long)
	once.AtMostOnce = true
	sent := time.Now()
	s.claim(key("k"), request("a", short))
	s.poll("the lease to end", func() bool {
		_, err := s.store.Claim(s.Context(), key("k"), once)
		unknown := errors.Is(err, idempotency.ErrUnknown)
		if !unknown && !errors.Is(err, idempotency.ErrInProgress) || unknown && time.Since(sent) < short {
			s.Fatalf("Claim = %v after %v; want ErrInProgress, then ErrUnknown", err, time.Since(sent))
		}
		return unknown
	})
	s.refused(key("k"), once, idempotency.ErrUnknown)
	s.complete(key("k"), "a", "late")
	s.replayed(key("k"), "late")

	free := key("free")
	s.claim(free, once)
	other := once
	other.Token = "c"
	s.refused(free, other, idempotency.ErrInProgress)
	if err := s.store.Release(s.Context(), free, "b"); err != nil {
		s.Fatal(err)
	}
	s.claim(free, once)
}

func ttlEnds(_ *testing.T, s suite) {
	req := request("a", 10*short)
	req.TTL = 10 * short // longer than a machine stalls between two calls
	other := key("k")
	other.Fingerprint = []byte("other")
	sent := time.Now()
	s.claim(key("k"), req)
	s.complete(key("k"), "a", "result")
	c, err := s.store.Claim(s.Context(), key("k"), request("b", long))
	if time.Since(sent) < req.TTL && (err != nil || !c.Done || c.TTL <= 0 || c.TTL > req.TTL) {
		s.Fatalf("Claim before the TTL ended = %+v, %v", c, err)
	}
	k := other
	k.ID = "k2"
	s.claim(k, req)
	s.complete(k, "a", "result")
	s.poll("the record to expire", func() bool {
		k.Fingerprint = []byte("another")
		_, err := s.store.Claim(s.Context(), k, request("c", long))
		if err == nil && time.Since(sent) < req.TTL {
			s.Fatal("the record was gone before its TTL")
		}
		return err == nil
	})
	s.lost(k, "a")
	s.complete(k, "c", "new")
	s.replayed(k, "new")
}

// A claim that is kept up does not expire with the TTL of its record.
func leaseOutlivesTTL(_ *testing.T, s suite) {
	req := request("a", short)
	req.TTL = short
	s.poll("an extension in time", func() bool {
		sent := time.Now()
		s.claim(key("k"), req)
		err := s.store.Extend(s.Context(), key("k"), "a", long)
		if err != nil && time.Since(sent) < short {
			s.Fatal(err)
		}
		return err == nil
	})
	for start := time.Now(); time.Since(start) < 2*short; time.Sleep(short / 10) {
		s.refused(key("k"), request("b", long), idempotency.ErrInProgress)
	}
	if err := s.store.Extend(s.Context(), key("k"), "a", long); err != nil {
		s.Fatalf("Extend after the TTL = %v", err)
	}
}
