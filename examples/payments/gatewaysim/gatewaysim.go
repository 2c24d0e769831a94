// Package gatewaysim is a payment gateway for tests: reached over HTTP, with a
// book of its own, and with every way to fail that matters. What happens to a
// charge is chosen by its token.
package gatewaysim

import (
	"crypto/rand"
	"encoding/json"
	"net/http"
	"sync"
	"time"
)

// The tokens, and what the simulator does with them. Others are declined.
const (
	OK            = "tok_ok"             // charges and answers
	Decline       = "tok_decline"        // declines and answers
	TimeoutBefore = "tok_timeout_before" // does not charge and does not answer
	TimeoutAfter  = "tok_timeout_after"  // charges and does not answer
	TimeoutLate   = "tok_timeout_late"   // does not answer, and charges when the client has left
	Crash         = "tok_crash"          // charges and breaks the connection
	CrashBefore   = "tok_crash_before"   // breaks the connection without a charge
	ErrorAfter    = "tok_error"          // charges and answers 500
)

// An Entry is one charge, or one that was declined, in the gateway's book.
type Entry struct {
	Reference string    `json:"reference"`
	ID        string    `json:"id"`
	Status    string    `json:"status"` // approved or declined
	Reason    string    `json:"reason,omitempty"`
	Amount    int64     `json:"amount"` // minor units
	Currency  string    `json:"currency"`
	At        time.Time `json:"at"`
	Asked     int       `json:"asked"` // how often the charge was asked for
}

// Options tunes a [Simulator]. The zero value of each field means its default.
type Options struct {
	// Hang is how long a request without an answer is held before its connection
	// is broken. Default 30 s.
	Hang time.Duration
	// Late is when TimeoutLate charges. Default 500 ms.
	Late time.Duration
	// Latency delays every answer. Default 0.
	Latency time.Duration
}

// A Simulator is a gateway. Its book outlives every simulated crash. It is safe
// for concurrent use.
type Simulator struct {
	opts Options
	mux  *http.ServeMux

	mu    sync.Mutex
	book  map[string]*Entry
	order []*Entry
}

// New returns a simulator with an empty book. Serve it with net/http:
//
//	POST /charges              {reference, amount, currency, method, token}
//	GET  /charges/{reference}  what became of it; 404 if it is not known
//	GET  /book                 every entry
func New(opts *Options) *Simulator {
	s := &Simulator{book: make(map[string]*Entry), mux: http.NewServeMux()}
	if opts != nil {
		s.opts = *opts
	}
	if s.opts.Hang <= 0 {
		s.opts.Hang = 30 * time.Second
	}
	if s.opts.Late <= 0 {
		s.opts.Late = 500 * time.Millisecond
	}
	s.mux.HandleFunc("POST /charges", s.charge)
	s.mux.HandleFunc("GET /charges/{reference}", s.lookup)
	s.mux.HandleFunc("GET /book", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, s.Book()) })
	return s
}

func (s *Simulator) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Book returns a copy of the book, in the order of the first requests.
func (s *Simulator) Book() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	book := make([]Entry, len(s.order))
	for i, e := range s.order {
		book[i] = *e
	}
	return book
}

type request struct {
	Reference string `json:"reference"`
	Amount    int64  `json:"amount"`
	Currency  string `json:"currency"`
	Method    string `json:"method"`
	Token     string `json:"token"`
}

func (s *Simulator) charge(w http.ResponseWriter, r *http.Request) {
	var req request
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&req); err != nil || req.Reference == "" || req.Amount <= 0 {
		answer(w, http.StatusBadRequest, map[string]string{"error": "bad request"})
		return
	}
	if s.opts.Latency > 0 {
		time.Sleep(s.opts.Latency)
	}
	// A reference that is in the book is answered from it, whatever its token:
	// the token's failure has happened.
	if e, ok := s.find(req.Reference, true); ok {
		if e.Amount != req.Amount || e.Currency != req.Currency {
			answer(w, http.StatusConflict, map[string]string{"error": "the reference was used for another charge"})
			return
		}
		answer(w, http.StatusOK, e)
		return
	}
	switch req.Token {
	case OK:
		answer(w, http.StatusOK, s.enter(req, "approved", ""))
	case TimeoutBefore:
		s.hang(r)
	case TimeoutAfter:
		s.enter(req, "approved", "")
		s.hang(r)
	case TimeoutLate:
		time.AfterFunc(s.opts.Late, func() { s.enter(req, "approved", "") })
		s.hang(r)
	case Crash:
		s.enter(req, "approved", "")
		panic(http.ErrAbortHandler)
	case CrashBefore:
		panic(http.ErrAbortHandler)
	case ErrorAfter:
		s.enter(req, "approved", "")
		answer(w, http.StatusInternalServerError, map[string]string{"error": "internal error"})
	case Decline:
		answer(w, http.StatusOK, s.enter(req, "declined", "insufficient_funds"))
	default:
		answer(w, http.StatusOK, s.enter(req, "declined", "unknown_token"))
	}
}

// hang holds the request until its client leaves, and answers nothing.
func (s *Simulator) hang(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-time.After(s.opts.Hang):
	}
	panic(http.ErrAbortHandler)
}

func (s *Simulator) lookup(w http.ResponseWriter, r *http.Request) {
	e, ok := s.find(r.PathValue("reference"), false)
	if !ok {
		answer(w, http.StatusNotFound, map[string]string{"error": "no such reference"})
		return
	}
	answer(w, http.StatusOK, e)
}

func (s *Simulator) find(reference string, asked bool) (Entry, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.book[reference]
	if e == nil {
		return Entry{}, false
	}
	if asked {
		e.Asked++
	}
	return *e, true
}

// enter puts a charge in the book, unless another request was faster.
func (s *Simulator) enter(req request, status, reason string) Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.book[req.Reference]; e != nil {
		e.Asked++
		return *e
	}
	e := &Entry{
		Reference: req.Reference, ID: "ch_" + rand.Text(), Status: status, Reason: reason,
		Amount: req.Amount, Currency: req.Currency, At: time.Now().UTC(), Asked: 1,
	}
	s.book[req.Reference] = e
	s.order = append(s.order, e)
	return *e
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client may have left
}
