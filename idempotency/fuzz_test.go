package idempotency

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

func FuzzParseKey(f *testing.F) {
	for _, s := range []string{
		"", "a", `"a"`, `"a b"`, `"a\"b"`, `"a\\"`, `"a`, `"a\`, `"a";p=1`, "a, b", `"a", "b"`, "a;b", "a=b", " a ", "8e03978e-40d5-43dd-bc93-6894a57f9324",
		strings.Repeat("x", 255), strings.Repeat("x", 256), "\x00", "\x7f", "é", `""`, "\"\x1f\"", "a\tb",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseKey(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || id != "" {
				t.Fatalf("ParseKey(%q) = %q, %v", s, id, err)
			}
			return
		}
		if err := (Key{Scope: "s", ID: id}).Validate(); err != nil {
			t.Fatalf("ParseKey(%q) = %q, which is no ID: %v", s, id, err)
		}
		for _, r := range id {
			if r < ' ' || r > '~' {
				t.Fatalf("ParseKey(%q) = %q", s, id)
			}
		}
		if again, err := ParseKey(quote(id)); err != nil || again != id {
			t.Fatalf("ParseKey(%q) = %q, %v; want %q", quote(id), again, err, id)
		}
	})
}

func TestParseKey(t *testing.T) {
	for s, want := range map[string]string{
		"a": "a", `"a"`: "a", `"a b,;"`: "a b,;", `"a\"\\"`: `a"\`, "\t a:b/c=d ": "a:b/c=d", strings.Repeat("x", 255): strings.Repeat("x", 255),
	} {
		if got, err := ParseKey(s); err != nil || got != want {
			t.Errorf("ParseKey(%q) = %q, %v; want %q", s, got, err, want)
		}
	}
	for _, s := range []string{"", " ", `""`, `"`, `"a`, `"a\`, `"a\b"`, `"a"b`, `"a";p`, "a,b", "a b", "a;b", `a"b`, `a\b`, "\x01", "é", "\"é\"", strings.Repeat("x", 256)} {
		if got, err := ParseKey(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseKey(%q) = %q, %v; want ErrInvalid", s, got, err)
		}
	}
}

// Whatever the headers are, the handler runs only with one valid key, and every
// refusal is problem details.
func FuzzMiddlewareHeaders(f *testing.F) {
	f.Add("a", "", "tenant")
	f.Add("a", "b", "tenant")
	f.Add(`"a`, "", "tenant")
	f.Add("", "", "tenant")
	f.Add("a", "", "")
	f.Add("a", "", "bad\x00tenant")
	f.Fuzz(func(t *testing.T, first, second, tenant string) {
		ran := false
		h := Middleware(new(MemoryStore), func(*http.Request) string { return tenant }, nil)(
			http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { ran = true; w.WriteHeader(http.StatusCreated) }),
		)
		req := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("body"))
		for _, v := range []string{first, second} {
			if v != "" {
				req.Header["Idempotency-Key"] = append(req.Header["Idempotency-Key"], v)
			}
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		_, err := ParseKey(first + second)
		valid := err == nil && (first == "" || second == "") && (Key{Scope: tenant, ID: "id"}).Validate() == nil
		if ran != valid || valid != (w.Code == http.StatusCreated) {
			t.Fatalf("ran %v, status %d; the request is valid: %v", ran, w.Code, valid)
		}
		if !ran && w.Header().Get("Content-Type") != "application/problem+json" {
			t.Fatalf("a refusal of type %q", w.Header().Get("Content-Type"))
		}
	})
}

func FuzzDecodeResponse(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{1, 200, 1, 0})
	f.Add(encodeResponse(&response{status: 201, header: http.Header{"A": {"b", "c"}}, body: []byte("body")}))
	f.Add(encodeResponse(&response{status: 200, dropped: true}))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeResponse(b)
		if err != nil {
			return
		}
		again, err := decodeResponse(encodeResponse(r))
		if err != nil || fmt.Sprint(again) != fmt.Sprint(r) {
			t.Fatalf("%v became %v, %v", r, again, err)
		}
	})
}
