// Package payment takes payments through a gateway such that the gateway's book
// and the ledger end up equal, whatever is killed or lost on the way.
//
// A payment is stored as INITIATED, with the reference that the gateway will
// know it by, before the gateway is called. No database transaction is open
// during the call. Its outcome, the ledger's entries and the event for others
// are then stored in one transaction. What is not known for certain becomes
// PENDING_VERIFICATION, and the reconciler asks the gateway until it is.
//
// In this slice authorisation and capture are one step: AUTHORIZED means that
// the money was taken.
package payment

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/examples/payments/gateway"
	"github.com/ashlar-go/ashlar/examples/payments/ledger"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// A State is where a payment stands. The legal transitions are rows of the table
// payment_transition.
type State string

// The states.
const (
	Initiated           State = "INITIATED"            // stored; the gateway may have been called
	Authorized          State = "AUTHORIZED"           // the money was taken
	Declined            State = "DECLINED"             // it was not, and will not be
	PendingVerification State = "PENDING_VERIFICATION" // not known: the gateway is being asked
)

// The errors of [Service.Pay] and [Service.Get].
var (
	ErrNotFound  = errors.New("payment: no such payment")
	ErrKeyReused = errors.New("payment: the idempotency key was used for another request")
	ErrInFlight  = errors.New("payment: a request with this idempotency key is being processed")
	ErrOrderPaid = errors.New("payment: the order has another payment that was not declined")
)

// A Payment as it is told to its client.
type Payment struct {
	ID        string    `json:"payment_id"`
	OrderID   string    `json:"order_id"`
	State     State     `json:"state"`
	Amount    int64     `json:"amount"` // minor units
	Currency  string    `json:"currency"`
	Method    string    `json:"method"`
	Reason    string    `json:"reason,omitempty"` // of DECLINED
	Message   string    `json:"message,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`

	attemptID string
	seq       int
	hash      []byte
}

// An Event is what others learn of a payment: the payload of messages in Topic,
// whose key is the payment's id.
type Event struct {
	PaymentID string `json:"payment_id"`
	OrderID   string `json:"order_id"`
	State     State  `json:"state"`
	Amount    int64  `json:"amount"`
	Currency  string `json:"currency"`
	Seq       int    `json:"seq"` // rises with each event of a payment
}

// Points at which [Options].At is called.
const (
	AfterInitiated = "after-initiated" // the row is stored, the gateway not called
	AfterGateway   = "after-gateway"   // the gateway was called, its outcome not stored
	AfterCommit    = "after-commit"    // all is stored, the client not answered
)

// Options tunes a [Service]. The zero value of each field means its default.
type Options struct {
	// Topic of the events. Default "payment.events".
	Topic string
	// Every is how often the reconciler looks for payments to verify. Default 5 min.
	Every time.Duration
	// StaleAfter is the age from which on an INITIATED payment is taken to be
	// left behind by a crash. Default, and least: three times the gateway's
	// time-out.
	StaleAfter time.Duration
	// Window is how long after a call the gateway may still act on it. Until it
	// has passed, "no such reference" says nothing. Default 15 min.
	Window time.Duration
	// Notify is called after each commit that appended events.
	Notify func()
	// At is called at the points above, for tests that crash there.
	At func(point string)
	// Logger reports failures. Default slog.Default().
	Logger *slog.Logger
}

// A Service takes payments. It is safe for concurrent use, and any number of
// processes may run it on one database.
type Service struct {
	pool    *pgxpool.Pool
	gateway *gateway.Client
	opts    Options
}

// New returns a service on pool, whose tables migrations.Up has made. It starts
// nothing; see [Service.Run] and [Service.Handler].
func New(pool *pgxpool.Pool, gw *gateway.Client, opts *Options) *Service {
	if pool == nil || gw == nil {
		panic("payment: New needs a pool and a gateway")
	}
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Topic == "" {
		o.Topic = "payment.events"
	}
	if o.Every <= 0 {
		o.Every = 5 * time.Minute
	}
	o.StaleAfter = max(o.StaleAfter, 3*gw.Timeout())
	if o.Window <= 0 {
		o.Window = 15 * time.Minute
	}
	if o.Notify == nil {
		o.Notify = func() {}
	}
	if o.At == nil {
		o.At = func(string) {}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return &Service{pool: pool, gateway: gw, opts: o}
}

const columns = `id::text, order_id, state, amount, currency, method, reason, created_at, updated_at, attempt_id::text, seq, request_hash`

func scan(row pgx.Row) (*Payment, error) {
	var p Payment
	err := row.Scan(&p.ID, &p.OrderID, &p.State, &p.Amount, &p.Currency, &p.Method, &p.Reason, &p.CreatedAt, &p.UpdatedAt, &p.attemptID, &p.seq, &p.hash)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("payment: read: %w", err)
	}
	if p.State == PendingVerification {
		p.Message = "The outcome is being verified with the gateway. Do not retry with a new key: that could charge twice. Ask GET /payments/" + p.ID + " or repeat this request with the same key."
	}
	return &p, nil
}

// Get returns a payment, or wraps [ErrNotFound].
func (s *Service) Get(ctx context.Context, id string) (*Payment, error) {
	return scan(s.pool.QueryRow(ctx, `SELECT `+columns+` FROM payment WHERE id = $1`, id))
}

// An outcome is a state to go to, and why.
type outcome struct {
	to        State
	reason    string
	gatewayID string
}

// outcomeOf translates the gateway's answer.
func outcomeOf(r gateway.Result, err error) outcome {
	switch {
	case err != nil:
		return outcome{to: PendingVerification}
	case r.Status == gateway.Approved:
		return outcome{to: Authorized, gatewayID: r.ID}
	default:
		return outcome{to: Declined, reason: bounded(r.Reason), gatewayID: r.ID}
	}
}

// bounded makes the gateway's text safe to keep.
func bounded(s string) string {
	if len(s) > 64 || !printable(s) || HasCardNumber(s) {
		return "declined"
	}
	return s
}

// settle moves a payment to its outcome, with its ledger entries and its event,
// in one transaction. If another was faster, or the outcome is no news, nothing
// changes. It returns the payment as it is then.
func (s *Service) settle(ctx context.Context, id string, o outcome) (*Payment, error) {
	var p *Payment
	err := pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) error {
		var err error
		// The row's lock makes the others wait, and see its new state.
		p, err = scan(tx.QueryRow(ctx, `UPDATE payment SET state = $2, reason = $3, gateway_id = $4, next_check_at = now()
			WHERE id = $1 AND EXISTS (SELECT FROM payment_transition t WHERE t.from_state = payment.state AND t.to_state = $2)
			RETURNING `+columns, id, o.to, o.reason, bounded(o.gatewayID)))
		if err != nil {
			return err
		}
		if p.State == Authorized {
			if err := ledger.Post(ctx, tx, ledger.CaptureOf(p.ID, p.Amount, p.Currency)); err != nil {
				return err
			}
		}
		return outboxpg.Append(ctx, tx, s.message(p))
	})
	if errors.Is(err, ErrNotFound) {
		if p, err = s.Get(ctx, id); err == nil && o.to != PendingVerification && p.State != o.to {
			s.opts.Logger.ErrorContext(ctx, "the gateway contradicts a settled payment", "payment", id, "state", p.State, "gateway", o.to)
		}
		return p, err
	}
	if err != nil {
		return nil, fmt.Errorf("payment: settle: %w", err)
	}
	s.opts.Notify()
	return p, nil
}

func (s *Service) message(p *Payment) outbox.Message {
	return outbox.Message{
		ID: fmt.Sprintf("%s:%d", p.ID, p.seq), Topic: s.opts.Topic, Key: p.ID,
		Payload: encode(Event{p.ID, p.OrderID, p.State, p.Amount, p.Currency, p.seq}),
	}
}
