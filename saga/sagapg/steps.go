package sagapg

import (
	"encoding/json"
	"strconv"
	"time"

	"github.com/ashlar-go/ashlar/saga"
)

// The steps of a saga are stored as JSON that is short, for it is written with
// every step: times are microseconds since 1970, durations microseconds, and
// what is zero is left out, or one in the case of attempts.

type stepRow struct {
	Name  string `json:"name"`
	Pivot bool   `json:"pivot"`
	attemptRow
	Undo *attemptRow `json:"undo"`
}

type attemptRow struct {
	Outcome  saga.Outcome `json:"outcome"`
	Attempts *int         `json:"attempts"`
	Error    string       `json:"error"`
	Begun    int64        `json:"begun"`
	Took     *int64       `json:"took"`  // until it ended
	Until    int64        `json:"until"` // when it is tried again
}

func (r *attemptRow) times() (attempts int, begun, ended, until time.Time) {
	attempts = 1
	if r.Attempts != nil {
		attempts = *r.Attempts
	}
	if r.Begun != 0 {
		begun = time.UnixMicro(r.Begun)
	}
	if r.Took != nil {
		ended = time.UnixMicro(r.Begun + *r.Took)
	}
	if r.Until != 0 {
		until = time.UnixMicro(r.Until)
	}
	return attempts, begun, ended, until
}

func decodeSteps(b []byte) ([]saga.StepRecord, error) {
	var rows []stepRow
	if err := json.Unmarshal(b, &rows); err != nil {
		return nil, err
	}
	steps := make([]saga.StepRecord, len(rows))
	for i := range rows {
		r := &rows[i]
		s := saga.StepRecord{Name: r.Name, Pivot: r.Pivot, Outcome: r.Outcome, Error: r.Error}
		s.Attempts, s.BegunAt, s.EndedAt, s.NotBefore = r.times()
		if r.Undo != nil {
			u := &saga.Undo{Outcome: r.Undo.Outcome, Error: r.Undo.Error}
			u.Attempts, u.BegunAt, u.EndedAt, u.NotBefore = r.Undo.times()
			s.Undo = u
		}
		steps[i] = s
	}
	return steps, nil
}

func encodeSteps(steps []saga.StepRecord) []byte {
	b := make([]byte, 0, 2+100*len(steps))
	b = append(b, '[')
	for i := range steps {
		s := &steps[i]
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(append(b, `{"name":`...), s.Name)
		if s.Pivot {
			b = append(b, `,"pivot":true`...)
		}
		b = appendAttempt(append(b, ','), s.Outcome, s.Attempts, s.Error, s.BegunAt, s.EndedAt, s.NotBefore)
		if u := s.Undo; u != nil {
			b = appendAttempt(append(b, `,"undo":{`...), u.Outcome, u.Attempts, u.Error, u.BegunAt, u.EndedAt, u.NotBefore)
			b = append(b, '}')
		}
		b = append(b, '}')
	}
	return append(b, ']')
}

func appendAttempt(b []byte, outcome saga.Outcome, attempts int, failure string, begun, ended, until time.Time) []byte {
	b = appendString(append(b, `"outcome":`...), string(outcome))
	if attempts != 1 {
		b = strconv.AppendInt(append(b, `,"attempts":`...), int64(attempts), 10)
	}
	if failure != "" {
		b = appendString(append(b, `,"error":`...), failure)
	}
	var since int64
	if !begun.IsZero() {
		since = begun.UnixMicro()
		b = strconv.AppendInt(append(b, `,"begun":`...), since, 10)
	}
	if !ended.IsZero() {
		b = strconv.AppendInt(append(b, `,"took":`...), ended.UnixMicro()-since, 10)
	}
	if !until.IsZero() {
		b = strconv.AppendInt(append(b, `,"until":`...), until.UnixMicro(), 10)
	}
	return b
}

func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			q, err := json.Marshal(s)
			if err != nil {
				panic(err) // strings can be encoded
			}
			return append(b, q...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
