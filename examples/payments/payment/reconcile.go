package payment

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/examples/payments/gateway"
)

// reconcileBatch is how many payments are taken at once, reconcileWorkers how
// many of them are asked for at the same time.
const (
	reconcileBatch   = 100
	reconcileWorkers = 8
)

// Run reconciles at once and then every [Options].Every until ctx ends, and
// returns nil.
func (s *Service) Run(ctx context.Context) error {
	ticker := time.NewTicker(s.opts.Every)
	defer ticker.Stop()
	for {
		if _, err := s.Reconcile(ctx); err != nil && ctx.Err() == nil {
			s.opts.Logger.WarnContext(ctx, "reconciliation failed", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

type unsettled struct {
	Payment
	age time.Duration // of the payment when it was taken up, by the database's clock
}

// Reconcile asks the gateway, by our reference, for every payment that is
// pending verification or was left INITIATED by a crash, and returns how many
// were settled. Several may run at the same time: they share the work.
func (s *Service) Reconcile(ctx context.Context) (settled int, err error) {
	for {
		batch, err := s.take(ctx)
		if err != nil {
			return settled, err
		}
		var wg sync.WaitGroup
		var mu sync.Mutex
		var errs []error
		slots := make(chan struct{}, reconcileWorkers)
		for _, u := range batch {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				done, err := s.verify(ctx, u)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					errs = append(errs, err)
				}
				if done {
					settled++
				}
			})
		}
		wg.Wait()
		if len(errs) > 0 || len(batch) < reconcileBatch {
			return settled, errors.Join(errs...)
		}
	}
}

// take picks payments that are due, and moves their next check beyond the time
// that this one may take, so that nobody else picks them meanwhile.
func (s *Service) take(ctx context.Context) ([]unsettled, error) {
	rows, err := s.pool.Query(ctx, `WITH due AS (
			SELECT id AS due_id FROM payment WHERE state IN ('INITIATED', 'PENDING_VERIFICATION') AND next_check_at <= now()
			ORDER BY next_check_at LIMIT $1 FOR UPDATE SKIP LOCKED)
		UPDATE payment SET next_check_at = now() + $2::interval FROM due WHERE id = due_id
		RETURNING id::text, state, amount, currency, attempt_id::text, extract(epoch FROM clock_timestamp() - created_at)::float8`,
		reconcileBatch, 2*s.gateway.Timeout())
	if err != nil {
		return nil, fmt.Errorf("payment: reconcile: %w", err)
	}
	batch, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (u unsettled, err error) {
		var age float64
		err = row.Scan(&u.ID, &u.State, &u.Amount, &u.Currency, &u.attemptID, &age)
		u.age = time.Duration(age * float64(time.Second))
		return u, err
	})
	if err != nil {
		return nil, fmt.Errorf("payment: reconcile: %w", err)
	}
	return batch, nil
}

// verify settles u if the gateway knows what became of it.
func (s *Service) verify(ctx context.Context, u unsettled) (settled bool, err error) {
	result, err := s.gateway.Lookup(ctx, u.attemptID, u.Amount, u.Currency)
	if ctx.Err() != nil {
		return false, nil //nolint:nilerr // the service is stopping; the next run asks again
	}
	o := outcomeOf(result, err)
	// Not found is an answer only when the request cannot arrive any more: it
	// left at most one time-out after the payment was stored, and was given up
	// at most one later.
	if errors.Is(err, gateway.ErrNotFound) && u.age > s.opts.Window+2*s.gateway.Timeout() {
		o = outcome{to: Declined, reason: "never_reached_the_gateway"}
	}
	p, err := s.settle(ctx, u.ID, o)
	if err != nil {
		return false, err
	}
	return p.State == Authorized || p.State == Declined, nil
}
