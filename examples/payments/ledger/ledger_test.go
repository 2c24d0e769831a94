package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/examples/payments/ledger"
	"github.com/ashlar-go/ashlar/examples/payments/migrations"
	"github.com/ashlar-go/ashlar/internal/ids"
	"github.com/ashlar-go/ashlar/internal/pgtest"
)

func open(t *testing.T) *pgxpool.Pool {
	t.Helper()
	pool := pgtest.Pool(t)
	for range 2 { // the second changes nothing
		if err := migrations.Up(t.Context(), pool); err != nil {
			t.Fatal(err)
		}
	}
	return pool
}

func newPayment(t *testing.T, pool *pgxpool.Pool) string {
	t.Helper()
	id := ids.New()
	_, err := pool.Exec(t.Context(), `INSERT INTO payment (id, attempt_id, idempotency_key, request_hash, order_id, amount, currency, method, token, next_check_at)
		VALUES ($1, $2, $3, '', $3, 100, 'EUR', 'card', 'tok_ok', now())`, id, ids.New(), id)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func post(t *testing.T, pool *pgxpool.Pool, tr ledger.Transaction) error {
	t.Helper()
	return pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error { return ledger.Post(t.Context(), tx, tr) })
}

// sqlState is the code of the database's refusal, or "" if there was none.
func sqlState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

func TestPost(t *testing.T) {
	pool := open(t)
	const check, unique, foreign = "23514", "23505", "23503"
	e := func(account, currency string, amount int64) ledger.Entry {
		return ledger.Entry{Account: account, Currency: currency, Amount: amount}
	}
	gw, mp := ledger.GatewayReceivable, ledger.MerchantPayable
	for _, tt := range []struct {
		name    string
		entries []ledger.Entry
		want    string
	}{
		{"balanced", []ledger.Entry{e(gw, "EUR", 5), e(mp, "EUR", -5)}, ""},
		{"balanced in two currencies", []ledger.Entry{e(gw, "JPY", 5), e(mp, "JPY", -5), e(gw, "KWD", 7), e(mp, "KWD", -7)}, ""},
		{"the largest amounts", []ledger.Entry{e(gw, "EUR", math.MaxInt64), e(mp, "EUR", -math.MaxInt64)}, ""},
		{"nothing", nil, check},
		{"one side", []ledger.Entry{e(gw, "EUR", 5)}, check},
		{"off by one", []ledger.Entry{e(gw, "EUR", 5), e(mp, "EUR", -4)}, check},
		{"balanced only across currencies", []ledger.Entry{e(gw, "EUR", 5), e(mp, "USD", -5)}, check},
		{"a sum that wraps around", []ledger.Entry{e(gw, "EUR", math.MaxInt64), e(gw, "EUR", math.MaxInt64), e(mp, "EUR", 2)}, check},
		{"zero", []ledger.Entry{e(gw, "EUR", 0), e(mp, "EUR", 0)}, check},
		{"no such account", []ledger.Entry{e("mine", "EUR", 5), e(mp, "EUR", -5)}, foreign},
		{"no currency", []ledger.Entry{e(gw, "", 5), e(mp, "", -5)}, check},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := post(t, pool, ledger.Transaction{PaymentID: newPayment(t, pool), Kind: ledger.Capture, Entries: tt.entries})
			if got := sqlState(err); got != tt.want {
				t.Errorf("refused with %q, want %q (%v)", got, tt.want, err)
			}
		})
	}
	t.Run("twice", func(t *testing.T) {
		id := newPayment(t, pool)
		if err := post(t, pool, ledger.CaptureOf(id, 5, "EUR")); err != nil {
			t.Fatal(err)
		}
		if got := sqlState(post(t, pool, ledger.CaptureOf(id, 5, "EUR"))); got != unique {
			t.Errorf("a second capture: %q", got)
		}
	})
	t.Run("no such payment", func(t *testing.T) {
		if got := sqlState(post(t, pool, ledger.CaptureOf(ids.New(), 5, "EUR"))); got != foreign {
			t.Errorf("refused with %q", got)
		}
	})
}

func TestAppendOnly(t *testing.T) {
	pool := open(t)
	id := newPayment(t, pool)
	if err := post(t, pool, ledger.CaptureOf(id, 100, "EUR")); err != nil {
		t.Fatal(err)
	}
	snapshot := func() string {
		var s string
		if err := pool.QueryRow(t.Context(), `SELECT (SELECT jsonb_agg(t) FROM ledger_transaction t)::text || (SELECT jsonb_agg(e ORDER BY id) FROM ledger_entry e)::text
			|| (SELECT jsonb_agg(p) FROM payment_event p)::text`).Scan(&s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := snapshot()
	attacks := []string{
		`INSERT INTO ledger_entry (transaction_id, account, currency, amount) SELECT id, 'gateway_receivable', 'EUR', 1 FROM ledger_transaction`,
		`INSERT INTO ledger_entry (transaction_id, account, currency, amount) SELECT id, a, 'EUR', n FROM ledger_transaction, (VALUES ('gateway_receivable', 1), ('merchant_payable', -1)) v(a, n)`,
		`TRUNCATE payment CASCADE`,
		`TRUNCATE ledger_transaction, ledger_entry`,
		`MERGE INTO ledger_entry e USING ledger_transaction t ON e.transaction_id = t.id WHEN MATCHED THEN DELETE`,
		`INSERT INTO ledger_account VALUES ('gateway_receivable') ON CONFLICT (name) DO UPDATE SET name = 'x'`,
		`DELETE FROM payment`,
	}
	for _, table := range []string{"ledger_account", "ledger_transaction", "ledger_entry", "payment_event"} {
		column := map[string]string{"ledger_account": "name = 'x'", "ledger_transaction": "kind = kind", "ledger_entry": "amount = amount", "payment_event": "to_state = 'DECLINED'"}[table]
		attacks = append(attacks, "UPDATE "+table+" SET "+column, "DELETE FROM "+table, "TRUNCATE "+table+" CASCADE")
	}
	for _, attack := range attacks {
		for _, role := range []string{"origin", "replica"} { // replica turns ordinary triggers off
			if attack == `DELETE FROM payment` && role == "replica" {
				continue // the payment itself is not append-only, and foreign keys are ordinary triggers
			}
			err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
				if _, err := tx.Exec(t.Context(), "SET LOCAL session_replication_role = "+role); err != nil {
					return err
				}
				_, err := tx.Exec(t.Context(), attack)
				return err
			})
			if sqlState(err) == "" {
				t.Errorf("as %s, accepted: %s", role, attack)
			}
		}
	}
	if after := snapshot(); after != before {
		t.Errorf("the ledger changed:\n%s\n%s", before, after)
	}
	// What is shown to be refused above would be noticed if it were not.
	if _, err := pool.Exec(t.Context(), `ALTER TABLE ledger_entry DISABLE TRIGGER append_only`); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), `UPDATE ledger_entry SET amount = amount * 2`); err != nil {
		t.Fatal(err)
	}
	if snapshot() == before {
		t.Error("an update without the trigger went unnoticed")
	}
}

// Every pair of states that is not a row of payment_transition is refused.
func TestTransitions(t *testing.T) {
	pool := open(t)
	states := []string{"NONE", "INITIATED", "AUTHORIZED", "DECLINED", "PENDING_VERIFICATION", "REFUNDED", ""}
	legal := map[string]bool{
		"INITIATED AUTHORIZED": true, "INITIATED DECLINED": true, "INITIATED PENDING_VERIFICATION": true,
		"PENDING_VERIFICATION AUTHORIZED": true, "PENDING_VERIFICATION DECLINED": true,
	}
	path := map[string][]string{"INITIATED": nil, "AUTHORIZED": {"AUTHORIZED"}, "DECLINED": {"DECLINED"}, "PENDING_VERIFICATION": {"PENDING_VERIFICATION"}}
	for from, steps := range path {
		for _, to := range states {
			if from == to {
				continue
			}
			id := newPayment(t, pool)
			move := func(to string) error {
				_, err := pool.Exec(t.Context(), `UPDATE payment SET state = $2, previous_state = 'INITIATED', seq = 9 WHERE id = $1`, id, to)
				return err
			}
			for _, s := range steps {
				if err := move(s); err != nil {
					t.Fatal(err)
				}
			}
			if err := move(to); (err == nil) != legal[from+" "+to] {
				t.Errorf("%s to %q: %v", from, to, err)
			}
		}
	}
	id := newPayment(t, pool)
	for _, change := range []string{"amount = 1", "currency = 'USD'", "order_id = 'x'", "attempt_id = gen_random_uuid()", "idempotency_key = 'x'", "request_hash = 'x'"} {
		if _, err := pool.Exec(t.Context(), `UPDATE payment SET `+change+` WHERE id = $1`, id); err == nil {
			t.Errorf("accepted: %s", change)
		}
	}
	var history string
	if err := pool.QueryRow(context.Background(), `SELECT string_agg(seq || from_state || to_state, ' ' ORDER BY payment_id, seq) FROM payment_event
		WHERE payment_id = (SELECT payment_id FROM payment_event WHERE to_state = 'AUTHORIZED' AND from_state = 'PENDING_VERIFICATION')`).Scan(&history); err != nil {
		t.Fatal(err)
	}
	if want := "1NONEINITIATED 2INITIATEDPENDING_VERIFICATION 3PENDING_VERIFICATIONAUTHORIZED"; history != want {
		t.Errorf("history %s, want %s", history, want)
	}
}

func TestCaptured(t *testing.T) {
	pool := open(t)
	for _, currency := range []string{"EUR", "JPY", "EUR"} {
		if err := post(t, pool, ledger.CaptureOf(newPayment(t, pool), 7, currency)); err != nil {
			t.Fatal(err)
		}
	}
	totals, err := ledger.Captured(t.Context(), pool)
	if want := "[{EUR 2 14} {JPY 1 7}]"; err != nil || fmt.Sprint(totals) != want {
		t.Errorf("%v, %v; want %s", totals, err, want)
	}
}
