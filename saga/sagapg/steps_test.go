package sagapg

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/saga"
)

func FuzzSteps(f *testing.F) {
	f.Add("step 1", "broken", 0, int64(1_795_494_405_123_456), int64(543), int64(0), true)
	f.Add("é\"\\\n\u2028<", "\x00\xff", -1, int64(-5), int64(-1), int64(7), false)
	f.Fuzz(func(t *testing.T, name, failure string, attempts int, begun, ended, until int64, undo bool) {
		at := func(us int64) time.Time {
			if us %= 1 << 52; us == 0 {
				return time.Time{}
			}
			return time.UnixMicro(us)
		}
		s := saga.StepRecord{Name: name, Pivot: undo, Outcome: saga.OK, Attempts: attempts, Error: failure, BegunAt: at(begun), EndedAt: at(ended), NotBefore: at(until)}
		if undo {
			s.Undo = &saga.Undo{Outcome: saga.Begun, Attempts: attempts, Error: failure, BegunAt: at(begun), EndedAt: at(ended), NotBefore: at(until)}
		}
		steps := []saga.StepRecord{{Name: "first", Outcome: saga.Begun}, s}
		b := encodeSteps(steps)
		if !json.Valid(b) {
			t.Fatalf("not JSON: %s", b)
		}
		got, err := decodeSteps(b)
		if err != nil {
			t.Fatal(err)
		}
		if valid, _ := json.Marshal(name + failure); string(valid) == string(appendString(nil, name+failure)) && json.Unmarshal(valid, new(string)) == nil {
			var n, e string // invalid UTF-8 is replaced
			_ = json.Unmarshal(appendString(nil, name), &n)
			_ = json.Unmarshal(appendString(nil, failure), &e)
			steps[1].Name, steps[1].Error = n, e
			if undo {
				steps[1].Undo.Error = e
			}
		}
		if !reflect.DeepEqual(got, steps) {
			t.Errorf("got %+v\nwant %+v\nstored %s", got, steps, b)
		}
	})
}
