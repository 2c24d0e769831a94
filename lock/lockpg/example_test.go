package lockpg_test

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
)

// What is worked out under a lease is written only by who still holds it.
func ExampleGuard() { //nolint:testableexamples // it needs a server
	var pool *pgxpool.Pool // of the service
	if pool == nil {
		return
	}
	locker := lock.New(lockpg.New(pool, nil), nil)
	err := locker.Do(context.Background(), "prices", func(ctx context.Context, lease *lock.Lease) error {
		price := 42 // takes its time
		return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			if err := lockpg.Guard(ctx, tx, lease); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `UPDATE price SET cents = $1`, price)
			return err
		})
	})
	fmt.Println(err)
}

// A conditional update in one round trip, which tells what is there instead.
func ExampleUpdateVersion() { //nolint:testableexamples // it needs a server
	var pool *pgxpool.Pool // of the service
	if pool == nil {
		return
	}
	var name string
	version, err := lockpg.UpdateVersion(context.Background(), pool, 3,
		lockpg.Query{SQL: `UPDATE item SET name = $3, version = version + 1 WHERE id = $1 AND version = $2 RETURNING version`, Args: []any{7, 3, "ink"}},
		lockpg.Query{SQL: `SELECT version, name FROM item WHERE id = $1`, Args: []any{7}}, &name)
	fmt.Println(version, err, name)
}

type Item struct {
	Name string
	Left int
}

// Rows that an Updater changes.
func ExampleRows() { //nolint:testableexamples // it needs a server
	var pool *pgxpool.Pool // of the service
	if pool == nil {
		return
	}
	items := lock.NewUpdater(lockpg.Rows[Item]{
		DB:      pool,
		Select:  `SELECT version, name, in_stock FROM item WHERE id = $1`,
		Update:  `UPDATE item SET version = version + 1, name = $3, in_stock = $4 WHERE id = $1 AND version = $2 RETURNING version`,
		Columns: func(i *Item) []any { return []any{&i.Name, &i.Left} },
	}, nil)
	item, version, err := items.Update(context.Background(), "7", func(i Item) (Item, error) {
		i.Left--
		return i, nil
	})
	fmt.Println(item, version, err)
}
