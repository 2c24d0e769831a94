package idempotencypg

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/internal/execution"
	"github.com/ashlar-go/ashlar/internal/pgtx"
)

// TxOptions tunes [DoTx]. The zero value of each field means its default.
type TxOptions struct {
	// TTL is how long the result is remembered. Default 24 h.
	TTL time.Duration
	// Wait is how long a duplicate waits for the execution in progress before it
	// gives up with idempotency.ErrInProgress. It holds no connection meanwhile.
	// Default 0: not at all.
	Wait time.Duration
	// RollbackTimeout bounds the ROLLBACK of work that failed, which goes on when
	// the caller's context has ended. Default 5 s.
	RollbackTimeout time.Duration
	// Observer is told what happens; its Lost never is, for work that is not
	// recorded is rolled back.
	Observer idempotency.Observer
}

// DoTx runs fn in a transaction, unless the operation that key names was
// completed before; then it returns the recorded result, and replayed is true.
// The transaction is READ COMMITTED, and DoTx ends it. A []byte is recorded as
// it is, any other T as JSON.
//
// What fn does through tx happens exactly once: the claim, the work and its
// result are committed together. If fn fails or panics, if the process dies or
// the connection breaks before the COMMIT is on disk, nothing has happened and
// the key is free at once. An error of the COMMIT itself leaves open which of
// the two it was; a retry replays or runs, and is right either way.
//
// Of concurrent duplicates one runs; the others get idempotency.ErrInProgress,
// or wait (see [TxOptions].Wait). A key that is claimed through a [Store] is in
// progress here too. An execution here is seen by a Store only at its end; if
// the two collide, this one is rolled back with idempotency.ErrInProgress.
//
// The claim adds no round trip and no commit: it travels with BEGIN, the result
// with COMMIT. It is an advisory lock, held until the transaction ends, so that
// an execution writes one row, once. DoTx is safe for concurrent use and needs
// one connection; fn must not take another from the same pool. opts may be nil.
func DoTx[T any](ctx context.Context, pool *pgxpool.Pool, key idempotency.Key, opts *TxOptions, fn func(ctx context.Context, tx pgx.Tx) (T, error)) (v T, replayed bool, err error) {
	x := &txCall{pool: pool, key: key}
	if opts != nil {
		x.opts = *opts
	}
	result, replayed, err := x.do(ctx, func(tx pgx.Tx) ([]byte, error) {
		var err error
		if v, err = fn(ctx, tx); err != nil {
			return nil, err
		}
		return execution.Encode(v)
	})
	if err != nil {
		var zero T
		return zero, false, err
	}
	if replayed {
		if v, err = execution.Decode[T](result); err != nil {
			return v, true, fmt.Errorf("idempotencypg: %w", err)
		}
	}
	return v, replayed, nil
}

// A txCall is one use of a key.
type txCall struct {
	pool *pgxpool.Pool
	key  idempotency.Key
	opts TxOptions
}

func (x *txCall) do(ctx context.Context, work func(pgx.Tx) ([]byte, error)) (result []byte, replayed bool, err error) {
	if err := x.key.Validate(); err != nil {
		return nil, false, err
	}
	if x.opts.TTL <= 0 {
		x.opts.TTL = 24 * time.Hour
	}
	if x.opts.RollbackTimeout <= 0 {
		x.opts.RollbackTimeout = 5 * time.Second
	}
	start := time.Now()
	for attempt := 0; ; attempt++ {
		result, replayed, err = x.try(ctx, work)
		left := x.opts.Wait - time.Since(start)
		if !errors.Is(err, errBusy) || left <= 0 {
			break
		}
		if err := execution.Poll(ctx, attempt, left); err != nil {
			return nil, false, err
		}
	}
	o := &x.opts.Observer
	switch {
	case err == nil && replayed && o.Replayed != nil:
		o.Replayed(ctx, x.key)
	case err == nil && !replayed && o.Completed != nil:
		o.Completed(ctx, x.key, time.Since(start))
	case (errors.Is(err, errBusy) || errors.Is(err, idempotency.ErrMismatch)) && o.Refused != nil:
		o.Refused(ctx, x.key, err)
	}
	return result, replayed, err
}

// errBusy tells this key's refusal from one that the work passes on.
var errBusy = fmt.Errorf("idempotencypg: %w", idempotency.ErrInProgress)

const (
	// The lock is taken and the record read by two statements: the second must
	// see what the lock's last holder committed. The table's oid keeps the keys
	// of two schemas apart.
	tryLock = `SELECT pg_try_advisory_xact_lock($1::bigint # 'idempotency_key'::regclass::oid::bigint)`

	deleteFree = `DELETE FROM idempotency_key WHERE scope = $1 AND id = $2 AND token = $3 AND ` + free

	// A plain INSERT: whatever is in its way must make the COMMIT behind it fail.
	insertResult = `
INSERT INTO idempotency_key (scope, id, fingerprint, token, expires_at, result)
VALUES ($1, $2, $3, '', clock_timestamp() + $4::interval, $5)`
)

func (x *txCall) try(ctx context.Context, work func(pgx.Tx) ([]byte, error)) (result []byte, replayed bool, err error) {
	conn, err := x.pool.Acquire(ctx)
	if err != nil {
		return nil, false, wrap("acquire", err)
	}
	tx := pgtx.New(conn.Conn())
	committed, claimed := false, false
	defer func() {
		tx.Close()
		if !committed {
			x.rollback(ctx, conn)
			if f := x.opts.Observer.Failed; claimed && f != nil {
				f(ctx, x.key, err, true)
			}
		}
		conn.Release()
	}()

	old, locked, err := x.begin(ctx, tx.Conn())
	if err != nil {
		return nil, false, wrap("begin", err)
	}
	if old != nil {
		switch claim, isFree, err := old.answer(x.key); {
		case claim.Done:
			return claim.Result, true, nil
		case errors.Is(err, idempotency.ErrInProgress):
			return nil, false, errBusy
		case !isFree:
			return nil, false, wrap("claim", err)
		}
	}
	if !locked {
		return nil, false, errBusy
	}
	claimed = true
	if result, err = work(tx); err != nil {
		return nil, false, err
	}
	if err := x.commit(ctx, tx.Conn(), old, result); err != nil {
		return nil, false, err
	}
	committed = true
	return result, false, nil
}

// begin starts the transaction, tries to lock the key and reads its record.
func (x *txCall) begin(ctx context.Context, conn *pgx.Conn) (r *record, locked bool, err error) {
	var batch pgx.Batch
	batch.Queue(`BEGIN ISOLATION LEVEL READ COMMITTED`)
	batch.Queue(tryLock, lockKey(x.key))
	batch.Queue(selectRecord, x.key.Scope, x.key.ID)
	results := conn.SendBatch(ctx, &batch)
	defer func() {
		if closed := results.Close(); err == nil {
			err = closed
		}
	}()
	if _, err = results.Exec(); err != nil {
		return nil, false, err
	}
	if err = results.QueryRow().Scan(&locked); err != nil {
		return nil, false, err
	}
	r, err = scan(results.QueryRow())
	return r, locked, err
}

// commit records the result and commits, in place of the record old that may be
// taken over.
func (x *txCall) commit(ctx context.Context, conn *pgx.Conn, old *record, result []byte) error {
	var batch pgx.Batch
	if old != nil {
		batch.Queue(deleteFree, x.key.Scope, x.key.ID, old.token)
	}
	batch.Queue(insertResult, x.key.Scope, x.key.ID, notNil(x.key.Fingerprint), x.opts.TTL, result)
	batch.Queue(`COMMIT`)
	results := conn.SendBatch(ctx, &batch)
	var tag pgconn.CommandTag
	var err error
	for range batch.Len() {
		if tag, err = results.Exec(); err != nil {
			break
		}
	}
	if closed := results.Close(); err == nil {
		err = closed
	}
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.ConstraintName == "idempotency_key_pkey":
		return errBusy // claimed through a Store meanwhile
	case err == nil && tag.String() != "COMMIT":
		err = pgx.ErrTxCommitRollback
	}
	return wrap("commit", err)
}

func (x *txCall) rollback(ctx context.Context, conn *pgxpool.Conn) {
	if conn.Conn().IsClosed() {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), x.opts.RollbackTimeout)
	defer cancel()
	// A connection that this does not clean up is closed by its release.
	_, _ = conn.Exec(ctx, `ROLLBACK`)
}

// lockKey is the advisory lock of a key: 64 bits of a hash. Should two keys
// share one, they cannot run at the same moment, no more.
func lockKey(k idempotency.Key) int64 {
	sum := sha256.Sum256([]byte(k.Scope + "\x00" + k.ID)) // neither has a NUL
	return int64(binary.BigEndian.Uint64(sum[:]))
}
