// Package sagatest is the conformance suite of the saga package: what every
// [saga.Store] must keep, by itself and under a [saga.Runner]. It also checks
// that a definition can go on with recorded instances: see [Replay].
package sagatest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/saga"
)

// TestStore checks a store. open returns a fresh, empty one for each subtest.
func TestStore(t *testing.T, open func(t *testing.T) saga.Store) {
	for _, c := range []struct {
		name string
		test func(*testing.T, saga.Store)
	}{
		{"Content", testContent},
		{"CreateOnce", testCreateOnce},
		{"OneOfManyCreates", testOneOfManyCreates},
		{"TakesWhatIsDue", testTakesWhatIsDue},
		{"TakesWhatItKnows", testTakesWhatItKnows},
		{"OneOfManyTakes", testOneOfManyTakes},
		{"DeadRunner", testDeadRunner},
		{"Fence", testFence},
		{"FenceOfRelease", testFenceOfRelease},
		{"Waits", testWaits},
		{"SignalBeforeTheWait", testSignalBeforeTheWait},
		{"CancelBeforeTheWait", testCancelBeforeTheWait},
		{"Leave", testLeave},
		{"Edit", testEdit},
		{"List", testList},
		{"Sample", testSample},
		{"CancelledContext", testCancelledContext},

		{"Forward", testForward},
		{"UndoIsOnRecordBeforeDo", testUndoIsOnRecord},
		{"RefusedStepIsNotUndone", testRefused},
		{"UnknownStepIsUndone", testUnknown},
		{"FailedAttemptsAreForgotten", testForgotten},
		{"Pivot", testPivot},
		{"PivotUnknown", testPivotUnknown},
		{"AfterThePivot", testAfterThePivot},
		{"CompensationStuck", testCompensationStuck},
		{"Parallel", testParallel},
		{"ParallelFailure", testParallelFailure},
		{"ParallelConflict", testParallelConflict},
		{"Sleep", testSleep},
		{"Await", testAwait},
		{"AwaitDeadline", testAwaitDeadline},
		{"Again", testAgain},
		{"CancelRunning", testCancelRunning},
		{"CancelWaiting", testCancelWaiting},
		{"CancelAtThePivot", testCancelAtThePivot},
		{"PanicIsIsolated", testPanic},
		{"PoisonBlocksNobody", testPoison},
		{"StartOnce", testStartOnce},
		{"Takeover", testTakeover},
		{"ZombieStopsBeforeTheTakeover", testZombie},
		{"DrainHandsOver", testDrain},
		{"DyingRunners", testDyingRunners},
		{"Versions", testVersions},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

// Replay checks that a definition can go on with every instance in the .json
// files of recorded: what saga.Runner.Get returned of instances that older
// versions had under way, as JSON. Keep such files from each version that is
// still in use, and a change that would leave its instances stuck shows itself
// in a test.
func Replay[S any](t *testing.T, s *saga.Saga[S], recorded fs.FS) {
	t.Helper()
	names, err := fs.Glob(recorded, "*.json")
	if err != nil {
		t.Fatal(err)
	}
	if len(names) == 0 {
		t.Fatal("sagatest: Replay was given no .json files")
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			b, err := fs.ReadFile(recorded, name)
			if err != nil {
				t.Fatal(err)
			}
			var in saga.Instance
			if err := json.Unmarshal(b, &in); err != nil {
				t.Fatal(err)
			}
			if err := s.Check(in); err != nil {
				t.Error(err)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want one that wraps %q", err, want)
	}
}

// eventually polls until ok or the test's patience ends.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("still waiting for %s after 30 s", what)
}

// quick makes runners notice things soon.
func quick() *saga.Options {
	return &saga.Options{
		Lease: 2 * time.Second, Poll: 20 * time.Millisecond, DrainTimeout: 5 * time.Second,
		Logger: slog.New(slog.DiscardHandler),
	}
}

var hasty = &saga.StepOptions{RetryBase: time.Millisecond, RetryMax: 5 * time.Millisecond, MaxAttempts: 3, UndoMaxAttempts: 3}

// run runs a runner until the returned function is called, which waits for it.
func run(t *testing.T, store saga.Store, opts *saga.Options, sagas ...saga.Definition) (r *saga.Runner, stop func()) {
	t.Helper()
	r = saga.NewRunner(store, sagas, opts)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run after a clean drain = %v, want nil", err)
		}
	})
	t.Cleanup(stop)
	return r, stop
}

func settled(t *testing.T, r *saga.Runner, id string, want saga.Status) saga.Instance {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	in, err := r.Wait(ctx, id)
	must(t, err)
	if in.Status != want {
		t.Fatalf("%s is %s, want %s; cause %q, reason %q, steps %+v", id, in.Status, want, in.Cause, in.Reason, in.Steps)
	}
	return in
}

// S is the state of the sagas of the suite.
type S struct {
	A, B, C int
	M       map[string]int
}

// A journal notes what steps do, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) all() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append([]string(nil), j.lines...)
}

func (j *journal) want(t *testing.T, lines ...string) {
	t.Helper()
	if got := j.all(); fmt.Sprint(got) != fmt.Sprint(lines) {
		t.Errorf("what was done: %q\nwant: %q", got, lines)
	}
}

func (j *journal) do(name string, errs ...error) saga.Func[S] {
	var mu sync.Mutex
	return func(context.Context, *S) error {
		mu.Lock()
		defer mu.Unlock()
		if len(errs) > 0 {
			err := errs[0]
			errs = errs[1:]
			if err != nil {
				j.add("%s fails", name)
				return err
			}
		}
		j.add("%s", name)
		return nil
	}
}

func (j *journal) undo(name string, errs ...error) saga.Func[S] { return j.do("undo "+name, errs...) }
