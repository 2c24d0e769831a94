package gateway_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/examples/payments/gateway"
)

var charge = gateway.Charge{Reference: "ref", Amount: 5, Currency: "EUR", Method: "card", Token: "tok_ok"}

// Whatever is not a definitive answer to the question is unknown.
func TestClient(t *testing.T) {
	body := func(reference, status string, amount int, currency string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"reference":%q,"id":"1","status":%q,"amount":%d,"currency":%q}`, reference, status, amount, currency)
		}
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		charge  error
		lookup  error
	}{
		{"approved", body("ref", "approved", 5, "EUR"), nil, nil},
		{"declined", body("ref", "declined", 5, "EUR"), nil, nil},
		{"another reference", body("other", "approved", 5, "EUR"), gateway.ErrUnknown, gateway.ErrUnknown},
		{"another amount", body("ref", "approved", 6, "EUR"), gateway.ErrUnknown, gateway.ErrUnknown},
		{"another currency", body("ref", "declined", 5, "USD"), gateway.ErrUnknown, gateway.ErrUnknown},
		{"another status", body("ref", "maybe", 5, "EUR"), gateway.ErrUnknown, gateway.ErrUnknown},
		{"not found", status(404), gateway.ErrUnknown, gateway.ErrNotFound},
		{"500", status(500), gateway.ErrUnknown, gateway.ErrUnknown},
		{"400", status(400), gateway.ErrUnknown, gateway.ErrUnknown},
		{"409", status(409), gateway.ErrUnknown, gateway.ErrUnknown},
		{"204", status(204), gateway.ErrUnknown, gateway.ErrUnknown},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/elsewhere" {
				t.Error("a redirect was followed")
			}
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}, gateway.ErrUnknown, gateway.ErrUnknown},
		{"nothing", func(http.ResponseWriter, *http.Request) {}, gateway.ErrUnknown, gateway.ErrUnknown},
		{"half an answer", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"reference":"ref","sta`)) }, gateway.ErrUnknown, gateway.ErrUnknown},
		{"an endless answer", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte(`{"reason":"` + strings.Repeat("x", 1<<20)))
		}, gateway.ErrUnknown, gateway.ErrUnknown},
		{"a broken connection", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, gateway.ErrUnknown, gateway.ErrUnknown},
		{"no answer", func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body) // from then on the server sees that the client leaves
			<-r.Context().Done()
		}, gateway.ErrUnknown, gateway.ErrUnknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := httptest.NewServer(tt.handler)
			defer srv.Close()
			timeout := 10 * time.Second
			if tt.name == "no answer" {
				timeout = 50 * time.Millisecond
			}
			c := gateway.New(srv.URL+"/", &gateway.Options{Timeout: timeout})
			if _, err := c.Charge(t.Context(), charge); !errors.Is(err, tt.charge) {
				t.Errorf("charge: %v, want %v", err, tt.charge)
			}
			if _, err := c.Lookup(t.Context(), "ref", 5, "EUR"); !errors.Is(err, tt.lookup) {
				t.Errorf("lookup: %v, want %v", err, tt.lookup)
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		srv := httptest.NewServer(nil)
		srv.Close()
		if _, err := gateway.New(srv.URL, nil).Charge(t.Context(), charge); !errors.Is(err, gateway.ErrUnknown) {
			t.Error(err)
		}
	})
}
