package locktest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ashlar-go/ashlar/lock"
)

func acquireRelease(s suite) {
	s.acquire(request("a", long, "k"))
	s.refused(request("b", long, "k"), "k", long)
	s.acquire(request("b", long, "other"))
	s.release(request("a", long, "k"))
	s.acquire(request("b", long, "k"))
	s.refused(request("a", long, "k"), "k", long)
}

func held(s suite) {
	s.acquire(request("a", long, "k"))
	waiting := request("b", long, "k")
	waiting.Waiting = true
	for range 3 {
		s.refused(waiting, "k", long)
		s.refused(request("c", long, "k"), "k", long)
	}
	s.extend(request("a", long, "k")) // whatever was noted of those who wait
	s.release(request("a", long, "k"))
	s.acquire(waiting)
}

// A caller repeats what it got no reply to.
func repetitions(s suite) {
	a := request("a", long, "k", "l")
	token := s.acquire(a)
	for range 3 {
		if again := s.acquire(a); again != token {
			s.Fatalf("the same acquisition was given the tokens %d and %d", token, again)
		}
	}
	s.refused(request("b", long, "k"), "k", long)
	s.extend(a)
	s.extend(a)
	s.release(a)
	s.release(a)
	if next := s.acquire(request("b", long, "k")); next <= token {
		s.Fatalf("token %d after %d", next, token)
	}
}

func neverHeld(s suite) {
	s.lost(request("a", long, "k"))
	s.release(request("a", long, "k"))
	s.acquire(request("b", long, "k"))
}

func tokensRise(s suite) {
	last := int64(0)
	for i := range 20 {
		req := request(fmt.Sprint("owner ", i), long, "k")
		if i%5 == 4 {
			req.TTL = time.Millisecond
		}
		token := s.takeOver(req, time.Time{})
		if token <= last {
			s.Fatalf("token %d after %d", token, last)
		}
		last = token
		if req.TTL == long {
			s.release(req)
		}
	}
	// Also one that had its key before gets a new one.
	req := request("owner 0", long, "k")
	if token := s.takeOver(req, time.Time{}); token <= last {
		s.Fatalf("token %d after %d", token, last)
	}
}

func severalKeys(s suite) {
	s.acquire(request("a", long, "b"))
	s.refused(request("b", long, "a", "b", "c"), "b", long)
	s.acquire(request("c", long, "a")) // was not taken
	s.acquire(request("c", long, "c"))
	s.release(request("a", long, "b"))
	s.refused(request("b", long, "a", "b"), "a", long)
	s.release(request("c", long, "a"))
	s.release(request("c", long, "c"))
	all := request("b", long, "a", "b", "c")
	s.acquire(all)
	for _, key := range []string{"a", "b", "c"} {
		s.refused(request("d", long, key), key, long)
	}
	s.extend(all)
	s.release(all)
	for _, key := range []string{"a", "b", "c"} {
		s.acquire(request("d", long, key))
	}
}

func severalKeysAreOneToken(s suite) {
	last := int64(0)
	for i, keys := range [][]string{{"a"}, {"b"}, {"a", "b"}, {"b", "c"}, {"c"}, {"a", "b", "c"}, {"a"}} {
		req := request(fmt.Sprint("owner ", i), long, keys...)
		token := s.acquire(req)
		if token <= last {
			s.Fatalf("token %d of %v after %d", token, keys, last)
		}
		last = token
		s.release(req)
	}
}

func partlyLost(s suite) {
	both := request("a", short, "k", "l")
	sent := time.Now()
	s.acquire(both)
	b := request("b", long, "k")
	s.takeOver(b, sent.Add(short))
	s.lost(both)
	if err := s.store.Release(s.Context(), both); !errors.Is(err, lock.ErrLost) {
		s.Fatalf("Release of keys of which one is another's = %v, want ErrLost", err)
	}
	s.refused(request("c", long, "k"), "k", long)
	s.acquire(request("c", long, "l"))
}

func keysAreSeparate(s suite) {
	keys := []string{"a", "A", "a b", "a+b", "{a}", "{a}b", "{}", "%", "_", `'; --`, `\x00"`, "é", "e\u0301", "世界", strings.Repeat("k", 255)}
	for i, key := range keys {
		s.acquire(lock.Request{Keys: []string{key}, Owner: fmt.Sprint("owner ", i), TTL: long})
	}
	for i, key := range keys {
		req := lock.Request{Keys: []string{key}, Owner: fmt.Sprint("owner ", i), TTL: long}
		s.extend(req)
		req.Owner = "x"
		if _, err := s.store.Acquire(s.Context(), req); !errors.Is(err, lock.ErrHeld) {
			s.Fatalf("Acquire of %q = %v, want ErrHeld", key, err)
		}
	}
	// Owners are names like any other, too.
	for i, owner := range []string{"a", "b a", "b+a", "+a", " a", "'", "a%"} {
		key := fmt.Sprint("owned ", i)
		s.acquire(request(owner, long, key))
		s.refused(request("a"+owner, long, key), key, long)
		s.lost(request("a"+owner, long, key))
		if owner != "a" {
			s.lost(request("a", long, key))
		}
		s.release(request(owner, long, key))
		s.acquire(request("next", long, key))
	}
}

func invalidKeys(s suite) {
	many := make([]string, lock.MaxKeys+1)
	for i := range many {
		many[i] = fmt.Sprintf("{t}%03d", i)
	}
	for name, keys := range map[string][]string{
		"none": nil, "an empty one": {""}, "too long": {strings.Repeat("k", 256)}, "not UTF-8": {"\xff"},
		"control character": {"a\nb"}, "not sorted": {"{t}b", "{t}a"}, "twice": {"{t}a", "{t}a"}, "too many": many,
	} {
		req := lock.Request{Keys: keys, Owner: "a", TTL: long}
		_, err := s.store.Acquire(s.Context(), req)
		for op, err := range map[string]error{"Acquire": err, "Extend": s.store.Extend(s.Context(), req), "Release": s.store.Release(s.Context(), req)} {
			if !errors.Is(err, lock.ErrInvalid) {
				s.Errorf("%s, %s = %v, want ErrInvalid", op, name, err)
			}
		}
	}
	req := lock.Request{Keys: many[:lock.MaxKeys], Owner: "a", TTL: long}
	s.acquire(req)
	s.release(req)
}

func cancelledContext(s suite) {
	s.acquire(request("a", long, "held"))
	ctx := cancelled(s.Context())
	_, err := s.store.Acquire(ctx, request("a", long, "k"))
	for name, err := range map[string]error{
		"Acquire": err,
		"Extend":  s.store.Extend(ctx, request("a", long, "held")),
		"Release": s.store.Release(ctx, request("a", long, "held")),
	} {
		if !errors.Is(err, context.Canceled) {
			s.Errorf("%s with a cancelled context = %v, want context.Canceled", name, err)
		}
	}
	s.refused(request("b", long, "held"), "held", long)
}

func leaseEndsThenTakeover(s suite) {
	sent := time.Now()
	first := s.acquire(request("a", short, "k"))
	second := s.takeOver(request("b", long, "k"), sent.Add(short))
	if second <= first {
		s.Fatalf("token %d after %d", second, first)
	}
	s.lost(request("a", long, "k"))
	s.refused(request("a", long, "k"), "k", long)
	s.refused(request("c", long, "k"), "k", long)
	s.extend(request("b", long, "k"))
}

func extendKeepsTheLease(s suite) {
	a := request("a", short, "k")
	s.poll("an extension in time", func() bool {
		sent := time.Now()
		s.acquire(a)
		err := s.store.Extend(s.Context(), request("a", long, "k"))
		if err != nil && time.Since(sent) < short {
			s.Fatal(err)
		}
		return err == nil
	})
	for start := time.Now(); time.Since(start) < 2*short; time.Sleep(short / 10) {
		s.refused(request("b", long, "k"), "k", long)
	}
	// An extension may also shorten the lease.
	sent := time.Now()
	s.extend(a)
	s.takeOver(request("b", long, "k"), sent.Add(short))
	s.lost(a)
}

// A lease that has ended is not brought back: not where another has the key, and
// not where nobody has.
func extendIsForTheOwnerOnly(s suite) {
	s.acquire(request("a", long, "k"))
	s.lost(request("b", long, "k"))
	s.refused(request("b", long, "k"), "k", long)
	s.extend(request("a", long, "k"))
	s.release(request("a", long, "k"))
	s.lost(request("a", long, "k"))
	s.acquire(request("b", long, "k")) // it was free

	sent := time.Now()
	s.acquire(request("a", short, "ended"))
	s.acquire(request("a", short, "over"))
	s.takeOver(request("b", long, "over"), sent.Add(short)) // by now both have ended
	s.lost(request("a", long, "ended"))
	s.lost(request("a", long, "over"))
	s.acquire(request("b", long, "ended"))
}

func releaseIsForTheOwnerOnly(s suite) {
	s.acquire(request("a", long, "k"))
	if err := s.store.Release(s.Context(), request("b", long, "k")); !errors.Is(err, lock.ErrLost) {
		s.Fatalf("Release by one who does not hold the key = %v, want ErrLost", err)
	}
	s.refused(request("b", long, "k"), "k", long)
	s.extend(request("a", long, "k"))
}

func oneOfManyAcquires(s suite) {
	for round := range 20 {
		if n := s.grants(16, fmt.Sprint("round ", round)); n != 1 {
			s.Fatalf("%d of 16 acquisitions at once were granted, want 1", n)
		}
	}
	// Of several keys, some may get in each other's way, and none may have all.
	s.poll("one to have all of three keys", func() bool {
		n := s.grants(16, "a", "b", "c")
		if n > 1 {
			s.Fatalf("%d of 16 acquisitions of three keys at once were granted, want 1", n)
		}
		return n == 1
	})
}

func oneOfManyTakesOver(s suite) {
	const rounds = 10
	for round := range rounds {
		s.acquire(request("dead", short, fmt.Sprint("round ", round)))
	}
	s.acquire(request("dead", short, "last"))
	s.takeOver(request("probe", long, "last"), time.Time{})
	for round := range rounds {
		if n := s.grants(16, fmt.Sprint("round ", round)); n != 1 {
			s.Fatalf("%d of 16 acquisitions at once of a lease that has ended were granted, want 1", n)
		}
	}
}
