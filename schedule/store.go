package schedule

import (
	"context"
	"time"
)

// A Plan is a schedule and where it stands.
type Plan struct {
	Definition
	Version int64     // rises with every change of the definition
	Next    time.Time // the first tick that is not decided; zero where none was planned yet
	Since   time.Time // then the ticks are those after it
}

// A Decision is what is to become of the ticks of a schedule up to a moment.
type Decision struct {
	Name    string
	Version int64     // of the plan that it was made from
	From    time.Time // and its Next
	Next    time.Time // the new one; zero means that there will be no more ticks
	NextDue time.Time // and when it is to run
	Ticks   []Tick    // to be run, in order
	Missed  int       // ticks that are not
}

// A Tick is one to be run.
type Tick struct {
	ID     string // of its run
	At     time.Time
	Due    time.Time
	Missed int  // ticks before it that are not run
	Late   bool // missed, and run all the same: never skipped by the overlap policy
}

// A ClaimRequest is what a runner asks for.
type ClaimRequest struct {
	Instance    string
	Handlers    []string // that it has
	Decisions   []Decision
	Slots       int           // how many runs it can start
	PerSchedule int           // how many of one schedule, in one claim
	Busy        []string      // schedules of which it can start none
	Lease       time.Duration // how long the runs are its own
	Ahead       time.Duration // which plans it wants to know: those due within
	Unknown     []string      // schedules of which it wants to know none
}

// A Claim answers a [ClaimRequest].
type Claim struct {
	Runs  []Run
	Plans []Plan    // of schedules that are not paused, the earliest first; at most 1000
	Next  time.Time // when a waiting run is due or a lease ends that is not the instance's; zero if none
	Now   time.Time // the store's clock

	// Again tells that the decisions were carried out and nothing else was done:
	// the rest is in the answer to a request without any. So a store may have
	// ticks start without waiting for the rest.
	Again bool
}

// A Ref names one attempt of a run.
type Ref struct {
	ID      string
	Attempt int
}

// An Outcome is how an attempt ended.
type Outcome struct {
	State   State         // Done, Failed or Lost; Waiting to have it run again
	Err     string        // what failed; with Waiting: empty if the attempt does not count as a failure
	RetryIn time.Duration // with Waiting: after that
}

// A Store keeps definitions and runs, for a [Runner]. Only its own clock decides
// what is due and what has expired. It is safe for concurrent use by many
// processes. Those who define schedules use the methods of a concrete store,
// such as schedulepg's.
type Store interface {
	// Claim first carries the decisions out. One is carried out if the schedule
	// is as its plan said and all its ticks are due; else it is ignored. Each
	// tick becomes one row, unless it has one: of any number of claims, one makes
	// it. The overlap policy says in which state.
	//
	// Then Claim grants runs: ticks that became one now and, unless it says
	// Again, waiting runs that are due and runs whose lease has ended. Each grant raises the run's Attempt. An
	// expired run that must not be repeated becomes Lost.
	Claim(ctx context.Context, req ClaimRequest) (Claim, error)

	// Extend makes the runs last for lease from now on. It returns those that
	// were extended and those that are lost; a run that is just being finished
	// is in neither.
	Extend(ctx context.Context, runs []Ref, lease time.Duration) (kept, lost []Ref, err error)

	// Finish records how an attempt ended. It wraps ErrLeaseLost unless the run
	// is claimed by it, or ended by it in the same way. More reports whether
	// another run of the schedule waits for this moment.
	Finish(ctx context.Context, run Ref, o Outcome) (more bool, err error)

	// Prune removes at most limit runs that ended longer than keep ago, but never
	// the last of a schedule, and returns how many it removed.
	Prune(ctx context.Context, keep time.Duration, limit int) (int, error)
}
