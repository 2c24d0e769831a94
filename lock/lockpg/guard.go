package lockpg

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/lock"
)

// Guard makes tx one that only the holder of lease can commit. It fails with an
// error that wraps [lock.ErrLost] unless, by the database's clock, the lease is
// held; tx must then be rolled back. Otherwise no other can take one of its keys
// before tx has ended, however long the process that runs it is stopped: whatever
// tx writes is written before the next holder begins.
//
// The lease must be one of a [Store] on the same database. Call Guard anywhere in
// the transaction, at the cost of one round trip; a pgx.Batch may carry
// [GuardSQL] instead. It does not keep the lease from being extended or released.
// In the isolation levels above READ COMMITTED it may fail with a serialization
// failure, after which the transaction is to be tried again.
//
// A transaction that stays open keeps its keys from passing on: in a service
// whose processes may stop for long, set idle_in_transaction_session_timeout.
func Guard(ctx context.Context, tx pgx.Tx, lease *lock.Lease) error {
	if err := lease.Err(); err != nil {
		return fmt.Errorf("lockpg: guard: %w", err)
	}
	tag, err := tx.Exec(ctx, GuardSQL, lease.Keys(), lease.Owner())
	if err == nil && int(tag.RowsAffected()) != len(lease.Keys()) {
		err = lock.ErrLost
	}
	return wrap("guard", err)
}

// GuardSQL is the statement of [Guard], with the lease's keys and owner as its
// arguments. It must find as many rows as the lease has keys, or else the lease is
// lost.
//
// The lock it takes on the rows is the one that their takeover conflicts with and
// their extension does not.
const GuardSQL = `SELECT FROM lock_lease WHERE key = ANY ($1::text[]) AND owner = $2 AND expires_at > clock_timestamp() ORDER BY key FOR KEY SHARE`

// Fence refuses a token that is lower than one it has seen for resource, with an
// error that wraps [lock.ErrLost]; tx must then be rolled back. It is for leases
// that are held elsewhere, such as in Redis. Transactions of one resource that
// call it wait for one another.
//
// It promises order, and no more: once a later holder's transaction has called
// Fence, no earlier holder's can commit. Until then an earlier one may, although
// its lease has ended; that is as far as a token goes. Where a later holder must
// not begin before, use [Guard] with a lease in the same database.
func Fence(ctx context.Context, tx pgx.Tx, resource string, token int64) error {
	tag, err := tx.Exec(ctx, `
INSERT INTO lock_fence AS f (resource, token) VALUES ($1, $2)
ON CONFLICT (resource) DO UPDATE SET token = excluded.token WHERE f.token <= excluded.token`, resource, token)
	if err == nil && tag.RowsAffected() == 0 {
		err = fmt.Errorf("%w: %q has seen a token later than %d", lock.ErrLost, resource, token)
	}
	return wrap("fence", err)
}
