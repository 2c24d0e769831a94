// Package gateway is the HTTP client of a payment gateway.
package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

var (
	// ErrUnknown is wrapped whenever it is not certain what the gateway did:
	// after a time-out, a broken connection, a 5xx, an answer that cannot be
	// understood. The charge may have been made.
	ErrUnknown = errors.New("gateway: outcome unknown")

	// ErrNotFound is wrapped when the gateway knows no such reference. A request
	// that is still on its way may yet arrive.
	ErrNotFound = errors.New("gateway: no such reference")
)

// A Charge is what the gateway is asked to take.
type Charge struct {
	// Reference is ours and names the charge: the gateway makes at most one for
	// each reference, however often it is asked.
	Reference string `json:"reference"`
	Amount    int64  `json:"amount"` // minor units
	Currency  string `json:"currency"`
	Method    string `json:"method"`
	Token     string `json:"token"`
}

// The definitive outcomes of a charge.
const (
	Approved = "approved"
	Declined = "declined"
)

// A Result is a definitive outcome.
type Result struct {
	Reference string `json:"reference"`
	ID        string `json:"id"` // the gateway's own
	Status    string `json:"status"`
	Reason    string `json:"reason,omitempty"` // of a decline
	Amount    int64  `json:"amount"`
	Currency  string `json:"currency"`
}

// Options tunes a [Client]. The zero value of each field means its default.
type Options struct {
	// Timeout bounds each call. Default 10 s.
	Timeout time.Duration
	// Transport sends the requests. Default http.DefaultTransport.
	Transport http.RoundTripper
}

// A Client calls one gateway. It never repeats a call by itself. It is safe for
// concurrent use.
type Client struct {
	base    string
	timeout time.Duration
	http    *http.Client
}

// New returns a client of the gateway at base, a URL.
func New(base string, opts *Options) *Client {
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Timeout <= 0 {
		o.Timeout = 10 * time.Second
	}
	return &Client{base: strings.TrimSuffix(base, "/"), timeout: o.Timeout, http: &http.Client{
		Transport: o.Transport,
		// A charge must not be sent to wherever an answer points.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Timeout returns the longest that a call may take.
func (c *Client) Timeout() time.Duration { return c.timeout }

// Charge asks for a charge. A nil error means a definitive outcome; every other
// error than one that wraps [ErrUnknown] means that nothing was sent.
func (c *Client) Charge(ctx context.Context, ch Charge) (Result, error) {
	body, err := json.Marshal(ch)
	if err != nil {
		return Result{}, fmt.Errorf("gateway: %w", err)
	}
	r, err := c.do(ctx, http.MethodPost, "/charges", bytes.NewReader(body))
	if errors.Is(err, ErrNotFound) {
		err = fmt.Errorf("%w: 404 to a charge", ErrUnknown)
	}
	return check(r, err, ch.Reference, ch.Amount, ch.Currency)
}

// Lookup asks what became of a reference. It wraps [ErrNotFound] or [ErrUnknown].
func (c *Client) Lookup(ctx context.Context, reference string, amount int64, currency string) (Result, error) {
	r, err := c.do(ctx, http.MethodGet, "/charges/"+url.PathEscape(reference), nil)
	return check(r, err, reference, amount, currency)
}

// check believes an answer only if it is about what was asked.
func check(r Result, err error, reference string, amount int64, currency string) (Result, error) {
	switch {
	case err != nil:
		return Result{}, err
	case r.Reference != reference, r.Amount != amount, r.Currency != currency:
		return Result{}, fmt.Errorf("%w: the answer is about another charge", ErrUnknown)
	case r.Status != Approved && r.Status != Declined:
		return Result{}, fmt.Errorf("%w: the answer has no known status", ErrUnknown)
	}
	return r, nil
}

func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (r Result, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return r, fmt.Errorf("gateway: %w", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return r, fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return r, ErrNotFound
	default:
		return r, fmt.Errorf("%w: status %d", ErrUnknown, resp.StatusCode)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&r); err != nil {
		return r, fmt.Errorf("%w: unreadable answer: %w", ErrUnknown, err)
	}
	return r, nil
}
