package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/examples/payments/client"
	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
	"github.com/ashlar-go/ashlar/examples/payments/payment"
	"github.com/ashlar-go/ashlar/examples/payments/server"
	"github.com/ashlar-go/ashlar/internal/ids"
	"github.com/ashlar-go/ashlar/internal/kafkatest"
	"github.com/ashlar-go/ashlar/internal/pgtest"
)

// A world is a database, a topic and a gateway. They outlive the instances of
// the service that a test starts in it.
type world struct {
	t      *testing.T
	pgURL  string
	pool   *pgxpool.Pool
	topic  string
	seeds  []string
	sim    *gatewaysim.Simulator
	simURL string
	log    *safeBuffer
}

const (
	testTimeout = 2 * time.Second
	testLate    = 2500 * time.Millisecond // later than the time-out
	testWindow  = 3 * time.Second         // longer than that
)

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, pgURL: pgtest.URL(t), seeds: kafkatest.Seeds(t), log: &safeBuffer{}}
	w.pool = pgtest.Open(t, w.pgURL)
	w.topic = kafkatest.Topic(t, 4)
	w.sim = gatewaysim.New(&gatewaysim.Options{Hang: 10 * time.Second, Late: testLate})
	srv := httptest.NewServer(w.sim)
	t.Cleanup(srv.Close)
	w.simURL = srv.URL
	return w
}

func (w *world) config() server.Config {
	return server.Config{
		PostgresURL: w.pgURL, KafkaSeeds: w.seeds, GatewayURL: w.simURL,
		Options: server.Options{
			GatewayTimeout: testTimeout, Group: w.topic, LeaseTTL: time.Second,
			Payment: payment.Options{Topic: w.topic, Every: 200 * time.Millisecond, Window: testWindow},
			Logger:  slog.New(slog.NewJSONHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		},
	}
}

// start runs an instance until the test ends and returns its URL.
func (w *world) start(change func(*server.Config)) string {
	w.t.Helper()
	cfg := w.config()
	if change != nil {
		change(&cfg)
	}
	s, err := server.New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, ln) }()
	w.t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			w.t.Errorf("server: %v", err)
		}
		s.Close()
	})
	url := "http://" + ln.Addr().String()
	eventually(w.t, "the service to be ready", func() error {
		resp, err := http.Get(url + "/readyz")
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
	return url
}

// eventually repeats check until it returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited for %s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func request(token string) client.Request {
	return client.Request{IdempotencyKey: "key-" + ids.New(), Amount: 1234, Currency: "EUR", Method: "card", Token: token, OrderID: "order-" + ids.New()}
}

// books checks that the gateway, the ledger and the orders agree once nothing
// is on its way, and returns how many charges there are.
func (w *world) books() int {
	w.t.Helper()
	n := 0
	eventually(w.t, "the books to be equal", func() error {
		atGateway, inLedger, inOrders := map[string]int64{}, map[string]int64{}, map[string]int64{}
		n = 0
		for _, e := range w.sim.Book() {
			if e.Status == "approved" {
				atGateway[e.Currency] += e.Amount
				n++
			}
		}
		var open int
		err := w.pool.QueryRow(context.Background(), `SELECT count(*) FROM payment WHERE state IN ('INITIATED', 'PENDING_VERIFICATION')`).Scan(&open)
		if err != nil {
			return err
		}
		for m, q := range map[*map[string]int64]string{
			&inLedger: `SELECT currency, sum(amount)::bigint FROM ledger_entry WHERE account = 'gateway_receivable' GROUP BY 1`,
			&inOrders: `SELECT currency, sum(amount)::bigint FROM orders WHERE state = 'CONFIRMED' GROUP BY 1`,
		} {
			rows, err := w.pool.Query(context.Background(), q)
			if err != nil {
				return err
			}
			var currency string
			var sum int64
			if _, err := pgx.ForEachRow(rows, []any{&currency, &sum}, func() error { (*m)[currency] = sum; return nil }); err != nil {
				return err
			}
		}
		if open != 0 || fmt.Sprint(atGateway) != fmt.Sprint(inLedger) || fmt.Sprint(inLedger) != fmt.Sprint(inOrders) {
			return fmt.Errorf("gateway %v, ledger %v, orders %v, open %d", atGateway, inLedger, inOrders, open)
		}
		return nil
	})
	return n
}

// events returns the states that the topic tells of a payment, in their order.
func (w *world) events(paymentID string, want int) []string {
	w.t.Helper()
	c := kafkatest.Client(w.t, kgo.ConsumeTopics(w.topic))
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	var states []string
	for len(states) < want {
		fetches := c.PollFetches(ctx)
		if ctx.Err() != nil {
			w.t.Fatalf("events of %s: %v, wanted %d", paymentID, states, want)
		}
		for r := range fetches.RecordsAll() {
			var e payment.Event
			if err := json.Unmarshal(r.Value, &e); err != nil {
				w.t.Fatal(err)
			}
			if string(r.Key) != e.PaymentID {
				w.t.Errorf("key %q of an event of payment %s", r.Key, e.PaymentID)
			}
			if e.PaymentID == paymentID {
				states = append(states, string(e.State))
			}
		}
	}
	return states
}

func TestOutcomes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	url := w.start(nil)
	api := client.New(url, &client.Options{Retries: -1})
	t.Run("token", func(t *testing.T) { outcomes(t, w, api) })
	if n := w.books(); n != 5 {
		t.Errorf("%d charges, want 5", n)
	}
}

func outcomes(t *testing.T, w *world, api *client.Client) {
	for _, tt := range []struct {
		token, state, final, order, reason string
		charges                            int
	}{
		{gatewaysim.OK, "AUTHORIZED", "AUTHORIZED", "CONFIRMED", "", 1},
		{gatewaysim.Decline, "DECLINED", "DECLINED", "PAYMENT_FAILED", "insufficient_funds", 0},
		{"tok_of_no_meaning", "DECLINED", "DECLINED", "PAYMENT_FAILED", "unknown_token", 0},
		{gatewaysim.TimeoutBefore, "PENDING_VERIFICATION", "DECLINED", "PAYMENT_FAILED", "never_reached_the_gateway", 0},
		{gatewaysim.TimeoutAfter, "PENDING_VERIFICATION", "AUTHORIZED", "CONFIRMED", "", 1},
		{gatewaysim.TimeoutLate, "PENDING_VERIFICATION", "AUTHORIZED", "CONFIRMED", "", 1},
		{gatewaysim.Crash, "PENDING_VERIFICATION", "AUTHORIZED", "CONFIRMED", "", 1},
		{gatewaysim.CrashBefore, "PENDING_VERIFICATION", "DECLINED", "PAYMENT_FAILED", "never_reached_the_gateway", 0},
		{gatewaysim.ErrorAfter, "PENDING_VERIFICATION", "AUTHORIZED", "CONFIRMED", "", 1},
	} {
		t.Run(tt.token, func(t *testing.T) {
			t.Parallel()
			r := request(tt.token)
			p, err := api.Pay(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			if p.State != tt.state || p.Replayed {
				t.Errorf("answered %s, replayed %v", p.State, p.Replayed)
			}
			eventually(t, "the final state", func() error {
				again, err := api.Pay(t.Context(), r)
				if err != nil {
					return err
				}
				if again.ID != p.ID || !again.Replayed {
					t.Fatalf("the repetition made payment %s, replayed %v", again.ID, again.Replayed)
				}
				if again.State != tt.final || again.Reason != tt.reason {
					return fmt.Errorf("%s %q", again.State, again.Reason)
				}
				return nil
			})
			want := []string{tt.final}
			if tt.state != tt.final {
				want = []string{tt.state, tt.final}
			}
			if got := w.events(p.ID, len(want)); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("events %v, want %v", got, want)
			}
			var order string
			eventually(t, "the order", func() error {
				if err := w.pool.QueryRow(t.Context(), `SELECT state FROM orders WHERE id = $1`, r.OrderID).Scan(&order); err != nil {
					return err
				}
				if order != tt.order {
					return errors.New(order)
				}
				return nil
			})
			var captured int
			if err := w.pool.QueryRow(t.Context(), `SELECT count(*) FROM ledger_transaction WHERE payment_id = $1`, p.ID).Scan(&captured); err != nil {
				t.Fatal(err)
			}
			if captured != tt.charges {
				t.Errorf("%d captures in the ledger, want %d", captured, tt.charges)
			}
		})
	}
}

func TestConcurrentDuplicates(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	url := w.start(nil)
	r := request(gatewaysim.OK)
	api := client.New(url, &client.Options{Retries: 50})
	var wg sync.WaitGroup
	ids := make([]string, 64)
	for i := range ids {
		wg.Go(func() {
			p, err := api.Pay(t.Context(), r)
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = p.ID
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("two payments for one key: %s and %s", id, ids[0])
		}
	}
	if n := w.books(); n != 1 {
		t.Errorf("%d charges, want 1", n)
	}
	if asked := w.sim.Book()[0].Asked; asked != 1 {
		t.Errorf("the gateway was asked %d times", asked)
	}
}

// While a key's request is at the gateway, another gets 409 with Retry-After.
func TestInFlight(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	url := w.start(func(c *server.Config) { c.GatewayTimeout = 5 * time.Second })
	r := request(gatewaysim.TimeoutBefore)
	first := make(chan *http.Response, 1)
	go func() {
		resp, err := post(url, r)
		if err != nil {
			t.Error(err)
		}
		first <- resp
	}()
	eventually(t, "the first to be stored", func() error {
		var state string
		return w.pool.QueryRow(t.Context(), `SELECT state FROM payment WHERE idempotency_key = $1`, r.IdempotencyKey).Scan(&state)
	})
	resp, err := post(url, r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusConflict || resp.Header.Get("Retry-After") == "" || resp.Header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("a duplicate got %d with headers %v", resp.StatusCode, resp.Header)
	}
	if resp := <-first; resp != nil && resp.StatusCode != http.StatusAccepted {
		t.Errorf("the first got %d, want 202", resp.StatusCode)
	}
}

func post(url string, r client.Request) (*http.Response, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	resp, err := http.Post(url+"/payments", "application/json", bytes.NewReader(body))
	if err == nil {
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	return resp, err
}

func TestKeyReuse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	api := client.New(w.start(nil), &client.Options{Retries: -1})
	r := request(gatewaysim.OK)
	p, err := api.Pay(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	problem := func(err error) string {
		var e *client.Error
		if !errors.As(err, &e) {
			return fmt.Sprint(err)
		}
		return fmt.Sprint(e.Status, " ", e.Type)
	}
	for name, change := range map[string]func(*client.Request){
		"amount": func(r *client.Request) { r.Amount++ }, "currency": func(r *client.Request) { r.Currency = "USD" },
		"method": func(r *client.Request) { r.Method = "wallet" }, "token": func(r *client.Request) { r.Token = "tok_x" },
		"order": func(r *client.Request) { r.OrderID += "x" },
	} {
		other := r
		change(&other)
		if _, err := api.Pay(t.Context(), other); problem(err) != "422 /problems/key-reused" {
			t.Errorf("another %s: %s", name, problem(err))
		}
	}
	// The payment's own key answers when the idempotency record is forgotten.
	if _, err := w.pool.Exec(t.Context(), `DELETE FROM idempotency_key`); err != nil {
		t.Fatal(err)
	}
	if again, err := api.Pay(t.Context(), r); err != nil || again.ID != p.ID || !again.Replayed {
		t.Errorf("after the record's end: %+v, %v", again, err)
	}
	other := r
	other.Amount++
	if _, err := api.Pay(t.Context(), other); problem(err) != "422 /problems/key-reused" {
		t.Errorf("after the record's end: %s", problem(err))
	}
	// An order is paid once, but after a decline another card may be tried.
	second := request(gatewaysim.OK)
	second.OrderID = r.OrderID
	if _, err := api.Pay(t.Context(), second); problem(err) != "409 /problems/order-paid" {
		t.Errorf("a second payment of an order: %s", problem(err))
	}
	declined := request(gatewaysim.Decline)
	if _, err := api.Pay(t.Context(), declined); err != nil {
		t.Fatal(err)
	}
	retry := request(gatewaysim.OK)
	retry.OrderID = declined.OrderID
	if p, err := api.Pay(t.Context(), retry); err != nil || p.State != "AUTHORIZED" {
		t.Errorf("another card after a decline: %+v, %v", p, err)
	}
	if n := w.books(); n != 2 {
		t.Errorf("%d charges, want 2", n)
	}
}

// If the service believes "no such reference" while the gateway may still act,
// it declines a payment that is charged afterwards, and the books differ. With a
// window that is long enough (TestOutcomes, tok_timeout_late) they do not.
func TestWindow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.sim = gatewaysim.New(&gatewaysim.Options{Late: 12 * time.Second})
	srv := httptest.NewServer(w.sim)
	t.Cleanup(srv.Close)
	w.simURL = srv.URL
	api := client.New(w.start(func(c *server.Config) { c.Payment.Window = time.Nanosecond }), &client.Options{Retries: -1})
	p, err := api.Pay(t.Context(), request(gatewaysim.TimeoutLate))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the premature decline", func() error {
		p, err := api.Get(t.Context(), p.ID)
		if err == nil && p.State != "DECLINED" {
			err = errors.New(p.State)
		}
		return err
	})
	eventually(t, "the late charge", func() error {
		if len(w.sim.Book()) == 0 {
			return errors.New("none")
		}
		return nil
	})
	var captures int
	if err := w.pool.QueryRow(t.Context(), `SELECT count(*) FROM ledger_transaction`).Scan(&captures); err != nil {
		t.Fatal(err)
	}
	if captures != 0 || w.sim.Book()[0].Status != "approved" {
		t.Errorf("%d captures, the book says %s; this was to show how the books come to differ", captures, w.sim.Book()[0].Status)
	}
}

// What is delivered again is not applied again, and two instances side by side
// share the work.
func TestTwoInstances(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	apis := []*client.Client{client.New(w.start(nil), &client.Options{Retries: 50}), client.New(w.start(nil), &client.Options{Retries: 50})}
	tokens := []string{gatewaysim.OK, gatewaysim.TimeoutAfter, gatewaysim.Crash, gatewaysim.ErrorAfter}
	var wg sync.WaitGroup
	for i := range 24 {
		r := request(tokens[i%len(tokens)])
		for _, api := range apis {
			wg.Go(func() {
				if _, err := api.Pay(t.Context(), r); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if n := w.books(); n != 24 {
		t.Errorf("%d charges, want 24", n)
	}
	for _, e := range w.sim.Book() {
		if e.Asked != 1 {
			t.Errorf("reference %s was charged for %d times", e.Reference, e.Asked)
		}
	}
}

// safeBuffer is a log that tests read while it is written.
type safeBuffer struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
