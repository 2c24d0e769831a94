package idempotency

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

func busy(lease time.Duration) *problem {
	p := newProblem(http.StatusConflict, "in-progress", "A request with this key is in progress.")
	p.retryAfter = max(lease, time.Second)
	return p
}

// A problem is a response of RFC 9457, "Problem Details for HTTP APIs".
type problem struct {
	status       int
	code, detail string
	retryAfter   time.Duration
}

func newProblem(status int, code, detail string) *problem {
	return &problem{status: status, code: code, detail: detail}
}

func (p *problem) write(w http.ResponseWriter) {
	if p.retryAfter > 0 {
		seconds := (p.retryAfter + time.Second - 1) / time.Second
		w.Header().Set("Retry-After", strconv.FormatInt(int64(seconds), 10))
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(p.status)
	body := struct {
		Status int    `json:"status"`
		Title  string `json:"title"`
		Detail string `json:"detail,omitempty"`
		Code   string `json:"code"` // an extension: stable, for programs
	}{p.status, http.StatusText(p.status), p.detail, "idempotency-" + p.code}
	_ = json.NewEncoder(w).Encode(body) // the client may have gone
}
