package idempotency_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/ashlar-go/ashlar/idempotency"
)

// A handler that runs once per Idempotency-Key and tenant.
func ExampleMiddleware() {
	pay := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Println("charging")
		w.WriteHeader(http.StatusCreated)
		fmt.Fprint(w, `{"charge":"ch_1"}`)
	})
	// The tenant comes from whatever authenticates the request.
	tenant := func(r *http.Request) string { user, _, _ := r.BasicAuth(); return user }
	handler := idempotency.Middleware(new(idempotency.MemoryStore), tenant, nil)(pay)

	post := func(key, body string) {
		r := httptest.NewRequest(http.MethodPost, "/payments", strings.NewReader(body))
		r.SetBasicAuth("merchant-7", "secret")
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Println(w.Code, w.Header().Get("Idempotency-Replayed"), strings.TrimSpace(w.Body.String()))
	}
	post("order-42", `{"amount":1000}`)
	post("order-42", `{"amount":1000}`)
	post("order-42", `{"amount":9900}`)
	post("", `{"amount":1000}`)
	// Output:
	// charging
	// 201  {"charge":"ch_1"}
	// 201 true {"charge":"ch_1"}
	// 422  {"status":422,"title":"Unprocessable Entity","detail":"The key was used before for another request.","code":"idempotency-key-reused"}
	// 400  {"status":400,"title":"Bad Request","detail":"This request needs the header Idempotency-Key.","code":"idempotency-key-missing"}
}
