package payment

import (
	"errors"
	"io"
	"net/http"
	"net/url"
	"regexp"

	"github.com/ashlar-go/ashlar/examples/internal/app"
)

// Handler returns the HTTP API; openapi.yaml describes it.
func (s *Service) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /payments", s.post)
	mux.HandleFunc("GET /payments/{id}", s.get)
	mux.HandleFunc("/payments", notAllowed("POST"))
	mux.HandleFunc("/payments/{id}", notAllowed("GET, HEAD"))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		app.WriteProblem(w, refuse(http.StatusNotFound, "not-found", "Not found", "", ""))
	})
	return guard(mux)
}

// guard refuses card numbers outside of the body, before anything looks at them.
// It looks at the path as it was sent: ServeMux would answer an unclean one with
// a redirect that repeats it.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query, err := url.QueryUnescape(r.URL.RawQuery)
		switch {
		case HasCardNumber(r.URL.Path):
			app.WriteProblem(w, cardNumber("path"))
		case HasCardNumber(r.URL.RawQuery), err == nil && HasCardNumber(query):
			app.WriteProblem(w, cardNumber("query"))
		case len(r.URL.RawQuery) > 0:
			app.WriteProblem(w, invalid("query", "no parameters are known"))
		default:
			next.ServeHTTP(w, r)
		}
	})
}

func notAllowed(allow string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Allow", allow)
		app.WriteProblem(w, refuse(http.StatusMethodNotAllowed, "method", "Method not allowed", "", ""))
	}
}

func (s *Service) post(w http.ResponseWriter, r *http.Request) {
	req, err := read(w, r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	p, replayed, err := s.Pay(r.Context(), req)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	status := http.StatusCreated
	switch {
	case p.State == PendingVerification:
		status = http.StatusAccepted
	case replayed:
		status = http.StatusOK
	}
	w.Header().Set("Location", "/payments/"+p.ID)
	if replayed {
		w.Header().Set("Idempotency-Replayed", "true")
	}
	app.WriteJSON(w, status, p)
}

func read(w http.ResponseWriter, r *http.Request) (Request, error) {
	keys := r.Header.Values("Idempotency-Key")
	header := ""
	switch {
	case len(keys) > 1:
		return Request{}, invalid("Idempotency-Key", "is given twice")
	case len(keys) == 1:
		header = keys[0]
		if header == "" {
			return Request{}, invalid("Idempotency-Key", keyRule)
		}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return Request{}, refuse(http.StatusRequestEntityTooLarge, "too-large", "Request too large", "", "the limit is 64 KiB")
	case err != nil:
		return Request{}, invalid("", "the body could not be read")
	}
	return Decode(body, header)
}

var idPattern = regexp.MustCompile(`^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$`)

func (s *Service) get(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	if !idPattern.MatchString(id) {
		s.fail(w, r, ErrNotFound)
		return
	}
	p, err := s.Get(r.Context(), id)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	app.WriteJSON(w, http.StatusOK, p)
}

// fail answers with the problem that err is.
func (s *Service) fail(w http.ResponseWriter, r *http.Request, err error) {
	var problem *app.Problem
	switch {
	case errors.As(err, &problem):
	case errors.Is(err, ErrNotFound):
		problem = refuse(http.StatusNotFound, "not-found", "Not found", "", "")
	case errors.Is(err, ErrKeyReused):
		problem = refuse(http.StatusUnprocessableEntity, "key-reused", "Idempotency key reused", "idempotency_key",
			"the key was used for a request with another content; a new payment needs a new key")
	case errors.Is(err, ErrInFlight):
		w.Header().Set("Retry-After", "1")
		problem = refuse(http.StatusConflict, "in-flight", "Request in flight", "idempotency_key",
			"a request with this key is being processed; repeat it with the same key")
	case errors.Is(err, ErrOrderPaid):
		problem = refuse(http.StatusConflict, "order-paid", "Order has a payment", "order_id",
			"the order has another payment that was not declined")
	default:
		s.opts.Logger.ErrorContext(r.Context(), "request failed", "request", app.RequestID(r.Context()), "error", err)
		w.Header().Set("Retry-After", "1")
		problem = refuse(http.StatusServiceUnavailable, "unavailable", "Temporarily unavailable", "",
			"repeat the request with the same key: it is safe, and a new key is not")
	}
	app.WriteProblem(w, problem)
}
