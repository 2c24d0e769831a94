package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ashlar-go/ashlar/examples/payments/client"
	"github.com/ashlar-go/ashlar/examples/payments/gatewaysim"
	"github.com/ashlar-go/ashlar/examples/payments/payment"
)

// A purchase is one intended payment and what its customer does.
type purchase struct {
	request    client.Request
	copies     int  // requests with the same key at the same time
	later      bool // repeats the request when all is answered
	impatient  bool // gives up early the first time, and repeats
	misuse     bool // uses the key once more for another amount
	secondCard bool // pays with another card when declined
}

var points = []string{payment.AfterInitiated, payment.AfterGateway, payment.AfterCommit}

// plan is the day that seed makes of n payments. The same seed makes the same
// plan; how its requests meet is up to the machine.
func plan(n int, seed uint64) []purchase {
	rng := rand.New(rand.NewPCG(seed, 0))
	outcomes := []struct {
		token  string
		weight int
	}{
		{gatewaysim.OK, 74},
		{gatewaysim.Decline, 10},
		{gatewaysim.TimeoutBefore, 2},
		{gatewaysim.TimeoutAfter, 4},
		{gatewaysim.TimeoutLate, 2},
		{gatewaysim.Crash, 3},
		{gatewaysim.CrashBefore, 2},
		{gatewaysim.ErrorAfter, 3},
	}
	currencies := []string{"EUR", "EUR", "EUR", "USD", "USD", "JPY", "KWD", "CLF"}
	methods := []string{"card", "card", "paypal", "wallet", "gift_card"}
	day := make([]purchase, n)
	for i := range day {
		pick, token := rng.IntN(100), ""
		for _, o := range outcomes {
			if pick -= o.weight; pick < 0 {
				token = o.token
				break
			}
		}
		p := purchase{request: client.Request{
			IdempotencyKey: fmt.Sprintf("day%d-%d", seed, i), OrderID: fmt.Sprintf("order%d-%d", seed, i),
			Amount: 1 + rng.Int64N(500_000), Token: token,
			Currency: currencies[rng.IntN(len(currencies))], Method: methods[rng.IntN(len(methods))],
		}, copies: 1}
		if rng.IntN(100) < 15 {
			p.copies = 2 + rng.IntN(5)
		}
		p.later = rng.IntN(100) < 10
		p.impatient = rng.IntN(100) < 5
		p.misuse = rng.IntN(100) < 3
		p.secondCard = rng.IntN(100) < 50
		day[i] = p
	}
	return day
}

// A scenario is a day of purchases under way.
type scenario struct {
	w    *world
	out  io.Writer
	live bool // out is a terminal: one line of progress is written over
	api  *client.Client
	rash *client.Client

	crashes int // that are planned

	done, requests, replayed, refused, secondCards atomic.Int64

	mu   sync.Mutex
	errs []string
}

// play runs the day, waits until nothing is on its way, prints the
// reconciliation and returns an error unless the three books are equal.
func (w *world) play(ctx context.Context, out io.Writer, live bool, n int, seed uint64) error {
	s := &scenario{
		w: w, out: out, live: live,
		api:  client.New(w.url, &client.Options{Retries: 60}),
		rash: client.New(w.url, &client.Options{Retries: -1, Timeout: 20 * time.Millisecond}),
	}
	fmt.Fprintf(out, "A day of %d payments, seed %d: declines, gateway time-outs before and after the charge,\nbroken connections, duplicates, impatient clients; the service is killed on the way.\n\n", n, seed)
	start := time.Now()
	day := plan(n, seed)
	s.crashes = min(max(3, n/50), n/10)
	kills := make([]string, n) // spread over the day, and over the points in turn
	for c := range s.crashes {
		kills[(2*c+1)*n/(2*s.crashes)] = points[c%len(points)]
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if point := kills[i]; point != "" {
					w.kill(point)
				}
				s.buy(ctx, day[i])
				s.done.Add(1)
			}
		})
	}
	stop := s.progress(n)
	wg.Wait()
	stop()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	paid := time.Since(start)
	b, err := s.drain(ctx)
	if err != nil {
		return err
	}
	return s.report(ctx, b, paid, time.Since(start)-paid)
}

func (s *scenario) fail(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.errs = append(s.errs, fmt.Sprintf(format, args...))
}

func (s *scenario) buy(ctx context.Context, p purchase) {
	if p.impatient {
		s.requests.Add(1)
		_, _ = s.rash.Pay(ctx, p.request) // does not wait for the answer
	}
	answers := make([]*client.Payment, p.copies)
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() { answers[i] = s.pay(ctx, p.request) })
	}
	wg.Wait()
	for _, a := range answers {
		if a == nil {
			return // said already
		}
		if a.ID != answers[0].ID {
			s.fail("two payments for one key: %s and %s", a.ID, answers[0].ID)
		}
	}
	if p.later {
		if a := s.pay(ctx, p.request); a != nil && (a.ID != answers[0].ID || !a.Replayed) {
			s.fail("a repetition made another payment: %s", a.ID)
		}
	}
	if p.misuse {
		r := p.request
		r.Amount++
		s.requests.Add(1)
		_, err := s.api.Pay(ctx, r)
		var refusal *client.Error
		if !errors.As(err, &refusal) || refusal.Status != 422 {
			s.fail("a key for another amount was not refused: %v", err)
		} else {
			s.refused.Add(1)
		}
	}
	if p.secondCard && answers[0].State == client.Declined {
		r := p.request
		r.IdempotencyKey, r.Token = r.IdempotencyKey+"-second", gatewaysim.OK
		s.secondCards.Add(1)
		s.pay(ctx, r)
	}
}

func (s *scenario) pay(ctx context.Context, r client.Request) *client.Payment {
	s.requests.Add(1)
	a, err := s.api.Pay(ctx, r)
	if err != nil {
		if ctx.Err() == nil {
			s.fail("%s: %v", r.IdempotencyKey, err)
		}
		return nil
	}
	if a.Replayed {
		s.replayed.Add(1)
	}
	return a
}

// progress writes how far the day is until the returned function is called.
func (s *scenario) progress(n int) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	say := func() {
		crashes, _ := s.w.crashCount()
		text := fmt.Sprintf("%5d of %d payments, %d requests, %d answered from the record, %d crashes",
			s.done.Load(), n, s.requests.Load(), s.replayed.Load(), crashes)
		if s.live {
			fmt.Fprintf(s.out, "\r%-78s", text)
		} else {
			fmt.Fprintln(s.out, text)
		}
	}
	every := 2 * time.Second
	if s.live {
		every = 100 * time.Millisecond
	}
	go func() {
		defer close(ended)
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				say()
			case <-done:
				say()
				if s.live {
					fmt.Fprintln(s.out)
				}
				return
			}
		}
	}()
	return func() { close(done); <-ended }
}

// drain waits until the books are equal and nothing is on its way; if nothing
// has moved for a minute, it gives up and returns them as they are.
func (s *scenario) drain(ctx context.Context) (*books, error) {
	fmt.Fprintln(s.out, "The day is over. Waiting for what is on its way...")
	last, since := "", time.Now()
	for {
		b, err := readBooks(ctx, s.w.pool, s.w.sim)
		if err != nil {
			return nil, err
		}
		now := fmt.Sprint(b.open, b.outbox.Pending, b.lines)
		if now != last {
			last, since = now, time.Now()
		}
		if b.equal() || b.outbox.Dead > 0 || time.Since(since) > time.Minute {
			return b, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (s *scenario) report(ctx context.Context, b *books, paid, drained time.Duration) error {
	states := make(map[string]int)
	rows, err := s.w.pool.Query(ctx, `SELECT state, count(*) FROM payment GROUP BY state`)
	if err != nil {
		return err
	}
	var state string
	var n int
	for rows.Next() {
		if err := rows.Scan(&state, &n); err != nil {
			return err
		}
		states[state] = n
	}
	if err := rows.Err(); err != nil {
		return err
	}
	crashes, at := s.w.crashCount()
	twice := 0
	for _, e := range s.w.sim.Book() {
		if e.Asked > 1 {
			twice++
		}
	}
	fmt.Fprintf(s.out, "\n%d payments authorized, %d declined (%d of them followed by a second card), in %.1f s and %.1f s to drain\n",
		states["AUTHORIZED"], states["DECLINED"], s.secondCards.Load(), paid.Seconds(), drained.Seconds())
	fmt.Fprintf(s.out, "%d requests, %d answered from the record, %d refused for reuse of a key; charges asked for twice: %d\n",
		s.requests.Load(), s.replayed.Load(), s.refused.Load(), twice)
	fmt.Fprintf(s.out, "%d crashes of the service:", crashes)
	for i, p := range points {
		fmt.Fprintf(s.out, "%s %d %s", map[bool]string{true: ",", false: ""}[i > 0], at[p], p)
	}
	fmt.Fprint(s.out, "\n\n")
	b.print(s.out)
	for _, e := range s.errs {
		fmt.Fprintln(s.out, "ERROR", e)
	}
	switch {
	case len(s.errs) > 0:
		return fmt.Errorf("%d requests had a wrong answer", len(s.errs))
	case twice > 0:
		return fmt.Errorf("%d charges were asked for twice", twice)
	case crashes < s.crashes:
		return fmt.Errorf("only %d of %d crashes landed: the day proves less than it should", crashes, s.crashes)
	case !b.settled():
		return errors.New("something is still pending")
	case !b.equal():
		return errors.New("the books differ")
	}
	fmt.Fprintln(s.out, strings.Repeat("=", 64)+"\nThe three books are equal: gateway = ledger = orders.")
	return nil
}
