package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/ashlar-go/ashlar/examples/payments/client"
	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
	"github.com/ashlar-go/ashlar/internal/ids"
	"github.com/ashlar-go/ashlar/internal/kafkatest"
)

// The usual test number, and ways to write it.
const canary = "4111111111111111"

var spellings = []string{canary, "4111 1111 1111 1111", "4111-1111-1111-1111", "4111.1111.1111.1111", "x4111111111111111y"}

func TestHostileInput(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	url := w.start(nil)
	long := strings.Repeat("k", 1<<20)
	body := func(change map[string]any) string {
		m := map[string]any{
			"idempotency_key": "k-" + ids.New(), "amount": 100, "currency": "EUR",
			"method": "card", "token": "tok_ok", "order_id": "o-" + ids.New(),
		}
		for k, v := range change {
			if v == nil {
				delete(m, k)
				continue
			}
			m[k] = v
		}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	type hostile struct {
		name, body, key string
		status          int
		kind            string
	}
	tests := []hostile{
		{"nothing", "", "", 400, "invalid-request"},
		{"not JSON", "{", "", 400, "invalid-request"},
		{"not an object", `[1]`, "", 400, "invalid-request"},
		{"null", `null`, "", 400, "invalid-request"},
		{"trailing data", body(nil) + "{}", "", 400, "invalid-request"},
		{"not UTF-8", strings.Replace(body(nil), "card", "ca\xffrd", 1), "", 400, "invalid-request"},
		{"deep nesting", strings.Repeat(`{"a":`, 20000) + "1" + strings.Repeat("}", 20000), "", 413, "too-large"},
		{"nesting", strings.Repeat(`[`, 20000), "", 400, "invalid-request"},
		{"unknown member", body(map[string]any{"cvv": "123"}), "", 400, "invalid-request"},
		{"member in another case", strings.Replace(body(nil), `"amount"`, `"Amount"`, 1), "", 400, "invalid-request"},
		{"member twice", strings.Replace(body(nil), `{`, `{"amount":1,`, 1), "", 400, "invalid-request"},
		{"too large", body(map[string]any{"order_id": strings.Repeat("o", 70_000)}), "", 413, "too-large"},
		{"member of 1 MiB", body(map[string]any{"idempotency_key": long}), "", 413, "too-large"},
		{"header of 1 MiB", body(nil), long, 400, "invalid-request"},
		{"no key", body(map[string]any{"idempotency_key": nil}), "", 400, "invalid-request"},
		{"empty key", body(map[string]any{"idempotency_key": ""}), "", 400, "invalid-request"},
		{"long key", body(map[string]any{"idempotency_key": strings.Repeat("k", 256)}), "", 400, "invalid-request"},
		{"control byte in key", body(map[string]any{"idempotency_key": "a\x00b"}), "", 400, "invalid-request"},
		{"two keys", body(nil), "another", 400, "invalid-request"},
		{"no amount", body(map[string]any{"amount": nil}), "", 400, "amount"},
		{"zero", body(map[string]any{"amount": 0}), "", 400, "amount"},
		{"negative", body(map[string]any{"amount": -100}), "", 400, "amount"},
		{"fraction", body(map[string]any{"amount": 1.5}), "", 400, "amount"},
		{"text", body(map[string]any{"amount": "100"}), "", 400, "amount"},
		{"over the cap", body(map[string]any{"amount": 100_000_000_000}), "", 400, "amount"},
		{"unknown currency", body(map[string]any{"currency": "XXX"}), "", 400, "currency"},
		{"withdrawn currency", body(map[string]any{"currency": "HRK"}), "", 400, "currency"},
		{"currency in small letters", body(map[string]any{"currency": "eur"}), "", 400, "currency"},
		{"unknown method", body(map[string]any{"method": "cash"}), "", 400, "invalid-request"},
		{"not a token", body(map[string]any{"token": "4242"}), "", 400, "invalid-request"},
		{"long token", body(map[string]any{"token": "tok_" + strings.Repeat("a", 65)}), "", 400, "invalid-request"},
		{"long order", body(map[string]any{"order_id": strings.Repeat("o", 65)}), "", 400, "invalid-request"},
		{"SQL in order", body(map[string]any{"order_id": "'; DROP TABLE payment; --"}), "", 400, "invalid-request"},
	}
	for _, literal := range []string{"1e400", "1e2", "9223372036854775808", "-0", "1.0", "[1]", "true", "null", "{}"} {
		tests = append(tests, hostile{"amount " + literal, strings.Replace(body(nil), "100", literal, 1), "", 400, "amount"})
	}
	for _, s := range spellings {
		for _, field := range []string{"idempotency_key", "currency", "method", "token", "order_id", "note"} {
			tests = append(tests, hostile{"card " + s + " in " + field, body(map[string]any{field: "tok_" + s}), "", 400, "card-number"})
		}
		tests = append(tests,
			hostile{"card " + s + " as a name", body(map[string]any{s: 1}), "", 400, "card-number"},
			hostile{"card " + s + " deep", body(map[string]any{"token": map[string]any{"a": []any{s}}}), "", 400, "card-number"},
			hostile{"card " + s + " in the header", body(nil), s, 400, "card-number"})
	}
	tests = append(tests,
		hostile{"card as the amount", strings.Replace(body(nil), "100", canary, 1), "", 400, "card-number"},
		hostile{"card in escapes", strings.Replace(body(nil), "tok_ok", "tok_"+strings.Repeat(`\u0034`, 1)+canary[1:], 1), "", 400, "card-number"},
		hostile{"card in bad JSON", `{"order_id":"` + canary, "", 400, "invalid-request"})

	for _, tt := range tests {
		name := tt.name
		if len(name) > 60 {
			name = name[:60]
		}
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequest(http.MethodPost, url+"/payments", strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			if tt.key != "" {
				req.Header.Set("Idempotency-Key", tt.key)
			}
			refused(t, req, tt.status, tt.kind)
		})
	}
	t.Run("card in the path", func(t *testing.T) {
		req, _ := http.NewRequest(http.MethodGet, url+"/payments/"+canary, nil)
		refused(t, req, 400, "card-number")
	})
	t.Run("card in the query", func(t *testing.T) {
		req, _ := http.NewRequest(http.MethodGet, url+"/payments/x?card=4111%201111%201111%201111", nil)
		refused(t, req, 400, "card-number")
	})
	t.Run("card as the request id", func(t *testing.T) {
		req, _ := http.NewRequest(http.MethodGet, url+"/payments/"+ids.New(), nil)
		req.Header.Set("X-Request-Id", canary)
		refused(t, req, 404, "not-found")
	})
	t.Run("wrong method", func(t *testing.T) {
		req, _ := http.NewRequest(http.MethodDelete, url+"/payments", nil)
		refused(t, req, 405, "method")
	})

	var payments int
	if err := w.pool.QueryRow(t.Context(), `SELECT count(*) FROM payment`).Scan(&payments); err != nil {
		t.Fatal(err)
	}
	if payments != 0 {
		t.Errorf("%d payments were made", payments)
	}
	// One that is good shows that the places to look in are those that are used.
	marker := request(gatewaysim.OK)
	marker.OrderID = "marker-" + ids.New()
	if _, err := client.New(url, nil).Pay(t.Context(), marker); err != nil {
		t.Fatal(err)
	}
	w.books()
	kept := w.kept()
	if n := bytes.Count(kept, []byte(marker.OrderID)); n < 3 {
		t.Fatalf("the marker was found %d times in the tables and the topic", n)
	}
	if !strings.Contains(w.log.String(), `"route":"POST /payments"`) {
		t.Fatal("the log has no requests")
	}
	for _, s := range spellings {
		s = strings.Trim(s, "xy")
		if bytes.Contains(kept, []byte(s)) || strings.Contains(w.log.String(), s) {
			t.Errorf("%q was kept", s)
		}
	}
}

func refused(t *testing.T, req *http.Request, status int, kind string) {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		// net/http may report the broken connection of a body that was not read.
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	var problem struct {
		Type, Title string
		Status      int
	}
	if err := json.Unmarshal(body, &problem); err != nil || media != "application/problem+json" {
		t.Fatalf("%d %s: %.200s", resp.StatusCode, media, body)
	}
	if resp.StatusCode != status || problem.Status != status || problem.Type != "/problems/"+kind || problem.Title == "" {
		t.Errorf("%d %+v, want %d %s", resp.StatusCode, problem, status, kind)
	}
	if bytes.Contains(body, []byte("1111")) || strings.Contains(fmt.Sprint(resp.Header), "1111") {
		t.Errorf("the answer repeats the number: %v %s", resp.Header, body)
	}
}

// kept returns all that is in the schema's tables and in the topic.
func (w *world) kept() []byte {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	rows, err := w.pool.Query(ctx, `SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()`)
	if err != nil {
		w.t.Fatal(err)
	}
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(tables) < 8 {
		w.t.Fatal(tables, err)
	}
	var all []byte
	for _, table := range tables {
		rows, err := w.pool.Query(ctx, `SELECT t::text FROM `+pgx.Identifier{table}.Sanitize()+` t`)
		if err != nil {
			w.t.Fatal(err)
		}
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			w.t.Fatal(err)
		}
		all = append(all, strings.Join(lines, "\n")...)
	}
	c := kafkatest.Client(w.t, kgo.ConsumeTopics(w.topic))
	fetches := c.PollFetches(ctx)
	for r := range fetches.RecordsAll() {
		all = append(append(all, r.Key...), r.Value...)
		all = append(all, fmt.Sprint(r.Headers)...)
	}
	return all
}
