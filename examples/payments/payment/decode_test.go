package payment

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/ashlar-go/ashlar/examples/internal/app"
	"github.com/ashlar-go/ashlar/internal/ids"
)

const good = `{"idempotency_key":"k1","amount":100,"currency":"EUR","method":"card","token":"tok_ok","order_id":"o1"}`

func TestDecode(t *testing.T) {
	want := Request{"k1", 100, "EUR", "card", "tok_ok", "o1"}
	for _, tt := range []struct{ name, body, header string }{
		{"member", good, ""},
		{"both", good, "k1"},
		{"both, quoted", good, `"k1"`},
		{"header", strings.Replace(good, `"idempotency_key":"k1",`, "", 1), `"k1"`},
		{"escapes", strings.Replace(good, "tok_ok", `tok\u005fok`, 1), ""},
		{"white space", " \n" + strings.ReplaceAll(good, ",", " ,\t") + "\r\n", ""},
	} {
		if r, err := Decode([]byte(tt.body), tt.header); err != nil || r != want {
			t.Errorf("%s: %+v, %v", tt.name, r, err)
		}
	}
	for _, n := range []int64{1, MaxAmount} {
		r, err := Decode([]byte(strings.Replace(good, "100", fmt.Sprint(n), 1)), "")
		if err != nil || r.Amount != n {
			t.Errorf("amount %d: %d, %v", n, r.Amount, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(good), "")
	f.Add([]byte(good), `"k1"`)
	f.Add([]byte(strings.Replace(good, "100", "1e400", 1)), "")
	f.Add([]byte(strings.Replace(good, "o1", "4111 1111 1111 1111", 1)), "")
	f.Add([]byte(`{"amount":`), "k")
	f.Fuzz(func(t *testing.T, body []byte, header string) {
		r, err := Decode(body, header)
		if err != nil {
			var p *app.Problem
			if !errors.As(err, &p) || p.Status != 400 || p.Type == "" || p.Title == "" {
				t.Fatalf("not a problem: %v", err)
			}
			return
		}
		_, known := Exponent(r.Currency)
		if r.Amount < 1 || r.Amount > MaxAmount || !known || !slices.Contains(methods, r.Method) || !tokenPattern.MatchString(r.Token) ||
			len(r.OrderID) < 1 || len(r.OrderID) > 64 || len(r.IdempotencyKey) < 1 || len(r.IdempotencyKey) > 255 {
			t.Fatalf("accepted %+v", r)
		}
		for _, s := range []string{r.IdempotencyKey, r.Token, r.OrderID} {
			if HasCardNumber(s) {
				t.Fatalf("accepted a card number in %+v", r)
			}
		}
		// What is accepted is what encoding/json makes of it.
		var v map[string]any
		if err := json.Unmarshal(body, &v); err != nil || v["token"] != r.Token || v["order_id"] != r.OrderID {
			t.Fatalf("%+v is not what %q says", r, body)
		}
	})
}

// Two requests that differ have different fingerprints, also where the fields
// run together to the same text.
func TestFingerprint(t *testing.T) {
	base := Request{"k", 1, "EUR", "card", "tok_ab", "c"}
	seen := map[string]Request{string(base.fingerprint()): base}
	for _, r := range []Request{
		{"k", 2, "EUR", "card", "tok_ab", "c"},
		{"k", 1, "USD", "card", "tok_ab", "c"},
		{"k", 1, "EUR", "wallet", "tok_ab", "c"},
		{"k", 1, "EUR", "card", "tok_a", "bc"},
		{"k", 1, "EUR", "card", "tok_abc", ""},
	} {
		if other, ok := seen[string(r.fingerprint())]; ok {
			t.Errorf("%+v and %+v have one fingerprint", r, other)
		}
		seen[string(r.fingerprint())] = r
	}
	same := base
	same.IdempotencyKey = "other"
	if _, ok := seen[string(same.fingerprint())]; !ok {
		t.Error("the key is part of the fingerprint")
	}
}

func TestHasCardNumber(t *testing.T) {
	for _, s := range []string{
		"4111111111111111", "5555555555554444", "378282246310005", "6011111111111117", "3530111333300000", "30569309025904",
		"4222222222222", "6304000000000000018", // 13 and 19 digits
		"4111 1111 1111 1111", "4111-1111-1111-1111", "4111  1111  1111  1111", "4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
		"pay 4111111111111111 now", "a4111111111111111b", "tok_4111_1111_1111_1111", "4111–1111–1111–1111", "4111\u00a01111\u00a01111\u00a01111",
		"４１１１１１１１１１１１１１１１", "٤١١١١١١١١١١١١١١١", "𝟒𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏𝟏", "000000000411111111111111100000",
		"4111111111111111-01890000-1111-7111-8111-111111111111", "01890000-1111-7111-8111-111111111111 4111111111111111",
	} {
		if !HasCardNumber(s) {
			t.Errorf("missed in %q", s)
		}
	}
	for _, s := range []string{
		"", "4111111111111112", "411111111111", "order-12345", "0000000000000000", "2026-11-23T10:00:00Z", "tok_ok",
		"4111a1111b1111c1111", "99999999999", "01890000-1111-7111-8111-111111111111",
	} {
		if HasCardNumber(s) {
			t.Errorf("seen in %q", s)
		}
	}
	for range 10_000 {
		if id := ids.New(); HasCardNumber(id) || HasCardNumber("order-"+id) || !uuidPattern.MatchString(id) {
			t.Fatalf("seen in %q", id)
		}
	}
}

// Luhn's digit finds every wrong digit.
func TestLuhn(t *testing.T) {
	number := []byte("4111111111111111")
	for i := range number {
		for d := byte('0'); d <= '9'; d++ {
			changed := slices.Clone(number)
			changed[i] = d
			if HasCardNumber(string(changed)) != (d == number[i]) {
				t.Errorf("%s", changed)
			}
		}
	}
}

func TestExponent(t *testing.T) {
	for code, want := range map[string]int{"USD": 2, "EUR": 2, "JPY": 0, "KWD": 3, "CLF": 4, "UYW": 4, "ISK": 0, "TND": 3} {
		if n, ok := Exponent(code); !ok || n != want {
			t.Errorf("%s: %d, %v", code, n, ok)
		}
	}
	for _, code := range []string{"", "XXX", "XTS", "XAU", "XDR", "HRK", "ZWL", "DEM", "eur", "EURO"} {
		if _, ok := Exponent(code); ok {
			t.Errorf("%q is accepted", code)
		}
	}
	if n := len(exponents); n < 150 || n > 170 {
		t.Errorf("%d codes", n)
	}
}
