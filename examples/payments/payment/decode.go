package payment

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/ashlar-go/ashlar/examples/internal/app"
)

// MaxBody is the size of the largest request that is read, in bytes.
const MaxBody = 64 << 10

var (
	methods      = []string{"card", "paypal", "wallet", "gift_card"}
	tokenPattern = regexp.MustCompile(`^tok_[a-z0-9_]{1,64}$`)
	orderPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$`)
	keyPattern   = regexp.MustCompile(`^[A-Za-z0-9._:~+/=-]{1,255}$`)
	integer      = regexp.MustCompile(`^-?(0|[1-9][0-9]*)$`)
)

func refuse(status int, name, title, field, detail string) *app.Problem {
	return &app.Problem{Type: "/problems/" + name, Title: title, Status: status, Field: field, Detail: detail}
}

func invalid(field, detail string) *app.Problem {
	return refuse(http.StatusBadRequest, "invalid-request", "Invalid request", field, detail)
}

func cardNumber(field string) *app.Problem {
	return refuse(http.StatusBadRequest, "card-number", "Card numbers are not accepted", field,
		"Send a token of the payment page. What was sent is neither stored nor logged.")
}

// Decode reads a request: exactly one JSON object with exactly the known
// members, each once. header is the value of the Idempotency-Key header, or "".
// Every error is an [app.Problem] and repeats nothing of the input.
func Decode(body []byte, header string) (Request, error) {
	var r Request
	members, err := object(body)
	if err != nil {
		return r, err
	}
	text := func(name string) string {
		var s string
		if raw, ok := members[name]; ok && err == nil {
			if raw[0] != '"' || json.Unmarshal(raw, &s) != nil {
				err = invalid(name, "must be a string")
			}
		}
		return s
	}
	r.IdempotencyKey = text("idempotency_key")
	r.Currency, r.Method, r.Token, r.OrderID = text("currency"), text("method"), text("token"), text("order_id")
	if err != nil {
		return r, err
	}
	if r.IdempotencyKey, err = oneKey(header, r.IdempotencyKey, members["idempotency_key"] != nil); err != nil {
		return r, err
	}
	if r.Amount, err = amount(members["amount"]); err != nil {
		return r, err
	}
	_, known := Exponent(r.Currency)
	switch {
	case !known:
		return r, refuse(http.StatusBadRequest, "currency", "Unknown currency", "currency", "must be an active ISO 4217 code such as USD")
	case !slices.Contains(methods, r.Method):
		return r, invalid("method", "must be card, paypal, wallet or gift_card")
	case !tokenPattern.MatchString(r.Token):
		return r, invalid("token", "must match ^tok_[a-z0-9_]{1,64}$")
	case !orderPattern.MatchString(r.OrderID):
		return r, invalid("order_id", "must be 1 to 64 letters, digits, dots, colons, dashes or underscores, beginning with a letter or digit")
	}
	return r, nil
}

// object splits a JSON object into its members. It does not use encoding/json's
// struct decoding, which takes a name in any case and the last of equal ones.
func object(body []byte) (map[string]json.RawMessage, error) {
	known := []string{"idempotency_key", "amount", "currency", "method", "token", "order_id"}
	bad := invalid("", "the body must be one JSON object")
	if !utf8.Valid(body) || !json.Valid(body) || bytes.TrimLeft(body, " \t\r\n")[0] != '{' {
		return nil, bad
	}
	if anyCardNumber(body) {
		return nil, cardNumber("")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	if _, err := dec.Token(); err != nil {
		return nil, bad
	}
	members := make(map[string]json.RawMessage)
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil, bad
		}
		key, ok := name.(string)
		var value json.RawMessage
		if !ok || dec.Decode(&value) != nil {
			return nil, bad
		}
		if !slices.Contains(known, key) {
			return nil, invalid("", "unknown member; known are idempotency_key, amount, currency, method, token and order_id")
		}
		if members[key] != nil {
			return nil, invalid(key, "is given twice")
		}
		members[key] = value
	}
	return members, nil
}

// anyCardNumber looks at every name, string and number of a JSON text, however
// deep and however escaped.
func anyCardNumber(body []byte) bool {
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	for {
		tok, err := dec.Token()
		if err != nil {
			return !errors.Is(err, io.EOF) && HasCardNumber(string(body))
		}
		switch v := tok.(type) {
		case string:
			if HasCardNumber(v) {
				return true
			}
		case json.Number:
			if HasCardNumber(v.String()) {
				return true
			}
		}
	}
}

func oneKey(header, member string, given bool) (string, error) {
	if header != "" {
		if HasCardNumber(header) {
			return "", cardNumber("Idempotency-Key")
		}
		if len(header) >= 2 && header[0] == '"' && header[len(header)-1] == '"' { // as the IETF draft has it
			header = header[1 : len(header)-1]
		}
		if !keyPattern.MatchString(header) {
			return "", invalid("Idempotency-Key", keyRule)
		}
		if given && header != member {
			return "", invalid("idempotency_key", "differs from the Idempotency-Key header")
		}
		return header, nil
	}
	if !keyPattern.MatchString(member) {
		return "", invalid("idempotency_key", keyRule)
	}
	return member, nil
}

const keyRule = "must be 1 to 255 letters, digits or . _ : ~ + / = -, in this member or the Idempotency-Key header"

func amount(raw json.RawMessage) (int64, error) {
	problem := func(detail string) error {
		return refuse(http.StatusBadRequest, "amount", "Invalid amount", "amount", detail)
	}
	if !integer.Match(raw) {
		return 0, problem("must be a whole number of minor units (cents, for USD), as a JSON integer")
	}
	n, err := strconv.ParseInt(string(raw), 10, 64)
	if err != nil || n <= 0 || n > MaxAmount {
		return 0, problem("must be from 1 to " + strconv.Itoa(MaxAmount) + " minor units")
	}
	return n, nil
}

func printable(s string) bool {
	for _, r := range s {
		if r < ' ' || r > '~' {
			return false
		}
	}
	return true
}
