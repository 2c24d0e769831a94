package client_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/ashlar-go/ashlar/examples/payments/client"
)

// answers serves one handler after the other and notes the requests.
type answers struct {
	t        *testing.T
	handlers []http.HandlerFunc
	bodies   []string
}

func (a *answers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		a.t.Error(err)
	}
	a.bodies = append(a.bodies, string(body))
	if len(a.bodies) > len(a.handlers) {
		a.t.Error("one request too many")
		return
	}
	a.handlers[len(a.bodies)-1](w, r)
}

func problem(status int, kind string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"type":"/problems/%s","title":"T","status":%d}`, kind, status)
	}
}

func done(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Idempotency-Replayed", "true")
	fmt.Fprint(w, `{"payment_id":"p","state":"AUTHORIZED","amount":5,"currency":"EUR"}`)
}

func broken(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func pending(w http.ResponseWriter, _ *http.Request) {
	w.WriteHeader(http.StatusAccepted)
	fmt.Fprint(w, `{"payment_id":"p","state":"PENDING_VERIFICATION"}`)
}

func TestPay(t *testing.T) {
	for _, tt := range []struct {
		name     string
		retries  int
		handlers []http.HandlerFunc
		state    string
		status   int // of the error
	}{
		{"at once", 3, []http.HandlerFunc{done}, "AUTHORIZED", 0},
		{"pending is an answer", 3, []http.HandlerFunc{pending}, "PENDING_VERIFICATION", 0},
		{"after a broken connection", 3, []http.HandlerFunc{broken, done}, "AUTHORIZED", 0},
		{"after 503 and 502", 3, []http.HandlerFunc{problem(503, "unavailable"), problem(502, ""), done}, "AUTHORIZED", 0},
		{"after in flight", 3, []http.HandlerFunc{problem(409, "in-flight"), done}, "AUTHORIZED", 0},
		{"paid already", 3, []http.HandlerFunc{problem(409, "order-paid")}, "", 409},
		{"refused", 3, []http.HandlerFunc{problem(422, "key-reused")}, "", 422},
		{"too many failures", 2, []http.HandlerFunc{problem(503, ""), problem(503, ""), problem(503, "")}, "", 503},
		{"no retries", -1, []http.HandlerFunc{problem(503, "")}, "", 503},
		{"not JSON", -1, []http.HandlerFunc{func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }}, "", -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := &answers{t: t, handlers: tt.handlers}
			srv := httptest.NewServer(a)
			defer srv.Close()
			p, err := client.New(srv.URL, &client.Options{Retries: tt.retries}).Pay(t.Context(), client.Request{IdempotencyKey: "k", Amount: 5})
			var refusal *client.Error
			switch {
			case tt.status == 0 && (err != nil || p.State != tt.state):
				t.Errorf("%+v, %v", p, err)
			case tt.status > 0 && (!errors.As(err, &refusal) || refusal.Status != tt.status):
				t.Errorf("%v, want status %d", err, tt.status)
			case tt.status < 0 && err == nil:
				t.Error("accepted")
			}
			if len(a.bodies) != len(tt.handlers) {
				t.Errorf("%d requests, want %d", len(a.bodies), len(tt.handlers))
			}
			for _, b := range a.bodies {
				var r client.Request
				if b != a.bodies[0] || json.Unmarshal([]byte(b), &r) != nil || r.IdempotencyKey != "k" {
					t.Errorf("a retry is another request: %s", b)
				}
			}
		})
	}
}
