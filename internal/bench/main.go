// Command bench measures ashlar beside its peers and beside the floor that the
// hardware sets, interleaved in one run, and prints a line for each bar.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"time"
)

const usage = `bench measures ashlar beside its peers and beside the floor, interleaved in one run.

Usage: go run ./internal/bench [flags]

It prints one line for each bar: what is compared, the median ratio, the bar, and
the spread over the rounds. A bar that is not met is reported as short. Without
TEST_POSTGRES_URL and TEST_REDIS_URL it starts the servers that are installed.

Flags:
`

func main() {
	do := run
	if system := os.Getenv(scheduleEnv); system != "" {
		do = func() error { return instance(system) } // a child of J1
	}
	if err := do(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	if plan := os.Getenv(sagaEnv); plan != "" { // of S4
		return sagaChild(plan)
	}
	if plan := os.Getenv(hotEnv); plan != "" { // of LK9
		return hotChild(context.Background(), plan)
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	only := flags.String("only", "", "measure only these `IDs`, comma-separated; default all")
	rounds := flags.Int("rounds", 5, "how many interleaved rounds")
	quick := flags.Bool("quick", false, "small and short: within a minute, for a first impression")
	list := flags.Bool("list", false, "list the IDs")
	flags.DurationVar(&heldFor, "held", 0, "how `long` O7 holds its snapshot; 10m is the full form (default 10s)")
	flags.DurationVar(&stallFor, "stall", 0, "how `long` LK7 looks for stalls in each round; 60s in 100 rounds is the full form (default 10s)")
	flags.DurationVar(&restartsFor, "restarts", 0, "how `long` J1 restarts instances; 5m is the full form (default 20s)")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(os.Args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *list {
		for _, e := range experiments {
			fmt.Printf("%-10s %s\n", strings.Join(e.ids, ","), e.what)
		}
		return nil
	}
	wanted, err := choose(*only)
	if err != nil {
		return err
	}
	if os.Getenv("TEST_POSTGRES_URL") == "" || os.Getenv("TEST_REDIS_URL") == "" {
		return withServers()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, nil)))
	env, err := newEnv(ctx, *quick)
	if err != nil {
		return err
	}
	defer env.close()
	if *quick {
		*rounds = min(*rounds, 2)
	}
	for _, e := range wanted {
		if err := e.measure(ctx, env, *rounds); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(e.ids, ","), err)
		}
	}
	return nil
}

// heldFor is for how long O7 holds its snapshot; zero means its default.
var heldFor time.Duration

// withServers runs this program again with servers started for it.
func withServers() error {
	args := append([]string{"run", "./examples/testenv", "--only", "postgres,redis", "--stack", "local", "--", os.Args[0]}, os.Args[1:]...)
	cmd := exec.Command("go", args...)
	cmd.Stdout, cmd.Stderr, cmd.Stdin = os.Stdout, os.Stderr, os.Stdin
	return cmd.Run()
}

// An experiment measures one or more bars in the same rounds.
type experiment struct {
	ids  []string
	what string
	// round measures once and returns what it found by name. Ratios are formed
	// within a round.
	round func(ctx context.Context, env *env, r *results) error
	bars  []bar
}

// A bar is a goal for a ratio.
type bar struct {
	id, what string
	ratio    func(r *results) float64
	atLeast  float64 // goal, or
	atMost   float64 // goal
	unit     string
}

// results are the measurements of one round.
type results struct{ values map[string]float64 }

func (r *results) set(name string, v float64) { r.values[name] = v }
func (r *results) of(a, b string) float64     { return r.values[a] / r.values[b] }

func choose(only string) ([]experiment, error) {
	if only == "" {
		return experiments, nil
	}
	var out []experiment
	for _, id := range strings.Split(only, ",") {
		i := slices.IndexFunc(experiments, func(e experiment) bool { return slices.Contains(e.ids, id) })
		if i < 0 {
			return nil, fmt.Errorf("no bar %q; see -list", id)
		}
		if !slices.ContainsFunc(out, func(e experiment) bool { return slices.Equal(e.ids, experiments[i].ids) }) {
			out = append(out, experiments[i])
		}
	}
	return out, nil
}

func (e experiment) measure(ctx context.Context, env *env, rounds int) error {
	var all []*results
	for i := range rounds {
		fmt.Fprintf(os.Stderr, "\r\033[K%s round %d of %d", strings.Join(e.ids, ","), i+1, rounds)
		r := &results{values: make(map[string]float64)}
		start := time.Now()
		if err := e.round(ctx, env, r); err != nil {
			return err
		}
		if os.Getenv("BENCH_VERBOSE") != "" {
			fmt.Fprintf(os.Stderr, " %.1fs %v\n", time.Since(start).Seconds(), r.values)
		}
		all = append(all, r)
	}
	fmt.Fprint(os.Stderr, "\r\033[K")
	for _, b := range e.bars {
		b.report(all)
	}
	return nil
}

func (b bar) report(all []*results) {
	var ratios []float64
	for _, r := range all {
		ratios = append(ratios, b.ratio(r))
	}
	slices.Sort(ratios)
	median := ratios[len(ratios)/2]
	if len(ratios)%2 == 0 {
		median = (ratios[len(ratios)/2-1] + ratios[len(ratios)/2]) / 2
	}
	goal, ok := fmt.Sprintf("bar>=%g", b.atLeast), median >= b.atLeast
	if b.atMost > 0 {
		goal, ok = fmt.Sprintf("bar<=%g", b.atMost), median <= b.atMost
	}
	verdict := "ok"
	if !ok {
		verdict = "SHORT"
	}
	unit := b.unit
	if unit == "" {
		unit = "x"
	}
	fmt.Printf("%-3s %s %.3g%s %s %s (min %.3g max %.3g n=%d)\n",
		b.id, b.what, median, unit, goal, verdict, ratios[0], ratios[len(ratios)-1], len(ratios))
}
