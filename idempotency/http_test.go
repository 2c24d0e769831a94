package idempotency_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/idempotency"
)

// A service is a handler behind the middleware on a real server.
type service struct {
	*testing.T
	store idempotency.Store
	url   string
	ran   atomic.Int64
}

// serve starts the service; requests name their tenant in the header Tenant.
func serve(t *testing.T, opts *idempotency.HTTPOptions, h http.HandlerFunc) *service {
	t.Helper()
	s := &service{T: t, store: new(idempotency.MemoryStore)}
	s.start(opts, h)
	return s
}

func (s *service) start(opts *idempotency.HTTPOptions, h http.HandlerFunc) {
	if opts == nil {
		opts = &idempotency.HTTPOptions{}
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	tenant := func(r *http.Request) string { return r.Header.Get("Tenant") }
	server := httptest.NewUnstartedServer(idempotency.Middleware(s.store, tenant, opts)(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) { s.ran.Add(1); h(w, r) },
	)))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // panics on purpose
	server.Start()
	s.Cleanup(server.Close)
	s.url = server.URL
}

type answer struct {
	*http.Response
	body string
}

// send posts body with the key; headers come in pairs.
func (s *service) send(method, path, key, body string, headers ...string) answer {
	s.Helper()
	req, err := http.NewRequestWithContext(s.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.Fatal(err)
	}
	req.Header.Set("Tenant", "acme")
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Tenant" {
			req.Header.Del("Tenant")
		}
		req.Header.Add(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return answer{&http.Response{Status: err.Error(), Header: http.Header{}}, ""}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{resp, "cut off: " + err.Error()}
	}
	return answer{resp, string(b)}
}

func (s *service) post(key, body string) answer { s.Helper(); return s.send("POST", "/pay", key, body) }

// problem expects problem details.
func (a answer) problem(t *testing.T, status int, code string) {
	t.Helper()
	var p struct {
		Status int
		Title  string
		Code   string
	}
	if a.StatusCode != status || a.Header.Get("Content-Type") != "application/problem+json" {
		t.Fatalf("got %s, %s %q; want problem details with %d", a.Status, a.Header.Get("Content-Type"), a.body, status)
	}
	if err := json.Unmarshal([]byte(a.body), &p); err != nil || p.Status != status || p.Title == "" || p.Code != "idempotency-"+code {
		t.Fatalf("problem details %s (%v), want the code %s", a.body, err, code)
	}
	if a.Header.Get("Idempotency-Replayed") != "" {
		t.Fatal("problem details are marked as a replay")
	}
}

func (s *service) times(want int64) {
	s.Helper()
	if n := s.ran.Load(); n != want {
		s.Fatalf("the handler ran %d times, want %d", n, want)
	}
}

func TestHTTPReplay(t *testing.T) {
	s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		h := w.Header()
		h.Set("Location", "/payments/7")
		h.Add("Link", "<a>")
		h.Add("Link", "<b>")
		h.Set("Set-Cookie", "session=secret")
		h.Set("Authorization", "secret")
		h.Set("X-Internal", "not listed")
		w.WriteHeader(http.StatusCreated)
		h.Set("Location", "/too/late")
		h.Set("X-Late", "too late")
		fmt.Fprintf(w, "<p>%s</p>\x00\xff", body)
		w.WriteHeader(http.StatusTeapot) // too late as well
	})
	first := s.post("k", "ten")
	if first.StatusCode != 201 || first.Header.Get("Set-Cookie") == "" || first.Header.Get("Location") != "/payments/7" ||
		first.Header.Get("X-Late") != "" || first.Header.Get("Idempotency-Replayed") != "" {
		t.Fatalf("the first response: %s %v", first.Status, first.Header)
	}
	for _, key := range []string{"k", `"k"`, "  k\t"} {
		again := s.post(key, "ten")
		if again.StatusCode != 201 || again.body != first.body || again.body != "<p>ten</p>\x00\xff" {
			t.Fatalf("the replay: %s %q", again.Status, again.body)
		}
		want := maps.Clone(first.Header)
		for _, name := range []string{"Set-Cookie", "Authorization", "X-Internal", "Date"} {
			want.Del(name)
		}
		want.Set("Idempotency-Replayed", "true")
		again.Header.Del("Date")
		if fmt.Sprint(again.Header) != fmt.Sprint(want) {
			t.Fatalf("headers of the replay:\n%v, want\n%v", again.Header, want)
		}
	}
	s.times(1)
}

func TestHTTPFingerprint(t *testing.T) {
	s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL) })
	s.send("POST", "/a/b?c=d", "k", "body")
	for name, a := range map[string]answer{
		"body":   s.send("POST", "/a/b?c=d", "k", "body "),
		"query":  s.send("POST", "/a/b?c=e", "k", "body"),
		"path":   s.send("POST", "/a/c?c=d", "k", "body"),
		"escape": s.send("POST", "/a%2Fb?c=d", "k", "body"),
		"method": s.send("PATCH", "/a/b?c=d", "k", "body"),
	} {
		t.Run(name, func(t *testing.T) { a.problem(t, 422, "key-reused") })
	}
	s.times(1)
	// Another tenant's key is another key.
	if a := s.send("POST", "/a/b?c=d", "k", "other", "Tenant", "other"); a.StatusCode != 200 || a.Header.Get("Idempotency-Replayed") != "" {
		t.Fatalf("another tenant got %s, replayed %q", a.Status, a.Header.Get("Idempotency-Replayed"))
	}
	s.times(2)
}

func TestHTTPRefusals(t *testing.T) {
	s := serve(t, &idempotency.HTTPOptions{MaxBody: 10}, func(http.ResponseWriter, *http.Request) {})
	s.post("", "").problem(t, 400, "key-missing")
	s.post("a b", "").problem(t, 400, "key-invalid")
	s.post(`"a`, "").problem(t, 400, "key-invalid")
	s.post("a, b", "").problem(t, 400, "key-invalid")
	s.post("\x80", "").problem(t, 400, "key-invalid")
	s.post(strings.Repeat("x", 256), "").problem(t, 400, "key-invalid")
	s.send("POST", "/", "a", "", "Idempotency-Key", "a").problem(t, 400, "key-invalid")
	s.post("k", "12345678901").problem(t, 413, "body-too-large")
	s.send("POST", "/", "k", "", "Tenant", "").problem(t, 500, "scope-missing")
	s.times(0)
	if a := s.post("k", "1234567890"); a.StatusCode != 200 {
		t.Fatalf("a body of the limit: %s", a.Status)
	}
	s.send("GET", "/", "", "")
	s.send("GET", "/", "k", "")
	s.send("PUT", "/", "k", "a body longer than the limit")
	s.times(4)
}

func TestHTTPOptions(t *testing.T) {
	s := serve(t, &idempotency.HTTPOptions{
		Header: "Request-Id", Methods: []string{"PUT"}, Optional: true,
		Headers: []string{"x-kept", "set-cookie", "connection"},
		Keep:    func(status int) bool { return status == 503 },
	}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Kept", "yes")
		w.Header().Set("Set-Cookie", "no")
		w.Header().Set("Location", "no")
		w.WriteHeader(503)
	})
	s.send("PUT", "/", "ignored", "")
	s.send("POST", "/", "ignored", "", "Request-Id", "k")
	s.send("PUT", "/", "", "", "Request-Id", "k")
	s.times(3)
	a := s.send("PUT", "/", "", "", "Request-Id", "k")
	s.times(3)
	if a.StatusCode != 503 || a.Header.Get("X-Kept") != "yes" || a.Header.Get("Set-Cookie")+a.Header.Get("Location") != "" {
		t.Fatalf("the replay: %s %v", a.Status, a.Header)
	}
}

func TestHTTPInProgress(t *testing.T) {
	entered, leave := make(chan struct{}, 1), make(chan struct{})
	s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-leave
		fmt.Fprint(w, "done")
	})
	first := make(chan answer)
	go func() { first <- s.post("k", "") }()
	<-entered
	a := s.post("k", "")
	a.problem(t, 409, "in-progress")
	if after := a.Header.Get("Retry-After"); after < "1" || after > "5" || len(after) != 1 {
		t.Fatalf("Retry-After: %q, want 1 to 5 seconds", after)
	}
	s.post("k", "other").problem(t, 422, "key-reused")
	close(leave)
	if a := <-first; a.body != "done" {
		t.Fatalf("the first got %s", a.Status)
	}
	if a := s.post("k", ""); a.body != "done" || a.Header.Get("Idempotency-Replayed") != "true" {
		t.Fatalf("the replay: %s %q", a.Status, a.body)
	}
	s.times(1)
}

func TestHTTPDuplicatesWait(t *testing.T) {
	s := serve(t, &idempotency.HTTPOptions{Options: idempotency.Options{Wait: time.Minute}},
		func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "done") })
	var wg sync.WaitGroup
	for range 30 {
		wg.Go(func() {
			if a := s.post("k", "b"); a.body != "done" {
				t.Errorf("%s %q", a.Status, a.body)
			}
		})
	}
	wg.Wait()
	s.times(1)
}

// What is not kept frees the key at once.
func TestHTTPFailures(t *testing.T) {
	for _, status := range []int{429, 500, 503} {
		s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) { http.Error(w, "failed", status) })
		for range 2 {
			if a := s.post("k", ""); a.StatusCode != status || a.body != "failed\n" {
				t.Fatalf("%s %q", a.Status, a.body)
			}
		}
		s.times(2)
	}
	s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusPaymentRequired) })
	s.post("k", "")
	if a := s.post("k", ""); a.StatusCode != 402 || a.Header.Get("Idempotency-Replayed") != "true" {
		t.Fatalf("a decline is an outcome, got %s", a.Status)
	}
}

// A panic leaves the key to its lease.
func TestHTTPPanic(t *testing.T) {
	var broken atomic.Bool
	broken.Store(true)
	s := serve(t, &idempotency.HTTPOptions{Options: idempotency.Options{Lease: 300 * time.Millisecond, Wait: time.Minute}},
		func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "partial")
			if broken.Load() {
				panic(http.ErrAbortHandler)
			}
		})
	if a := s.post("k", ""); a.StatusCode != 0 {
		t.Fatalf("a panic was answered with %s", a.Status)
	}
	broken.Store(false)
	if a := s.post("k", ""); a.body != "partial" || a.Header.Get("Idempotency-Replayed") != "" {
		t.Fatalf("after the lease: %s %q", a.Status, a.body)
	}
	s.times(2)
}

// A handler that fails because its client has gone may have done half of it.
func TestHTTPClientGone(t *testing.T) {
	entered, left := make(chan struct{}), make(chan struct{})
	s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-r.Context().Done()
		w.WriteHeader(500)
		close(left)
	})
	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, "POST", s.url+"/pay", nil)
	req.Header.Set("Tenant", "acme")
	req.Header.Set("Idempotency-Key", "k")
	go func() { <-entered; cancel() }()
	if resp, err := http.DefaultClient.Do(req); err == nil {
		resp.Body.Close()
	}
	<-left
	s.post("k", "").problem(t, 409, "in-progress")
	s.times(1)
}

func TestHTTPStoreDown(t *testing.T) {
	down := &failing{Store: new(idempotency.MemoryStore), claim: errors.New("down")}
	s := &service{T: t, store: down}
	s.start(nil, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "done") })
	a := s.post("k", "")
	a.problem(t, 503, "store-unavailable")
	if a.Header.Get("Retry-After") != "1" {
		t.Fatalf("Retry-After: %q", a.Header.Get("Retry-After"))
	}
	s.times(0)
	// Down between the handler and the record: what was done is answered.
	down.claim, down.complete = nil, errors.New("down")
	s.start(&idempotency.HTTPOptions{Options: idempotency.Options{FinishTimeout: 20 * time.Millisecond}},
		func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "done") })
	if a := s.post("k", ""); a.body != "done" {
		t.Fatalf("%s %q", a.Status, a.body)
	}
	// Taken over by another: its response is the one to ask for.
	down.complete = idempotency.ErrLeaseLost
	s.post("k2", "").problem(t, 409, "in-progress")
}

func TestHTTPAtMostOnce(t *testing.T) {
	s := serve(t, &idempotency.HTTPOptions{Options: idempotency.Options{Lease: 50 * time.Millisecond, AtMostOnce: true, Wait: time.Minute}},
		func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	s.post("k", "")
	s.post("k", "").problem(t, 409, "outcome-unknown")
	s.times(1)
}

// A record of Do under the key of a request is not mistaken for a response.
func TestHTTPForeignRecord(t *testing.T) {
	s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "done") })
	s.post("probe", "body")
	for i, foreign := range [][]byte{nil, []byte(`{"a":1}`), {1}, {1, 200, 1, 255}} {
		k := idempotency.Key{Scope: "acme", ID: fmt.Sprint("k", i)}
		store := &anyPrint{s.store}
		if _, _, err := idempotency.Do(t.Context(), store, k, nil, func(context.Context) ([]byte, error) { return foreign, nil }); err != nil {
			t.Fatal(err)
		}
		other := &service{T: t, store: store}
		other.start(nil, func(http.ResponseWriter, *http.Request) {})
		other.post(k.ID, "body").problem(t, 409, "response-not-kept")
		other.times(0)
	}
}

// anyPrint is a store that leaves the fingerprint out.
type anyPrint struct{ idempotency.Store }

func (s anyPrint) Claim(ctx context.Context, k idempotency.Key, req idempotency.ClaimRequest) (idempotency.Claim, error) {
	k.Fingerprint = nil
	return s.Store.Claim(ctx, k, req)
}

// failing is a store whose calls fail on demand.
type failing struct {
	idempotency.Store
	claim, extend, complete error
}

func (s *failing) Claim(ctx context.Context, k idempotency.Key, req idempotency.ClaimRequest) (idempotency.Claim, error) {
	if s.claim != nil {
		return idempotency.Claim{}, s.claim
	}
	return s.Store.Claim(ctx, k, req)
}

func (s *failing) Extend(ctx context.Context, k idempotency.Key, token string, lease time.Duration) error {
	if s.extend != nil {
		return s.extend
	}
	return s.Store.Extend(ctx, k, token, lease)
}

func (s *failing) Complete(ctx context.Context, k idempotency.Key, token string, result []byte) error {
	if s.complete != nil {
		return s.complete
	}
	return s.Store.Complete(ctx, k, token, result)
}

var large = bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
