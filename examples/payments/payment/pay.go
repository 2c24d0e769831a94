package payment

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/ashlar-go/ashlar/examples/payments/gateway"
	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/internal/ids"
)

// A Request is a payment to make. [Decode] returns only valid ones.
type Request struct {
	IdempotencyKey string
	Amount         int64 // minor units
	Currency       string
	Method         string
	Token          string
	OrderID        string
}

// fingerprint digests what is asked for. Each field has its length before it, so
// that no two requests have the same bytes.
func (r Request) fingerprint() []byte {
	h := sha256.New()
	for _, field := range []string{r.Currency, r.Method, r.Token, r.OrderID} {
		_ = binary.Write(h, binary.BigEndian, uint64(len(field)))
		h.Write([]byte(field))
	}
	_ = binary.Write(h, binary.BigEndian, r.Amount)
	return h.Sum(nil)
}

// keyTTL is how long the idempotency record answers by itself. Afterwards the
// payment's own key does: it is never forgotten.
const keyTTL = 30 * 24 * time.Hour

// Pay makes the payment that r asks for, once for each key; replayed tells that
// it was made before, and the payment is as it stands now.
//
// It wraps [ErrInFlight], [ErrKeyReused] or [ErrOrderPaid]. Any other error
// leaves the outcome open; to repeat the call with the same key is safe.
//
// Once the payment is stored, the end of ctx does not interrupt it. If the
// process is killed, the reconciler brings it to an end.
func (s *Service) Pay(ctx context.Context, r Request) (p *Payment, replayed bool, err error) {
	start := time.Now()
	p, replayed, err = s.initiate(ctx, r)
	if err != nil {
		return nil, false, err
	}
	if replayed {
		if p.State == Initiated {
			return nil, false, ErrInFlight
		}
		return p, true, nil
	}
	s.opts.At(AfterInitiated)
	// The reconciler counts on it that no call begins later than this.
	if time.Since(start) > s.gateway.Timeout() {
		return nil, false, ErrInFlight
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.gateway.Timeout()+10*time.Second)
	defer cancel()
	result, err := s.gateway.Charge(ctx, gateway.Charge{
		Reference: p.attemptID, Amount: p.Amount, Currency: p.Currency, Method: p.Method, Token: r.Token,
	})
	s.opts.At(AfterGateway)
	if err != nil {
		s.opts.Logger.WarnContext(ctx, "the gateway's outcome is unknown", "payment", p.ID, "error", err)
	}
	if p, err = s.settle(ctx, p.ID, outcomeOf(result, err)); err != nil {
		return nil, false, err
	}
	s.opts.At(AfterCommit)
	return p, false, nil
}

// initiate claims the key and stores the payment, in one transaction.
func (s *Service) initiate(ctx context.Context, r Request) (*Payment, bool, error) {
	var p *Payment
	hash := r.fingerprint()
	key := idempotency.Key{Scope: "payments", ID: r.IdempotencyKey, Fingerprint: hash}
	id, replayed, err := idempotencypg.DoTx(ctx, s.pool, key, &idempotencypg.TxOptions{TTL: keyTTL}, func(ctx context.Context, tx pgx.Tx) (string, error) {
		var err error
		p, err = scan(tx.QueryRow(ctx, `INSERT INTO payment
				(id, attempt_id, idempotency_key, request_hash, order_id, amount, currency, method, token, next_check_at)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, now() + $10::interval) RETURNING `+columns,
			ids.New(), ids.New(), r.IdempotencyKey, hash, r.OrderID, r.Amount, r.Currency, r.Method, r.Token, s.opts.StaleAfter))
		if err != nil {
			return "", err
		}
		return p.ID, nil
	})
	var pgErr *pgconn.PgError
	switch {
	case err == nil && !replayed:
		return p, false, nil
	case err == nil:
		p, err = s.Get(ctx, id)
		return p, true, err
	case errors.Is(err, idempotency.ErrMismatch):
		return nil, false, ErrKeyReused
	case errors.Is(err, idempotency.ErrInProgress):
		return nil, false, ErrInFlight
	case errors.As(err, &pgErr) && pgErr.ConstraintName == "payment_idempotency_key_key":
		return s.byKey(ctx, r.IdempotencyKey, hash)
	case errors.As(err, &pgErr) && pgErr.ConstraintName == "payment_live_order":
		return nil, false, ErrOrderPaid
	}
	return nil, false, fmt.Errorf("payment: initiate: %w", err)
}

// byKey answers for a key whose idempotency record is gone.
func (s *Service) byKey(ctx context.Context, key string, hash []byte) (*Payment, bool, error) {
	p, err := scan(s.pool.QueryRow(ctx, `SELECT `+columns+` FROM payment WHERE idempotency_key = $1`, key))
	if err == nil && !bytes.Equal(p.hash, hash) {
		err = ErrKeyReused
	}
	return p, true, err
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // the package's own types
	}
	return b
}
