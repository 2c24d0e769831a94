package idempotency

import (
	"bufio"
	"bytes"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
)

// A recorder is the http.ResponseWriter of a handler: it holds the response back
// until it is recorded. When that is not possible, abandon is called once and
// from then on everything passes to the client.
type recorder struct {
	w       http.ResponseWriter
	m       *middleware
	abandon func(status int)

	status  int         // 0 until the header is written
	header  http.Header // as it was then
	body    bytes.Buffer
	passing bool
}

// Header implements http.ResponseWriter.
func (r *recorder) Header() http.Header { return r.w.Header() }

// Unwrap lets an http.ResponseController reach what the recorder does not change.
func (r *recorder) Unwrap() http.ResponseWriter { return r.w }

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) {
	switch {
	case r.passing, status < 100, status > 999:
		r.w.WriteHeader(status) // which panics where net/http does
	case status >= 100 && status < 200 && status != http.StatusSwitchingProtocols:
		r.w.WriteHeader(status) // informational: the response is still to come
	case r.status == 0:
		r.status, r.header = status, r.w.Header().Clone()
	}
}

// Write implements http.ResponseWriter.
func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
	if !r.passing && r.body.Len()+len(b) > r.m.opts.MaxResponse {
		if err := r.pass(); err != nil {
			return 0, err
		}
	}
	if r.passing {
		return r.w.Write(b)
	}
	return r.body.Write(b)
}

// FlushError sends what there is; the response cannot be recorded any more.
func (r *recorder) FlushError() error {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
	if err := r.pass(); err != nil {
		return err
	}
	return http.NewResponseController(r.w).Flush()
}

// Flush implements http.Flusher.
func (r *recorder) Flush() { _ = r.FlushError() }

// Hijack implements http.Hijacker. What is sent is not recorded.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(r.w).Hijack()
	if err == nil && !r.passing {
		r.status, r.passing = http.StatusSwitchingProtocols, true
		r.abandon(r.status)
	}
	return conn, rw, err
}

// pass gives up the recording: it is told of first, then the response begins.
func (r *recorder) pass() error {
	if r.passing {
		return nil
	}
	r.passing = true
	r.abandon(r.status)
	return r.send()
}

// finish is called when the handler has returned.
func (r *recorder) finish() {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
}

// send sends what was held back, with the header as it was when it was written:
// what was added later counts only where it is a trailer.
func (r *recorder) send() error {
	h := r.w.Header()
	var trailers []string
	for name := range strings.SplitSeq(strings.Join(r.header.Values("Trailer"), ","), ",") {
		trailers = append(trailers, http.CanonicalHeaderKey(strings.TrimSpace(name)))
	}
	maps.DeleteFunc(h, func(name string, _ []string) bool {
		_, before := r.header[name]
		return !before && !strings.HasPrefix(name, http.TrailerPrefix) && !slices.Contains(trailers, name)
	})
	maps.Copy(h, r.header)
	r.w.WriteHeader(r.status)
	if r.body.Len() == 0 {
		return nil
	}
	_, err := r.w.Write(r.body.Bytes())
	return err
}

// response returns what is kept of the response.
func (r *recorder) response(names []string) *response {
	kept := make(http.Header)
	for _, name := range append([]string{"Content-Type"}, names...) {
		name = http.CanonicalHeaderKey(name)
		if values := r.header[name]; len(values) > 0 && !slices.Contains(neverKept, name) {
			kept[name] = values
		}
	}
	if _, set := r.header["Content-Type"]; !set && r.body.Len() > 0 && r.header.Get("Content-Encoding") == "" {
		kept.Set("Content-Type", http.DetectContentType(r.body.Bytes())) // as net/http does
	}
	return &response{status: r.status, header: kept, body: r.body.Bytes()}
}

// neverKept are the headers that belong to one client, one connection (RFC 9110,
// section 7.6.1) or one moment.
var neverKept = []string{
	"Authorization", "Connection", "Content-Length", "Date", "Keep-Alive", "Proxy-Authenticate",
	"Proxy-Authorization", "Proxy-Connection", "Set-Cookie", "Te", "Trailer", "Transfer-Encoding",
	"Upgrade", "Www-Authenticate", replayedHeader,
}
