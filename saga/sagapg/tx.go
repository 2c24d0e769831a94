package sagapg

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtx"
	"github.com/ashlar-go/ashlar/saga"
	"github.com/ashlar-go/ashlar/saga/internal/execution"
)

// Tx makes a step, or a compensation, one transaction with its checkpoint: what f
// does through tx, and that it is done, are committed together, once. Use it for
// steps on the database that the sagas are in; an outbox message may be appended
// in the same transaction.
//
//	Step("order", sagapg.Tx(pool, createOrder), sagapg.Tx(pool, cancelOrder), nil)
//
// The transaction is READ COMMITTED; Tx ends it. If f fails or the process dies,
// nothing has happened. If the runner has lost the saga, the transaction is
// rolled back. BEGIN travels with the first statement of f and
// the checkpoint with COMMIT, which saves a round trip. f must
// not take another connection of the same pool.
func Tx[S any](pool *pgxpool.Pool, f func(ctx context.Context, tx pgx.Tx, state *S) error) saga.Func[S] {
	return func(ctx context.Context, state *S) error {
		step := execution.From(ctx)
		if step == nil {
			return errors.New("sagapg: Tx outside of a saga")
		}
		conn, err := pool.Acquire(ctx)
		if err != nil {
			return wrap("acquire", err)
		}
		defer conn.Release()
		tx := pgtx.Lazy(conn.Conn(), `BEGIN ISOLATION LEVEL READ COMMITTED`)
		committed := false
		defer func() {
			tx.Close()
			if !committed && tx.Pending() == "" && !conn.Conn().IsClosed() {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
				defer cancel()
				// A connection that this does not clean up is closed by its release.
				_, _ = conn.Exec(ctx, `ROLLBACK`)
			}
		}()
		if err := f(ctx, tx, state); err != nil {
			return err
		}
		c, err := step.Prepare()
		if err != nil {
			return err
		}
		err = commit(ctx, conn.Conn(), tx.Pending(), step.Runner, c.(saga.Checkpoint))
		committed = err == nil
		step.Done(err)
		return err
	}
}

// commit stores the checkpoint and commits. After an error it is not known
// whether it did, unless the error wraps saga.ErrLeaseLost: then it did not.
func commit(ctx context.Context, conn *pgx.Conn, begin, runner string, c saga.Checkpoint) error {
	var b pgx.Batch
	if begin != "" { // the work has not used the transaction
		b.Queue(begin)
	}
	sql, args := single(runner, &c)
	// Where the saga is no longer the runner's, no row is saved: the division
	// fails, and with it the COMMIT behind it.
	b.Queue(`WITH saved AS (`+sql+`) SELECT 1 / count(*) FROM saved`, args...)
	b.Queue(`COMMIT`)
	results := conn.SendBatch(ctx, &b)
	var tag pgconn.CommandTag
	var err error
	for range b.Len() {
		if tag, err = results.Exec(); err != nil {
			break
		}
	}
	if closed := results.Close(); err == nil {
		err = closed
	}
	switch {
	case code(err) == "22012": // division_by_zero
		err = fmt.Errorf("%w: %w", saga.ErrLeaseLost, err)
	case err == nil && tag.String() != "COMMIT":
		err = pgx.ErrTxCommitRollback
	}
	return wrap("commit", err)
}

// Start starts a saga in the caller's transaction: it is there if tx commits, and
// is then taken up by a runner at its next poll, or when its Wake is called.
// started is false if there was one of that ID before.
func Start[S any](ctx context.Context, tx pgx.Tx, s *saga.Saga[S], id string, state S) (started bool, err error) {
	in, err := s.Instance(id, state)
	if err != nil {
		return false, err
	}
	existing, err := create(ctx, tx, []saga.Instance{in})
	switch {
	case err != nil:
		return false, wrap("start", err)
	case existing[0] == "":
		return true, nil
	case existing[0] != in.Saga:
		return false, fmt.Errorf("%w: %s is of %s", saga.ErrExists, id, existing[0])
	}
	return false, nil
}
