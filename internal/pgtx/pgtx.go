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
	begin  string // still to be sent
	joined pgx.Tx // pgx's own on the same connection, once it is needed
	closed bool
}

var _ pgx.Tx = (*Tx)(nil)

// New returns the transaction that conn is in.
func New(conn *pgx.Conn) *Tx { return &Tx{conn: conn} }

// Lazy returns a transaction that is begun, by the given statement, with the
// first one of the work: at no round trip of its own.
func Lazy(conn *pgx.Conn, begin string) *Tx { return &Tx{conn: conn, begin: begin} }

// Pending returns what would still begin the transaction, or "" if it has begun.
func (t *Tx) Pending() string { return t.begin }

// start begins the transaction by itself.
func (t *Tx) start(ctx context.Context) error {
	if t.closed {
		return pgx.ErrTxClosed
	}
	if t.begin == "" {
		return nil
	}
	_, err := t.conn.Exec(ctx, t.begin)
	if err == nil {
		t.begin = ""
	}
	return err
}

// together reports whether a statement can travel with BEGIN: not if it comes
// with an option of pgx, which batches do not know.
func (t *Tx) together(args []any) bool {
	if t.begin == "" || t.closed {
		return false
	}
	for _, a := range args[:min(len(args), 3)] {
		switch a.(type) {
		case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID, pgx.QueryRewriter:
			return false
		}
	}
	return true
}

// first sends BEGIN and the first statement of the work.
func (t *Tx) first(ctx context.Context, sql string, args []any) (pgx.BatchResults, error) {
	b := &pgx.Batch{}
	b.Queue(t.begin)
	b.Queue(sql, args...)
	t.begin = "" // whatever comes of it: a ROLLBACK does no harm
	results := t.conn.SendBatch(ctx, b)
	_, err := results.Exec()
	return results, err
}

// Close makes every use from now on fail. It sends nothing.
func (t *Tx) Close() { t.closed = true }

// join returns pgx's own transaction object, for savepoints and large objects.
func (t *Tx) join(ctx context.Context) (pgx.Tx, error) {
	if err := t.start(ctx); err != nil {
		return nil, err
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
	if t.together(args) {
		results, err := t.first(ctx, sql, args)
		var tag pgconn.CommandTag
		if err == nil {
			tag, err = results.Exec()
		}
		if closed := results.Close(); err == nil {
			err = closed
		}
		return tag, err
	}
	if err := t.start(ctx); err != nil {
		return pgconn.CommandTag{}, err
	}
	return t.conn.Exec(ctx, sql, args...)
}

func (t *Tx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	return t.conn.Query(ctx, sql, args...)
}

func (t *Tx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if t.together(args) {
		results, err := t.first(ctx, sql, args)
		if err != nil {
			return failed{errors.Join(err, results.Close())}
		}
		return firstRow{results.QueryRow(), results}
	}
	if err := t.start(ctx); err != nil {
		return failed{err}
	}
	return t.conn.QueryRow(ctx, sql, args...)
}

func (t *Tx) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if err := t.start(ctx); err != nil {
		return nil, err
	}
	return t.conn.Prepare(ctx, name, sql)
}

func (t *Tx) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, src pgx.CopyFromSource) (int64, error) {
	if err := t.start(ctx); err != nil {
		return 0, err
	}
	return t.conn.CopyFrom(ctx, table, columns, src)
}

func (t *Tx) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if err := t.start(ctx); err != nil {
		return failedBatch{err: err}
	}
	return t.conn.SendBatch(ctx, b)
}

// firstRow is a row of the batch that began the transaction.
type firstRow struct {
	row     pgx.Row
	results pgx.BatchResults
}

func (r firstRow) Scan(dest ...any) error {
	err := r.row.Scan(dest...)
	if closed := r.results.Close(); err == nil {
		err = closed
	}
	return err
}

// failed and failedBatch answer what has no error to return.
type failed struct{ err error }

func (f failed) Scan(...any) error { return f.err }

type failedBatch struct {
	pgx.BatchResults
	err error
}

func (f failedBatch) Exec() (pgconn.CommandTag, error) { return pgconn.CommandTag{}, f.err }
func (f failedBatch) Query() (pgx.Rows, error)         { return nil, f.err }
func (f failedBatch) QueryRow() pgx.Row                { return failed{f.err} }
func (f failedBatch) Close() error                     { return f.err }
