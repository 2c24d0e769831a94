// Package pgtx is a pgx.Tx for work within a transaction whose BEGIN and COMMIT
// are sent by its owner, in batches with statements of the owner's own.
package pgtx

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var errNotYours = errors.New("the transaction is committed or rolled back by its owner when the work has returned")

// A Tx is the pgx.Tx of work whose BEGIN and COMMIT travel in batches, which
// those of pgx's own cannot.
type Tx struct {
	pgx.Tx // nil: keeps the type whole should pgx add methods to the interface
	conn   *pgx.Conn
	joined pgx.Tx // pgx's own on the same connection, once it is needed
	closed bool
}

var _ pgx.Tx = (*Tx)(nil)

// New returns the transaction that conn is in.
func New(conn *pgx.Conn) *Tx { return &Tx{conn: conn} }

// Close makes every use from now on fail. It sends nothing.
func (t *Tx) Close() { t.closed = true }

// join returns pgx's own transaction object, for savepoints and large objects.
func (t *Tx) join(ctx context.Context) (pgx.Tx, error) {
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
func (t *Tx) Begin(ctx context.Context) (pgx.Tx, error) {
	tx, err := t.join(ctx)
	if err != nil {
		return nil, err
	}
	return tx.Begin(ctx)
}

func (t *Tx) Commit(context.Context) error   { return errNotYours }
func (t *Tx) Rollback(context.Context) error { return errNotYours }
func (t *Tx) Conn() *pgx.Conn                { return t.conn }

func (t *Tx) LargeObjects() pgx.LargeObjects {
	tx, err := t.join(context.Background())
	if err != nil {
		panic("pgtx: LargeObjects: " + err.Error()) // has no way to return it
	}
	return tx.LargeObjects()
}

func (t *Tx) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	if t.closed {
		return pgconn.CommandTag{}, pgx.ErrTxClosed
	}
	return t.conn.Exec(ctx, sql, args...)
}

func (t *Tx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if t.closed {
		return nil, pgx.ErrTxClosed
	}
	return t.conn.Query(ctx, sql, args...)
}

func (t *Tx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if t.closed {
		return closedTx{}
	}
	return t.conn.QueryRow(ctx, sql, args...)
}

func (t *Tx) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if t.closed {
		return nil, pgx.ErrTxClosed
	}
	return t.conn.Prepare(ctx, name, sql)
}

func (t *Tx) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	if t.closed {
		return 0, pgx.ErrTxClosed
	}
	return t.conn.CopyFrom(ctx, table, columns, src)
}

func (t *Tx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
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
