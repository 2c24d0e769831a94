package lockpg_test

import (
	"errors"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
	"github.com/ashlar-go/ashlar/lock/locktest"
)

type item struct {
	Name  string
	Price int
}

func items(t *testing.T) *pgxpool.Pool {
	t.Helper()
	pool := pgtest.Pool(t)
	run(t, pool, `CREATE TABLE item (id text PRIMARY KEY, version bigint NOT NULL DEFAULT 1, name text NOT NULL DEFAULT '', price bigint NOT NULL DEFAULT 0);
		INSERT INTO item (id) VALUES ('k')`)
	return pool
}

func run(t *testing.T, pool *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

func prices(pool *pgxpool.Pool) lockpg.Rows[int64] {
	return lockpg.Rows[int64]{
		DB:      pool,
		Select:  `SELECT version, price FROM item WHERE id = $1`,
		Update:  `UPDATE item SET version = version + 1, price = $3 WHERE id = $1 AND version = $2 RETURNING version`,
		Columns: func(v *int64) []any { return []any{v} },
	}
}

func TestRows(t *testing.T) {
	locktest.TestRegister(t, func(t *testing.T) lock.Register[int64] { return prices(items(t)) })
}

func TestRowsOfStructs(t *testing.T) {
	pool := items(t)
	rows := lockpg.Rows[item]{
		DB:      pool,
		Select:  `SELECT version, name, price FROM item WHERE id = $1`,
		Update:  `UPDATE item SET version = version + 1, name = $3, price = $4 WHERE id = $1 AND version = $2 RETURNING version`,
		Columns: func(v *item) []any { return []any{&v.Name, &v.Price} },
	}
	u := lock.NewUpdater(rows, nil)
	got, version, err := u.Update(t.Context(), "k", func(i item) (item, error) {
		i.Name, i.Price = i.Name+"x", i.Price+7
		return i, nil
	})
	if err != nil || version != 2 || got != (item{"x", 7}) {
		t.Fatalf("Update = %+v, %d, %v", got, version, err)
	}
	_, err = rows.Store(t.Context(), "k", item{"y", 8}, 1)
	var conflict *lock.ConflictError
	if !errors.As(err, &conflict) || conflict.Current != (item{"x", 7}) || conflict.Version != 2 {
		t.Fatalf("Store over a newer version = %v", err)
	}
	if _, _, err := u.Update(t.Context(), "none", func(i item) (item, error) { return i, nil }); !errors.Is(err, pgx.ErrNoRows) {
		t.Fatalf("Update of a row that is not there = %v", err)
	}
	run(t, pool, `DELETE FROM item`)
	if _, err = rows.Store(t.Context(), "k", item{}, 2); !errors.As(err, &conflict) || conflict.Exists || conflict.Version != 0 {
		t.Fatalf("Store of a row that is gone = %v", err)
	}
}

// A trips counts what is sent to the server.
type trips struct {
	*pgxpool.Pool
	n atomic.Int64
}

func (c *trips) SendBatch(ctx ctx, b *pgx.Batch) pgx.BatchResults {
	c.n.Add(1)
	return c.Pool.SendBatch(ctx, b)
}

func TestUpdateVersion(t *testing.T) {
	pool := &trips{Pool: items(t)}
	update := func(version int64, name string) (int64, string, error) {
		var found string
		v, err := lockpg.UpdateVersion(t.Context(), pool, version,
			lockpg.Query{SQL: `UPDATE item SET version = version + 1, name = $3 WHERE id = $1 AND version = $2 RETURNING version`, Args: []any{"k", version, name}},
			lockpg.Query{SQL: `SELECT version, name FROM item WHERE id = $1`, Args: []any{"k"}}, &found)
		return v, found, err
	}
	if v, found, err := update(1, "a"); err != nil || v != 2 || found != "" {
		t.Fatalf("UpdateVersion = %d, %q, %v", v, found, err)
	}
	_, found, err := update(1, "b")
	var conflict *lock.ConflictError
	if !errors.As(err, &conflict) || *conflict != (lock.ConflictError{Expected: 1, Version: 2, Exists: true}) || found != "a" {
		t.Fatalf("UpdateVersion of an old version = %q, %v", found, err)
	}
	if n := pool.n.Load(); n != 2 {
		t.Errorf("%d round trips of two calls", n)
	}
	// What update had to wait for is what is reported.
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context())
	if _, err := tx.Exec(t.Context(), `UPDATE item SET version = 10, name = 'c'`); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, _, err := update(2, "d")
		done <- err
	}()
	waitBlocked(t, pool.Pool)
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.As(err, &conflict) || conflict.Version != 10 {
		t.Fatalf("UpdateVersion that had to wait = %v, want version 10", err)
	}
	// The driver's errors stay reachable, and are no conflicts.
	_, err = lockpg.UpdateVersion(t.Context(), pool, 1, lockpg.Query{SQL: `SELECT 1/0`}, lockpg.Query{SQL: `SELECT 1`})
	if code := sqlState(err); code != "22012" || errors.Is(err, lock.ErrConflict) {
		t.Fatalf("UpdateVersion of what fails = %v", err)
	}
	_, err = lockpg.UpdateVersion(t.Context(), pool, 1, lockpg.Query{SQL: `UPDATE item SET version = 1 WHERE false RETURNING version`}, lockpg.Query{SQL: `SELECT (1/0)::bigint`})
	if code := sqlState(err); code != "22012" {
		t.Fatalf("UpdateVersion of which current fails = %v", err)
	}
}
