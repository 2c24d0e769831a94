package main

import (
	"context"
	"embed"
	"encoding/json"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/examples/internal/app"
	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
	"github.com/ashlar-go/ashlar/examples/payments/payment"
)

//go:embed page
var page embed.FS

// shown is how many rows of each table the page shows.
const shown = 12

// handler serves the page, what it polls, and the payments service behind it.
func (w *world) handler(events *events) http.Handler {
	files, err := fs.Sub(page, "page")
	if err != nil {
		panic(err) // it is embedded
	}
	target, err := url.Parse(w.url)
	if err != nil {
		panic(err) // it is our own
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ModifyResponse: func(resp *http.Response) error {
			resp.Header.Del("X-Request-Id") // this server's own is set already
			return nil
		},
		ErrorHandler: func(rw http.ResponseWriter, _ *http.Request, _ error) {
			app.WriteProblem(rw, &app.Problem{
				Type: "/problems/no-answer", Title: "No answer", Status: http.StatusBadGateway,
				Detail: "The service broke off. Repeat the request with the same key.",
			})
		},
		ErrorLog: slog.NewLogLogger(w.log.Handler(), slog.LevelDebug),
	}
	static := http.FileServerFS(files)
	mux := http.NewServeMux()
	mux.Handle("POST /payments", proxy)
	mux.Handle("GET /payments/{id}", proxy)
	mux.HandleFunc("GET /api/state", func(rw http.ResponseWriter, r *http.Request) {
		s, err := w.state(r.Context(), events)
		if err != nil {
			app.WriteProblem(rw, &app.Problem{Type: "about:blank", Title: "No state", Status: http.StatusServiceUnavailable, Detail: err.Error()})
			return
		}
		app.WriteJSON(rw, http.StatusOK, s)
	})
	mux.HandleFunc("POST /api/kill/{point}", func(rw http.ResponseWriter, r *http.Request) {
		point := r.PathValue("point")
		if !slices.Contains(points, point) {
			app.WriteProblem(rw, &app.Problem{Type: "about:blank", Title: "No such point", Status: http.StatusNotFound})
			return
		}
		w.kill(point)
		rw.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /", func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'")
		rw.Header().Set("Cache-Control", "no-cache")
		static.ServeHTTP(rw, r)
	})
	return mux
}

type paymentRow struct {
	ID        string    `json:"id"`
	Order     string    `json:"order"`
	State     string    `json:"state"`
	Reason    string    `json:"reason"`
	Token     string    `json:"token"`
	Amount    string    `json:"amount"`
	CreatedAt time.Time `json:"created_at"`
}

type ledgerRow struct {
	ID      int64  `json:"id"`
	Payment string `json:"payment"`
	Account string `json:"account"`
	Debit   string `json:"debit,omitempty"`
	Credit  string `json:"credit,omitempty"`
}

type orderRow struct {
	ID     string `json:"id"`
	State  string `json:"state"`
	Amount string `json:"amount"`
}

type chargeRow struct {
	ID     string `json:"id"`
	Status string `json:"status"`
	Amount string `json:"amount"`
}

type bookRow struct {
	Currency string `json:"currency"`
	Gateway  string `json:"gateway"`
	Ledger   string `json:"ledger"`
	Orders   string `json:"orders"`
	Equal    bool   `json:"equal"`
}

// A state is all that the page shows.
type state struct {
	Payments []paymentRow `json:"payments"`
	Ledger   []ledgerRow  `json:"ledger"`
	Orders   []orderRow   `json:"orders"`
	Charges  []chargeRow  `json:"charges"`
	Events   []eventRow   `json:"events"`
	Books    []bookRow    `json:"books"`
	Equal    bool         `json:"equal"`
	Outbox   struct {
		Pending   int64 `json:"pending"`
		Parked    int64 `json:"parked"`
		Dead      int64 `json:"dead"`
		Delivered int64 `json:"delivered"`
	} `json:"outbox"`
	Open    int `json:"open"`
	Crashes int `json:"crashes"`
}

func (w *world) state(ctx context.Context, events *events) (*state, error) {
	s := &state{}
	b, err := readBooks(ctx, w.pool, w.sim)
	if err != nil {
		return nil, err
	}
	s.Equal, s.Open = b.equal(), b.open
	for _, l := range b.lines {
		s.Books = append(s.Books, bookRow{
			l.Currency, format(l.Gateway.Amount, l.Currency), format(l.Ledger.Amount, l.Currency), format(l.Orders.Amount, l.Currency),
			l.Gateway == l.Ledger && l.Ledger == l.Orders,
		})
	}
	s.Outbox.Pending, s.Outbox.Parked, s.Outbox.Dead = b.outbox.Pending, b.outbox.Parked, b.outbox.Dead
	s.Events, s.Outbox.Delivered = events.last()
	s.Charges = chargeRows(w.sim.Book())
	s.Crashes, _ = w.crashCount()

	var minor int64
	var currency string
	var p paymentRow
	var l ledgerRow
	var o orderRow
	for _, q := range []struct {
		sql  string
		dest []any
		add  func()
	}{
		{
			`SELECT id::text, order_id, state, reason, token, amount, currency, created_at FROM payment ORDER BY id DESC LIMIT $1`,
			[]any{&p.ID, &p.Order, &p.State, &p.Reason, &p.Token, &minor, &currency, &p.CreatedAt},
			func() { p.Amount = format(minor, currency); s.Payments = append(s.Payments, p) },
		},
		{
			`SELECT e.id, t.payment_id::text, e.account, e.amount, e.currency FROM ledger_entry e JOIN ledger_transaction t ON t.id = e.transaction_id ORDER BY e.id DESC LIMIT $1`,
			[]any{&l.ID, &l.Payment, &l.Account, &minor, &currency},
			func() {
				l.Debit, l.Credit = "", ""
				if minor > 0 {
					l.Debit = format(minor, currency)
				} else {
					l.Credit = format(-minor, currency)
				}
				s.Ledger = append(s.Ledger, l)
			},
		},
		{
			`SELECT id, state, amount, currency FROM orders ORDER BY updated_at DESC LIMIT $1`,
			[]any{&o.ID, &o.State, &minor, &currency},
			func() { o.Amount = format(minor, currency); s.Orders = append(s.Orders, o) },
		},
	} {
		rows, err := w.pool.Query(ctx, q.sql, shown)
		if err != nil {
			return nil, err
		}
		if _, err := pgx.ForEachRow(rows, q.dest, func() error { q.add(); return nil }); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func chargeRows(book []gatewaysim.Entry) (rows []chargeRow) {
	for i := len(book) - 1; i >= 0 && len(rows) < shown; i-- {
		rows = append(rows, chargeRow{book[i].ID, book[i].Status, format(book[i].Amount, book[i].Currency)})
	}
	return rows
}

type eventRow struct {
	Partition int32  `json:"partition"`
	Offset    int64  `json:"offset"`
	Payment   string `json:"payment"`
	Order     string `json:"order"`
	State     string `json:"state"`
}

// events remembers what was delivered to Kafka.
type events struct {
	seeds []string
	log   *slog.Logger

	mu    sync.Mutex
	rows  []eventRow // the latest first
	total int64
}

func newEvents(seeds []string, log *slog.Logger) *events { return &events{seeds: seeds, log: log} }

func (e *events) last() ([]eventRow, int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.rows), e.total
}

// run reads the topic until ctx ends.
func (e *events) run(ctx context.Context) {
	c, err := kgo.NewClient(kgo.SeedBrokers(e.seeds...), kgo.ConsumeTopics("payment.events"), kgo.AllowAutoTopicCreation(),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.MetadataMinAge(100*time.Millisecond), kgo.MetadataMaxAge(time.Second))
	if err != nil {
		e.log.ErrorContext(ctx, "events are not shown", "error", err)
		return
	}
	defer c.Close()
	for ctx.Err() == nil {
		for r := range c.PollFetches(ctx).RecordsAll() {
			var ev payment.Event
			if err := json.Unmarshal(r.Value, &ev); err != nil {
				continue // not one of ours
			}
			e.mu.Lock()
			e.rows = slices.Insert(e.rows, 0, eventRow{r.Partition, r.Offset, ev.PaymentID, ev.OrderID, string(ev.State)})
			e.rows = e.rows[:min(len(e.rows), shown)]
			e.total++
			e.mu.Unlock()
		}
	}
}
