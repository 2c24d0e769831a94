package idempotency

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/ashlar-go/ashlar/idempotency/internal/execution"
)

// HTTPOptions tunes [Middleware]. The zero value of each field means its default.
type HTTPOptions struct {
	// Options are those of every execution; see [Options]. Release is not used.
	Options
	// Header carries the key. Default "Idempotency-Key".
	Header string
	// Methods that are made idempotent; others pass. Default POST and PATCH.
	Methods []string
	// Optional lets requests without a key pass. Default: they are refused.
	Optional bool
	// MaxBody bounds the request's body, which is read before the key is claimed,
	// in bytes. Default 1 MiB.
	MaxBody int64
	// MaxResponse bounds the response's body that is kept, in bytes. Default 1 MiB.
	MaxResponse int
	// Headers of the response that are kept, besides Content-Type. Default
	// Cache-Control, Content-Disposition, Content-Encoding, Content-Language,
	// Content-Location, ETag, Last-Modified, Link, Location and Vary. Set-Cookie,
	// Authorization, Date and those of one connection are never kept.
	Headers []string
	// Keep reports whether a response of this status is the outcome of the
	// operation. Otherwise nothing was done and the key is free at once. Default:
	// all but 429 and 5xx.
	Keep func(status int) bool
}

var defaultHeaders = []string{
	"Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Content-Location",
	"Etag", "Last-Modified", "Link", "Location", "Vary",
}

// replayedHeader marks a response that was not made now.
const replayedHeader = "Idempotency-Replayed"

// Middleware makes requests that repeat an Idempotency-Key get the response of
// the first, marked with "Idempotency-Replayed: true", without running the
// handler again. The key is parsed by [ParseKey] and belongs to the scope of the
// request: whatever scope returns, such as the authenticated tenant. The
// fingerprint is a digest of method, path, query and body.
//
// Instead of the handler's, a response may be these problem details (RFC 9457):
//
//	400  no key, more than one, or one that breaks the syntax
//	409  the first request is in progress (with Retry-After), its outcome is
//	     unknown, or its response was not kept
//	413  the body exceeds MaxBody
//	422  the key was used for another request
//	500  scope returned nothing: the request is not authenticated, a mistake in the wiring
//	503  the store failed before the handler ran
//
// The response is sent when it is recorded. One that is flushed, hijacked or
// longer than MaxResponse cannot wait: the moment it begins, the operation is
// recorded as done with a response that was not kept, so that no retry runs it
// again. If a response that was made cannot be recorded, it is sent all the
// same; if another execution took the key over, the client is told to retry
// and gets that one's.
//
// What is said of a failed execution at [Do] holds: if the handler panics, or
// fails while its context has ended, the key is free when the lease ends.
// opts may be nil.
func Middleware(store Store, scope func(*http.Request) string, opts *HTTPOptions) func(http.Handler) http.Handler {
	if store == nil || scope == nil {
		panic("idempotency: Middleware needs a store and a scope")
	}
	m := &middleware{store: store, scope: scope}
	if opts != nil {
		m.opts = *opts
	}
	m.calls = m.opts.Options.withDefaults()
	m.calls.Release = func(err error) bool { return errors.Is(err, errNotKept) }
	setDefault(&m.opts.MaxBody, 1<<20)
	setDefault(&m.opts.MaxResponse, 1<<20)
	if m.opts.Header == "" {
		m.opts.Header = "Idempotency-Key"
	}
	if m.opts.Methods == nil {
		m.opts.Methods = []string{http.MethodPost, http.MethodPatch}
	}
	if m.opts.Headers == nil {
		m.opts.Headers = defaultHeaders
	}
	if m.opts.Keep == nil {
		m.opts.Keep = func(status int) bool { return status < 500 && status != http.StatusTooManyRequests }
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(w, r, next) })
	}
}

type middleware struct {
	store Store
	scope func(*http.Request) string
	opts  HTTPOptions
	calls *Options
}

// errNotKept is the outcome of a handler whose response is not one of the
// operation.
var errNotKept = errors.New("idempotency: the status is not kept")

func (m *middleware) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	values := r.Header.Values(m.opts.Header)
	if !slices.Contains(m.opts.Methods, r.Method) || len(values) == 0 && m.opts.Optional {
		next.ServeHTTP(w, r)
		return
	}
	key, body, p := m.key(w, r, values)
	if p != nil {
		p.write(w)
		return
	}
	rec := &recorder{w: w, m: m}
	x := &call{store: m.store, key: key, opts: m.calls}
	stored, replayed, err := x.do(r.Context(), func(ctx context.Context, e *execution.Execution) ([]byte, error) {
		e.Opaque = true
		rec.abandon = func(status int) { m.abandon(ctx, x, status) }
		req := r.WithContext(ctx)
		req.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(rec, req)
		rec.finish()
		switch {
		case rec.passing: // recorded when it began, if it is to be kept
			if !m.opts.Keep(rec.status) && !e.Completed() {
				return nil, errNotKept
			}
			return encodeResponse(&response{status: rec.status, dropped: true}), nil
		case m.opts.Keep(rec.status):
			return encodeResponse(rec.response(m.opts.Headers)), nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx) // it may have failed half-way
		}
		return nil, errNotKept
	})
	switch {
	case rec.status == 0: // the handler did not run
		m.answer(w, r, stored, replayed, err)
	case rec.passing: // sent already
	case errors.Is(err, ErrLeaseLost):
		busy(time.Second).write(w)
	default:
		if errors.Is(err, ErrNotRecorded) {
			m.calls.Logger.ErrorContext(r.Context(), "idempotency: a response is sent that is not recorded",
				"scope", key.Scope, "id", key.ID, "error", err)
		}
		_ = rec.send() // the client may have gone
	}
}

// key returns the request's key and its body, or the problem with them.
func (m *middleware) key(w http.ResponseWriter, r *http.Request, values []string) (Key, []byte, *problem) {
	switch len(values) {
	case 0:
		return Key{}, nil, newProblem(http.StatusBadRequest, "key-missing", "This request needs the header "+m.opts.Header+".")
	case 1:
	default:
		return Key{}, nil, newProblem(http.StatusBadRequest, "key-invalid", "The header "+m.opts.Header+" was sent more than once.")
	}
	id, err := ParseKey(values[0])
	if err != nil {
		return Key{}, nil, newProblem(http.StatusBadRequest, "key-invalid", err.Error())
	}
	key := Key{Scope: m.scope(r), ID: id}
	if err := key.Validate(); err != nil {
		m.calls.Logger.ErrorContext(r.Context(), "idempotency: the scope of a request", "error", err)
		return Key{}, nil, newProblem(http.StatusInternalServerError, "scope-missing", "")
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, m.opts.MaxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return Key{}, nil, newProblem(http.StatusRequestEntityTooLarge, "body-too-large",
			fmt.Sprintf("The body exceeds %d bytes.", tooLarge.Limit))
	case err != nil:
		return Key{}, nil, newProblem(http.StatusBadRequest, "body-unreadable", "The body could not be read.")
	}
	key.Fingerprint = fingerprint(r, body)
	return key, body, nil
}

func fingerprint(r *http.Request, body []byte) []byte {
	h := sha256.New()
	for _, part := range []string{r.Method, r.URL.EscapedPath(), r.URL.RawQuery} {
		h.Write(binary.AppendUvarint(nil, uint64(len(part)))) // so that no two divisions are alike
		h.Write([]byte(part))
	}
	h.Write(body)
	return h.Sum(nil)
}

// abandon records that the operation was done, at the moment from which its
// response can no longer be kept.
func (m *middleware) abandon(ctx context.Context, x *call, status int) {
	if !m.opts.Keep(status) {
		return
	}
	if err := x.record(ctx, encodeResponse(&response{status: status, dropped: true})); err != nil {
		m.calls.Logger.ErrorContext(ctx, "idempotency: a response begins that is not recorded",
			"scope", x.key.Scope, "id", x.key.ID, "error", err)
	}
}

// answer responds in place of the handler.
func (m *middleware) answer(w http.ResponseWriter, r *http.Request, stored []byte, replayed bool, err error) {
	var progress *busyError
	switch {
	case replayed:
		resp, err := decodeResponse(stored)
		if err == nil && !resp.dropped {
			w.Header().Set(replayedHeader, "true")
			resp.write(w)
			return
		}
		if err != nil {
			m.calls.Logger.ErrorContext(r.Context(), "idempotency: a record holds no response", "error", err)
		}
		newProblem(http.StatusConflict, "response-not-kept",
			"The request was completed before. Its response was not kept and cannot be repeated.").write(w)
	case errors.As(err, &progress):
		busy(progress.lease).write(w)
	case errors.Is(err, ErrMismatch):
		newProblem(http.StatusUnprocessableEntity, "key-reused", "The key was used before for another request.").write(w)
	case errors.Is(err, ErrUnknown):
		newProblem(http.StatusConflict, "outcome-unknown",
			"An earlier request with this key ended without an outcome. It is not repeated.").write(w)
	default:
		if r.Context().Err() == nil {
			m.calls.Logger.ErrorContext(r.Context(), "idempotency: the store failed", "error", err)
		}
		p := newProblem(http.StatusServiceUnavailable, "store-unavailable", "The request was not processed.")
		p.retryAfter = time.Second
		p.write(w)
	}
}
