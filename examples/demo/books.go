package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
	"github.com/ashlar-go/ashlar/examples/payments/payment"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// A sum is one book's total in one currency.
type sum struct {
	Count  int   `json:"count"`
	Amount int64 `json:"amount"` // minor units
}

// A line compares the three books in one currency.
type line struct {
	Currency string `json:"currency"`
	Gateway  sum    `json:"gateway"`
	Ledger   sum    `json:"ledger"`
	Orders   sum    `json:"orders"`
}

// books are the three of them, and what is still on its way between them.
type books struct {
	lines       []line
	differences []string // one for each payment on which they disagree
	open        int      // payments without an outcome
	rejected    int      // events that the order service could not read
	outbox      outbox.Sample
}

func (b *books) settled() bool {
	return b.open == 0 && b.outbox.Pending == 0 && b.outbox.Parked == 0 && b.outbox.Delayed == 0
}

func (b *books) equal() bool {
	return b.settled() && len(b.differences) == 0 && b.rejected == 0 && b.outbox.Dead == 0
}

// entry is what the books say of one payment.
type entry struct{ gateway, ledger, order *amount }

type amount struct {
	Amount   int64
	Currency string
}

func (a *amount) String() string {
	if a == nil {
		return "nothing"
	}
	return format(a.Amount, a.Currency)
}

// readBooks compares the books payment by payment: totals alone could be equal
// by chance.
func readBooks(ctx context.Context, pool *pgxpool.Pool, sim *gatewaysim.Simulator) (*books, error) {
	b := &books{}
	entries := make(map[string]*entry) // by our reference at the gateway
	at := func(reference string) *entry {
		if entries[reference] == nil {
			entries[reference] = &entry{}
		}
		return entries[reference]
	}
	rows, err := pool.Query(ctx, `
		SELECT 'ledger', p.attempt_id::text, e.amount, e.currency FROM ledger_entry e JOIN ledger_transaction t ON t.id = e.transaction_id
			JOIN payment p ON p.id = t.payment_id WHERE e.account = 'gateway_receivable'
		UNION ALL
		SELECT 'orders', p.attempt_id::text, o.amount, o.currency FROM orders o JOIN payment p ON p.id = o.payment_id WHERE o.state = 'CONFIRMED'`)
	if err != nil {
		return nil, err
	}
	var book, reference string
	var a amount
	if _, err := pgx.ForEachRow(rows, []any{&book, &reference, &a.Amount, &a.Currency}, func() error {
		c := a
		switch e := at(reference); book {
		case "ledger":
			e.ledger = &c
		case "orders":
			e.order = &c
		}
		return nil
	}); err != nil {
		return nil, err
	}
	for _, e := range sim.Book() {
		if e.Status == "approved" {
			at(e.Reference).gateway = &amount{e.Amount, e.Currency}
		}
	}
	b.compare(entries)
	err = pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM payment WHERE state IN ('INITIATED', 'PENDING_VERIFICATION')),
		(SELECT count(*) FROM order_rejected)`).Scan(&b.open, &b.rejected)
	if err != nil {
		return nil, err
	}
	b.outbox, err = outboxpg.New(pool, nil).Sample(ctx)
	return b, err
}

func (b *books) compare(entries map[string]*entry) {
	lines := make(map[string]*line)
	add := func(a *amount, book func(*line) *sum) {
		if a == nil {
			return
		}
		if lines[a.Currency] == nil {
			lines[a.Currency] = &line{Currency: a.Currency}
		}
		s := book(lines[a.Currency])
		s.Count++
		s.Amount += a.Amount
	}
	for reference, e := range entries {
		add(e.gateway, func(l *line) *sum { return &l.Gateway })
		add(e.ledger, func(l *line) *sum { return &l.Ledger })
		add(e.order, func(l *line) *sum { return &l.Orders })
		if e.gateway.String() != e.ledger.String() || e.ledger.String() != e.order.String() {
			b.differences = append(b.differences, fmt.Sprintf("%s: gateway %s, ledger %s, order %s", reference, e.gateway, e.ledger, e.order))
		}
	}
	slices.Sort(b.differences)
	for _, l := range lines {
		b.lines = append(b.lines, *l)
	}
	slices.SortFunc(b.lines, func(x, y line) int { return strings.Compare(x.Currency, y.Currency) })
}

// print writes the reconciliation.
func (b *books) print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "currency\tcharges\tat the gateway\tcaptures\tin the ledger\torders\tconfirmed\t\t")
	var total line
	for _, l := range b.lines {
		verdict := "equal"
		if l.Gateway != l.Ledger || l.Ledger != l.Orders {
			verdict = "DIFFERENT"
		}
		fmt.Fprintf(tw, "%s\t%d\t%s\t%d\t%s\t%d\t%s\t%s\t\n", l.Currency,
			l.Gateway.Count, format(l.Gateway.Amount, l.Currency), l.Ledger.Count, format(l.Ledger.Amount, l.Currency),
			l.Orders.Count, format(l.Orders.Amount, l.Currency), verdict)
		total.Gateway.Count += l.Gateway.Count
		total.Ledger.Count += l.Ledger.Count
		total.Orders.Count += l.Orders.Count
	}
	fmt.Fprintf(tw, "all\t%d\t\t%d\t\t%d\t\t\t\n", total.Gateway.Count, total.Ledger.Count, total.Orders.Count)
	tw.Flush()
	fmt.Fprintf(w, "\nleft open: %d payments, %d messages; dead letters: %d; events rejected: %d\n", b.open, b.outbox.Pending+b.outbox.Parked, b.outbox.Dead, b.rejected)
	const most = 20
	for i, d := range b.differences {
		if i == most {
			fmt.Fprintf(w, "... and %d more\n", len(b.differences)-most)
			break
		}
		fmt.Fprintln(w, "DIFFERENT", d)
	}
}

// format writes minor units as people do: 1234 EUR as 12.34.
func format(minor int64, currency string) string {
	digits, _ := payment.Exponent(currency)
	s := strconv.FormatInt(minor, 10)
	if digits == 0 {
		return s + " " + currency
	}
	for len(s) <= digits {
		s = "0" + s
	}
	return s[:len(s)-digits] + "." + s[len(s)-digits:] + " " + currency
}
