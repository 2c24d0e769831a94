package idempotencypg

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var errNotYours = errors.New("idempotencypg: DoTx commits or rolls back when its work has returned")

// A transaction is the pgx.Tx of work whose BEGIN and COMMIT travel in batches,
// which those of pgx's own cannot.
type transaction struct {
	pgx.Tx // nil: keeps the type whole should pgx add methods to the interface
	conn   *pgx.Conn
	joined pgx.Tx // pgx's own on the same connection, once it is needed
	closed bool
}

var _ pgx.Tx = (*transaction)(nil)

// join returns pgx's own transaction object, for savepoints and large objects.
func (t *transaction) join(ctx context.Context) (pgx.Tx, error) {
	if t.closed {
		return nil, pgx.ErrTxClosed
	}
	if t.joined == nil {
		joined, err := t.conn.BeginTx(ctx, pgx.TxOptions{BeginQuery: "SELECT"}) // begun already
		if err != nil {
			return nil, err
		}
		t.joined = joined
	}
	return t.joined, nil
}

// Begin starts a savepoint.
func (t *transaction) Begin(ctx context.Context) (pgx.Tx, error) {
	tx, err := t.join(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Begin(ctx)
}

func (t *transaction) Commit(context.Context) error   { return errNotYours }
func (t *transaction) Rollback(context.Context) error { return errNotYours }
func (t *transaction) Conn() *pgx.Conn                { return t.conn }

func (t *transaction) LargeObjects() pgx.LargeObjects {
	tx, err := t.join(context.Background())
	if err != nil {
		panic("idempotencypg: LargeObjects: " + err.Error()) // has no way to return it
	}
	return tx.LargeObjects()
}

func (t *transaction) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	if t.closed {
		return pgconn.CommandTag{}, pgx.ErrTxClosed
	}
	return t.conn.Exec(ctx, sql, args...)
}

func (t *transaction) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if t.closed {
		return nil, pgx.ErrTxClosed
	}
	return t.conn.Query(ctx, sql, args...)
}

func (t *transaction) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if t.closed {
		return closedTx{}
	}
	return t.conn.QueryRow(ctx, sql, args...)
}

func (t *transaction) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if t.closed {
		return nil, pgx.ErrTxClosed
	}
	return t.conn.Prepare(ctx, name, sql)
}

func (t *transaction) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	if t.closed {
		return 0, pgx.ErrTxClosed
	}
	return t.conn.CopyFrom(ctx, table, columns, src)
}

func (t *transaction) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if t.closed {
		return closedBatch{}
	}
	return t.conn.SendBatch(ctx, b)
}

// closedTx and closedBatch answer what has no error to return.
type closedTx struct{}

func (closedTx) Scan(...any) error { return pgx.ErrTxClosed }

type closedBatch struct{ pgx.BatchResults }

func (closedBatch) Exec() (pgconn.CommandTag, error) { return pgconn.CommandTag{}, pgx.ErrTxClosed }
func (closedBatch) Query() (pgx.Rows, error)         { return nil, pgx.ErrTxClosed }
func (closedBatch) QueryRow() pgx.Row                { return closedTx{} }
func (closedBatch) Close() error                     { return pgx.ErrTxClosed }
