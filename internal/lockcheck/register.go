package lockcheck

import (
	"context"
	"errors"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/ashlar-go/ashlar/lock"
)

// An access is the input of an operation on a register: a Load, or an Update that
// appends its mark.
type access struct{ mark string }

// A view is its output: the value and version that were read or made.
type view struct {
	value   string
	version int64
}

// The state of a register is the value alone. Updates that are stored together
// have one version, so of versions it is only asked that they never fall.
func stepRegister(state, input, output any) (bool, any) {
	s, in, out := state.(view), input.(access), output.(view)
	next := view{s.value + in.mark, out.version}
	return out.value == next.value && out.version >= s.version, next
}

func registerModel() porcupine.Model {
	return porcupine.Model{Init: func() any { return view{} }, Step: stepRegister}
}

// Values keeps the history of the calls to registers that are one.
type Values struct{ history history }

// NewValues returns a recorder.
func NewValues() *Values { return &Values{history{start: time.Now()}} }

// Check reports whether the history is linearizable, and how many calls it has.
func (v *Values) Check(timeout time.Duration) (porcupine.CheckResult, int, error) {
	return v.history.check(registerModel(), timeout)
}

func (v *Values) record(client int, in access, f func() (string, int64, error)) {
	began := time.Since(v.history.start)
	value, version, err := f()
	if errors.Is(err, lock.ErrConflict) {
		return // nothing was done
	}
	v.history.add(client, began, in, view{value, version}, time.Since(v.history.start), err)
}

// Update appends mark by u as client.
func (v *Values) Update(ctx context.Context, client int, u *lock.Updater[string], mark string) {
	v.record(client, access{mark}, func() (string, int64, error) {
		return u.Update(ctx, "k", func(s string) (string, error) { return s + mark, nil })
	})
}

// Load reads r as client.
func (v *Values) Load(ctx context.Context, client int, r lock.Register[string]) {
	v.record(client, access{}, func() (string, int64, error) { return r.Load(ctx, "k") })
}
