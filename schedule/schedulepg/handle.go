package schedulepg

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/internal/execution"
)

// HandleTx makes a handler of fn, for runners on a [Store] of the same database:
// it calls fn in a transaction and commits that with the record that the run is
// done. The transaction is READ COMMITTED, and HandleTx ends it.
//
// What fn does through tx happens exactly once for each tick: rows that it
// writes, outbox messages that it appends, jobs that it enqueues. If fn fails or
// panics, if the process dies or the connection breaks before the COMMIT is on
// disk, nothing has happened, and the run is repeated as its definition says;
// for a crash that is when the lease ends. If the run was taken over meanwhile,
// the transaction is rolled back: HandleTx returns schedule.ErrLeaseLost. An
// error of the COMMIT itself leaves open which of the two it was; the run is
// repeated only if it is not recorded as done.
//
// It needs one connection of pool for as long as fn runs.
func HandleTx(pool *pgxpool.Pool, fn func(ctx context.Context, tx pgx.Tx, run schedule.Run) error) schedule.Handler {
	if pool == nil || fn == nil {
		panic("schedulepg: HandleTx needs a pool and a function")
	}
	return func(ctx context.Context, run schedule.Run) error {
		var more bool
		err := pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, func(tx pgx.Tx) (err error) {
			if err := fn(ctx, tx, run); err != nil {
				return err
			}
			more, err = finish(ctx, tx, schedule.Ref{ID: run.ID, Attempt: run.Attempt}, schedule.Outcome{State: schedule.Done})
			return wrap("finish", err)
		})
		if err == nil && !execution.Recorded(ctx, execution.Record{More: more}) {
			err = fmt.Errorf("schedulepg: the context of run %s is not one that a runner gave", run.ID)
		}
		return err
	}
}
