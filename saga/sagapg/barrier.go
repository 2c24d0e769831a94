package sagapg

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/saga"
)

const insertBarrier = `INSERT INTO saga_barrier (saga, step, undo) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`

// Barrier is for those who take part in a saga: call it first in the transaction
// that does what a call asks for, and do it only if ok is true. The call is
// [saga.CurrentCall] of the step, passed on. Then, whatever is repeated, late or
// lost on the way,
//
//   - a step takes effect once, and so does its compensation;
//   - a compensation whose step has not taken effect does nothing;
//   - a step that comes after its compensation does nothing.
//
// The marks are committed with the effect; two calls at the same time wait for
// each other. The participant's database has the tables of [Migrate]. The
// pattern is dtm's sub-transaction barrier.
func Barrier(ctx context.Context, tx pgx.Tx, call saga.Call) (ok bool, err error) {
	if !call.Compensating {
		tag, err := tx.Exec(ctx, insertBarrier, call.Saga, call.Step, false)
		return tag.RowsAffected() == 1, wrap("barrier", err)
	}
	// The compensation takes the step's place first: one that is under way is
	// waited for, one that comes later is refused.
	never, err := tx.Exec(ctx, insertBarrier, call.Saga, call.Step, false)
	if err != nil {
		return false, wrap("barrier", err)
	}
	first, err := tx.Exec(ctx, insertBarrier, call.Saga, call.Step, true)
	return never.RowsAffected() == 0 && first.RowsAffected() == 1, wrap("barrier", err)
}
