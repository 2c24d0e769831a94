// Package ledger writes to the append-only double-entry ledger whose rules are
// in migrations/0002_ledger.sql: the database refuses what does not balance, and
// every change of what is written.
package ledger

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// The accounts.
const (
	GatewayReceivable = "gateway_receivable" // what the gateway has taken for us
	MerchantPayable   = "merchant_payable"   // what we owe the seller
)

// Capture is the kind of transaction that notes money taken from a buyer.
const Capture = "capture"

// An Entry is one side of a transaction.
type Entry struct {
	Account  string
	Currency string
	Amount   int64 // minor units; a debit is positive, a credit negative
}

// A Transaction is a set of entries that add up to zero in each currency.
type Transaction struct {
	PaymentID string
	Kind      string // a payment has at most one of each kind
	Entries   []Entry
}

// Post adds t in the caller's transaction. The commit fails if t does not
// balance.
func Post(ctx context.Context, tx pgx.Tx, t Transaction) error {
	accounts, currencies, amounts := make([]string, len(t.Entries)), make([]string, len(t.Entries)), make([]int64, len(t.Entries))
	for i, e := range t.Entries {
		accounts[i], currencies[i], amounts[i] = e.Account, e.Currency, e.Amount
	}
	var id int64
	err := tx.QueryRow(ctx, `INSERT INTO ledger_transaction (payment_id, kind) VALUES ($1, $2) RETURNING id`, t.PaymentID, t.Kind).Scan(&id)
	if err != nil {
		return fmt.Errorf("ledger: post: %w", err)
	}
	_, err = tx.Exec(ctx, `INSERT INTO ledger_entry (transaction_id, account, currency, amount)
		SELECT $1, * FROM unnest($2::text[], $3::text[], $4::bigint[])`, id, accounts, currencies, amounts)
	if err != nil {
		return fmt.Errorf("ledger: post: %w", err)
	}
	return nil
}

// CaptureOf returns the transaction for money that was taken.
func CaptureOf(paymentID string, amount int64, currency string) Transaction {
	return Transaction{PaymentID: paymentID, Kind: Capture, Entries: []Entry{
		{GatewayReceivable, currency, amount},
		{MerchantPayable, currency, -amount},
	}}
}

// A Total is what an account has seen in one currency.
type Total struct {
	Currency string `json:"currency"`
	Count    int64  `json:"count"`
	Amount   int64  `json:"amount"` // minor units
}

type queryer interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// Captured returns what was captured, by currency.
func Captured(ctx context.Context, db queryer) ([]Total, error) {
	rows, err := db.Query(ctx, `SELECT e.currency, count(*), sum(e.amount)::bigint
		FROM ledger_entry e JOIN ledger_transaction t ON t.id = e.transaction_id
		WHERE t.kind = 'capture' AND e.account = 'gateway_receivable' GROUP BY e.currency ORDER BY e.currency`)
	if err != nil {
		return nil, fmt.Errorf("ledger: totals: %w", err)
	}
	totals, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Total])
	if err != nil {
		return nil, fmt.Errorf("ledger: totals: %w", err)
	}
	return totals, nil
}
