package lockpg

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/lock"
)

// A Sender sends batches: a *pgxpool.Pool, a *pgx.Conn or a pgx.Tx.
type Sender interface {
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
}

// A Query is a statement and its arguments.
type Query struct {
	SQL  string
	Args []any
}

// UpdateVersion runs update, which changes a row if it is of the expected version
// and returns the new one, as in
//
//	UPDATE item SET name = $3, version = version + 1 WHERE id = $1 AND version = $2 RETURNING version
//
// and returns that version. If it changes none, the error is a
// [lock.ConflictError] with what current finds:
//
//	SELECT version FROM item WHERE id = $1
//
// Further columns of current are scanned into dest, which on success is left as it
// was. Both statements travel together: it costs one round trip either way. In
// READ COMMITTED current sees what update had to wait for; one statement with both
// would not. update may be an INSERT that does nothing on a conflict; the expected
// version is then 0.
//
// Outside of a transaction, an error of the connection leaves unknown whether the
// row was changed.
func UpdateVersion(ctx context.Context, db Sender, expected int64, update, current Query, dest ...any) (version int64, err error) {
	var batch pgx.Batch
	batch.Queue(update.SQL, update.Args...)
	batch.Queue(current.SQL, current.Args...)
	results := db.SendBatch(ctx, &batch)
	err = results.QueryRow().Scan(&version)
	if errors.Is(err, pgx.ErrNoRows) {
		conflict := &lock.ConflictError{Expected: expected, Exists: true}
		err = results.QueryRow().Scan(append([]any{&conflict.Version}, dest...)...)
		if errors.Is(err, pgx.ErrNoRows) {
			conflict.Exists, err = false, nil
		}
		if err == nil {
			err = conflict
		}
	}
	// The error of Close is that of a commit.
	if closed := results.Close(); closed != nil && (err == nil || errors.Is(err, lock.ErrConflict)) {
		err = closed
	}
	if err != nil {
		return 0, wrapVersion("update", err)
	}
	return version, nil
}

// Rows is a [lock.Register] of rows that have a version column: what a
// lock.Updater needs to change them. Load costs one round trip, Store one, also
// when it conflicts. It is safe for concurrent use.
type Rows[T any] struct {
	DB Querier // required
	// Select reads the version and then the columns of the row with the key $1, as in
	// SELECT version, name, price FROM item WHERE id = $1. Required.
	Select string
	// Update changes the row with the key $1 if it is of the version $2, and returns
	// the new version; the columns are $3 and on. As in UPDATE item SET version =
	// version + 1, name = $3, price = $4 WHERE id = $1 AND version = $2 RETURNING
	// version. Required.
	Update string
	// Columns returns pointers to what the columns are scanned into and written from,
	// in the order of the statements. Required.
	Columns func(v *T) []any
}

// A Querier is a [Sender] that also reads rows.
type Querier interface {
	Sender
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Load implements [lock.Register]. Of a row that is not there, the error wraps
// pgx.ErrNoRows.
func (r Rows[T]) Load(ctx context.Context, key string) (value T, version int64, err error) {
	err = r.DB.QueryRow(ctx, r.Select, key).Scan(append([]any{&version}, r.Columns(&value)...)...)
	return value, version, wrapVersion("load", err)
}

// Store implements [lock.Register].
func (r Rows[T]) Store(ctx context.Context, key string, value T, version int64) (int64, error) {
	var now T
	version, err := UpdateVersion(ctx, r.DB, version,
		Query{r.Update, append([]any{key, version}, r.Columns(&value)...)}, Query{r.Select, []any{key}}, r.Columns(&now)...)
	if conflict := (*lock.ConflictError)(nil); errors.As(err, &conflict) && conflict.Exists {
		conflict.Current = now
	}
	return version, err
}

// wrapVersion is wrap for tables of the caller.
func wrapVersion(op string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("lockpg: %s: %w", op, err)
}
