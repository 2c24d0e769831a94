package idempotency_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/idempotency"
)

// Responses that cannot be held back: the first client gets them whole, a retry
// is told so, and the handler does not run again.
func TestHTTPNotKept(t *testing.T) {
	for _, test := range []struct {
		name string
		h    http.HandlerFunc
		want string
	}{
		{"oversize", func(w http.ResponseWriter, r *http.Request) { w.Write(large) }, string(large)},
		{"oversize in parts", func(w http.ResponseWriter, r *http.Request) {
			for i := 0; i < len(large); i += 1000 {
				w.Write(large[i:min(i+1000, len(large))])
			}
		}, string(large)},
		{"Flusher", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "a")
			w.(http.Flusher).Flush()
			w.(http.Flusher).Flush()
			fmt.Fprint(w, "b")
		}, "ab"},
		{"ResponseController", func(w http.ResponseWriter, r *http.Request) {
			c := http.NewResponseController(w)
			if err := c.SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Error(err)
			}
			if err := c.Flush(); err != nil {
				t.Error(err)
			}
			fmt.Fprint(w, "c")
		}, "c"},
		{"Hijack", func(w http.ResponseWriter, r *http.Request) {
			conn, rw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprint(rw, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
			if err := rw.Flush(); err != nil {
				t.Error(err)
			}
		}, "hi"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := serve(t, &idempotency.HTTPOptions{MaxResponse: 5000}, test.h)
			if a := s.post("k", ""); a.StatusCode != 200 || a.body != test.want {
				t.Fatalf("%s with %d bytes", a.Status, len(a.body))
			}
			s.post("k", "").problem(t, 409, "response-not-kept")
			s.post("k", "other").problem(t, 422, "key-reused")
			s.times(1)
		})
	}
}

// The record precedes the first byte: whoever has seen one never runs it again,
// even if the handler dies then.
func TestHTTPNotKeptIsRecordedFirst(t *testing.T) {
	opts := &idempotency.HTTPOptions{Options: idempotency.Options{Lease: 10 * time.Millisecond, Wait: time.Minute}}
	s := serve(t, opts, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "begun")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	if a := s.post("k", ""); !strings.HasPrefix(a.body, "cut off") {
		t.Fatalf("%s %q", a.Status, a.body)
	}
	s.post("k", "").problem(t, 409, "response-not-kept")
	s.times(1)
}

// A streamed failure is a failure.
func TestHTTPStreamedFailure(t *testing.T) {
	s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(502)
		w.(http.Flusher).Flush()
	})
	s.post("k", "")
	if a := s.post("k", ""); a.StatusCode != 502 {
		t.Fatalf("%s", a.Status)
	}
	s.times(2)
}

// A response of exactly the limit is kept.
func TestHTTPLargestResponse(t *testing.T) {
	s := serve(t, &idempotency.HTTPOptions{MaxResponse: len(large)}, func(w http.ResponseWriter, r *http.Request) { w.Write(large) })
	s.post("k", "")
	if a := s.post("k", ""); a.body != string(large) || a.Header.Get("Idempotency-Replayed") != "true" {
		t.Fatalf("%s with %d bytes", a.Status, len(a.body))
	}
	s.times(1)
}

func TestHTTPEdges(t *testing.T) {
	t.Run("no body", func(t *testing.T) {
		s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) })
		for range 2 {
			if a := s.post("k", ""); a.StatusCode != 204 || a.body != "" {
				t.Fatalf("%s %q", a.Status, a.body)
			}
		}
		s.times(1)
	})
	t.Run("nothing written", func(t *testing.T) {
		s := serve(t, nil, func(http.ResponseWriter, *http.Request) {})
		for range 2 {
			if a := s.post("k", ""); a.StatusCode != 200 || a.body != "" {
				t.Fatalf("%s %q", a.Status, a.body)
			}
		}
		s.times(1)
	})
	t.Run("informational", func(t *testing.T) {
		s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(103)
			w.WriteHeader(201)
		})
		for range 2 {
			if a := s.post("k", ""); a.StatusCode != 201 {
				t.Fatalf("%s", a.Status)
			}
		}
		s.times(1)
	})
	t.Run("trailer", func(t *testing.T) {
		s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Trailer", "X-Sum, x-other")
			w.(http.Flusher).Flush()
			w.Header().Set("X-Sum", "42")
		})
		if a := s.post("k", ""); a.Trailer.Get("X-Sum") != "42" {
			t.Fatalf("trailer %v", a.Trailer)
		}
	})
	t.Run("invalid status", func(t *testing.T) {
		s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(7) })
		if a := s.post("k", ""); a.StatusCode != 0 {
			t.Fatalf("%s", a.Status)
		}
	})
	t.Run("form", func(t *testing.T) {
		s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
			b, err := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %v", b, err)
		})
		if a := s.post("k", "a=b"); a.body != "a=b <nil>" {
			t.Fatalf("the handler read %q", a.body)
		}
	})
}
