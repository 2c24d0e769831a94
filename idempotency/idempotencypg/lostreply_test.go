package idempotencypg_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencypg"
	"github.com/ashlar-go/ashlar/internal/pgtest"
)

// The COMMIT is done and its answer lost: the caller gets an error, and its
// retry the result, not a second effect.
func TestLostCommit(t *testing.T) {
	direct, dsn := crashLedger(t)
	pool, proxy := pgtest.Through(t, dsn)
	const commit = "COMMIT\x00" // the tag of a CommandComplete message
	for i := range 10 {
		id := fmt.Sprint("k", i)
		work := func(ctx context.Context, tx pgx.Tx) (int, error) {
			_, err := tx.Exec(ctx, `INSERT INTO effect (id, nonce) VALUES ($1, '')`, id)
			return i, err
		}
		armed := func(ctx context.Context, tx pgx.Tx) (int, error) {
			v, err := work(ctx, tx)
			proxy.Arm(commit)
			return v, err
		}
		if _, _, err := idempotencypg.DoTx(t.Context(), pool, key(id), nil, armed); err == nil {
			t.Fatal("no error although the answer of COMMIT was lost")
		}
		got, replayed, err := idempotencypg.DoTx(t.Context(), pool, key(id), &idempotencypg.TxOptions{Wait: time.Minute}, work)
		if err != nil || got != i {
			t.Fatalf("the retry: %v, %v, %v", got, replayed, err)
		}
		if n := effects(t, direct, id); n != 1 {
			t.Fatalf("%d effects of %s, want 1 (replayed %v)", n, id, replayed)
		}
		if !replayed {
			t.Errorf("%s: the answer was cut after the COMMIT, yet the retry ran again", id)
		}
	}
	if n := proxy.Cuts(); n != 10 {
		t.Fatalf("%d answers were lost, want 10", n)
	}
}

// The same for each answer of a two-phase execution.
func TestLostReplies(t *testing.T) {
	direct, dsn := crashLedger(t)
	pool, proxy := pgtest.Through(t, dsn)
	store := idempotencypg.New(pool)
	for i, tag := range []string{"INSERT 0 1\x00", "UPDATE 1\x00", "COMMIT\x00"} { // of Claim, CompleteTx, COMMIT
		id := fmt.Sprint("k", i)
		if tag == "INSERT 0 1\x00" {
			proxy.Arm(tag)
		}
		opts := &idempotency.Options{Lease: crashLease, Wait: time.Minute}
		var got int
		err := errors.New("not tried")
		for attempt := 0; err != nil && attempt < 20; attempt++ {
			got, _, err = idempotency.Do(t.Context(), store, key(id), opts, func(ctx context.Context) (int, error) {
				return attempt, pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
					if _, err := tx.Exec(ctx, `INSERT INTO effect (id, nonce) VALUES ($1, $2)`, id, fmt.Sprint(attempt)); err != nil {
						return err
					}
					if attempt == 0 {
						proxy.Arm(tag)
					}
					return idempotencypg.CompleteTx(ctx, tx, attempt)
				})
			})
			if err == nil && attempt == 0 {
				t.Errorf("%q: no error although the answer was lost", tag)
			}
		}
		if err != nil {
			t.Fatalf("%q: %v", tag, err)
		}
		if n := count(t, direct, `SELECT count(*) FROM effect WHERE id = $1 AND nonce = $2`, id, fmt.Sprint(got)); n != 1 || effects(t, direct, id) != 1 {
			t.Fatalf("%q: %d effects, %d of the result %d; want 1", tag, effects(t, direct, id), n, got)
		}
		if proxy.Armed() {
			t.Fatalf("%q: the answer was not lost", tag)
		}
	}
}
