// Package client calls the payments service. It is what other services import.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/ashlar-go/ashlar/internal/backoff"
)

// The states of a payment.
const (
	Authorized          = "AUTHORIZED"
	Declined            = "DECLINED"
	PendingVerification = "PENDING_VERIFICATION"
)

// A Request is a payment to make. The key is chosen once for each intended
// payment and repeated with every retry.
type Request struct {
	IdempotencyKey string `json:"idempotency_key"`
	Amount         int64  `json:"amount"` // minor units
	Currency       string `json:"currency"`
	Method         string `json:"method"`
	Token          string `json:"token"`
	OrderID        string `json:"order_id"`
}

// A Payment is the answer.
type Payment struct {
	ID       string `json:"payment_id"`
	OrderID  string `json:"order_id"`
	State    string `json:"state"`
	Amount   int64  `json:"amount"`
	Currency string `json:"currency"`
	Reason   string `json:"reason"`
	Replayed bool   `json:"-"` // the answer to an earlier request with the key
}

// An Error is a refusal: the problem document of the service.
type Error struct {
	Type       string        `json:"type"`
	Title      string        `json:"title"`
	Status     int           `json:"status"`
	Detail     string        `json:"detail"`
	RetryAfter time.Duration `json:"-"`
}

func (e *Error) Error() string {
	return fmt.Sprintf("payments: %s (%d): %s", e.Title, e.Status, e.Detail)
}

// temporary tells of an answer after which the same request should be repeated.
func (e *Error) temporary() bool {
	return e.Status >= 500 || e.Type == "/problems/in-flight"
}

// Options tunes a [Client]. The zero value of each field means its default.
type Options struct {
	// Transport sends the requests. Default http.DefaultTransport.
	Transport http.RoundTripper
	// Timeout bounds one request. It should exceed the gateway's time-out.
	// Default 30 s.
	Timeout time.Duration
	// Retries is how often Pay repeats a request that got no answer, a 5xx or a
	// 409 for being in flight: always with the same key. Default 4; negative
	// means none.
	Retries int
}

// A Client is safe for concurrent use.
type Client struct {
	base    string
	retries int
	http    *http.Client
}

// New returns a client of the service at base, a URL.
func New(base string, opts *Options) *Client {
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Timeout <= 0 {
		o.Timeout = 30 * time.Second
	}
	if o.Retries == 0 {
		o.Retries = 4
	}
	return &Client{base: strings.TrimSuffix(base, "/"), retries: o.Retries, http: &http.Client{Transport: o.Transport, Timeout: o.Timeout}}
}

// Pay makes a payment. A payment in the state PENDING_VERIFICATION is an answer,
// not an error: its outcome will be known later. After an error that is not an
// [*Error] with a status of 4xx, the outcome is open: repeat with the same key.
func (c *Client) Pay(ctx context.Context, r Request) (*Payment, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("payments: %w", err)
	}
	for attempt := 0; ; attempt++ {
		p, err := c.do(ctx, http.MethodPost, "/payments", body)
		if err == nil {
			return p, nil
		}
		var problem *Error
		answered := errors.As(err, &problem)
		if answered && !problem.temporary() || attempt >= c.retries || ctx.Err() != nil {
			return nil, err
		}
		wait := backoff.Policy{Base: 100 * time.Millisecond, Max: 2 * time.Second}.Next(attempt)
		if answered {
			wait = max(wait, problem.RetryAfter)
		}
		if err := backoff.Sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

// Get returns a payment.
func (c *Client) Get(ctx context.Context, id string) (*Payment, error) {
	return c.do(ctx, http.MethodGet, "/payments/"+url.PathEscape(id), nil)
}

func (c *Client) do(ctx context.Context, method, path string, body []byte) (*Payment, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("payments: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("payments: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("payments: %w", err)
	}
	if resp.StatusCode >= 300 {
		problem := &Error{Status: resp.StatusCode, Title: http.StatusText(resp.StatusCode)}
		_ = json.Unmarshal(answer, problem) // a proxy's answer has no problem in it
		problem.Status = resp.StatusCode
		if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
			problem.RetryAfter = time.Duration(s) * time.Second
		}
		return nil, problem
	}
	var p Payment
	if err := json.Unmarshal(answer, &p); err != nil {
		return nil, fmt.Errorf("payments: unreadable answer: %w", err)
	}
	p.Replayed = resp.Header.Get("Idempotency-Replayed") == "true"
	return &p, nil
}
