package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/bsm/redislock"
	"github.com/go-redsync/redsync/v4"
	redsyncredis "github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/lock"
	"github.com/ashlar-go/ashlar/lock/lockpg"
)

// Holders that cannot extend their lease, sleep past its end, and then write what
// they had in mind: before or after they have begun their transaction. Meanwhile
// another takes the lease and writes.
var lockFenceExperiment = experiment{
	ids:  []string{"LK8"},
	what: "writes of holders that slept past their lease",
	round: func(ctx context.Context, e *env, r *results) error {
		pool, drop, err := e.schema(ctx)
		if err != nil {
			return err
		}
		defer drop()
		if err := lockpg.Migrate(ctx, pool); err != nil {
			return err
		}
		if _, err := pool.Exec(ctx, `CREATE TABLE thing (id int PRIMARY KEY, writer bigint NOT NULL DEFAULT 0)`); err != nil {
			return err
		}
		opts, err := redis.ParseURL(os.Getenv("TEST_REDIS_URL"))
		if err != nil {
			return err
		}
		client := redis.NewClient(opts)
		defer func() { _ = client.Close() }()
		prefix := fmt.Sprintf("bench:%d:%d:", os.Getpid(), time.Now().UnixNano())
		s := &sleepers{pool: pool}
		var there time.Time
		sent := time.Now()
		if err := pool.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&there); err != nil {
			return err
		}
		s.ahead = there.Sub(sent.Add(time.Since(sent) / 2))
		obtain := redislock.New(client)
		sync := redsync.New(redsyncredis.NewPool(client))
		for _, peer := range []struct {
			name   string
			trials int
			sleep  func(ctx context.Context, i int) error
		}{
			{"ours", e.n(2000), s.ours(lockpg.New(pool, nil))},
			{"redislock", e.n(500), s.peer(func(ctx context.Context, key string) error {
				_, err := obtain.Obtain(ctx, prefix+key, sleepTTL, &redislock.Options{RetryStrategy: redislock.LinearBackoff(5 * time.Millisecond)})
				return err
			})},
			{"redsync", e.n(500), s.peer(func(ctx context.Context, key string) error {
				return sync.NewMutex(prefix+"s"+key, redsync.WithExpiry(sleepTTL), redsync.WithTries(1000)).LockContext(ctx)
			})},
		} {
			s.stale, s.signalled = 0, 0
			if err := s.run(ctx, peer.trials, peer.sleep); err != nil {
				return fmt.Errorf("%s: %w", peer.name, err)
			}
			r.set(peer.name+" stale", float64(s.stale))
			r.set(peer.name+" share", float64(s.stale)/float64(peer.trials))
			r.set(peer.name+" signalled", float64(s.signalled)/float64(peer.trials))
		}
		return nil
	},
	bars: []bar{
		{id: "LK8", what: "stale writes through Guard", atMost: 0.5, unit: " ", ratio: func(r *results) float64 { return r.values["ours stale"] }},
		{id: "LK8", what: "losses signalled before the lease ended", atLeast: 1, ratio: func(r *results) float64 { return r.values["ours signalled"] }},
		{id: "LK8", what: "share of stale writes with redislock, for comparison", atLeast: 0, ratio: func(r *results) float64 { return r.values["redislock share"] }},
		{id: "LK8", what: "share of stale writes with redsync, for comparison", atLeast: 0, ratio: func(r *results) float64 { return r.values["redsync share"] }},
	},
}

const sleepTTL = 100 * time.Millisecond

// sleepers run trials on things of their own.
type sleepers struct {
	pool             *pgxpool.Pool
	ahead            time.Duration // by how much the server's clock is, to within a round trip
	mu               sync.Mutex
	stale, signalled int
}

func (s *sleepers) run(ctx context.Context, trials int, sleep func(ctx context.Context, i int) error) error {
	if _, err := s.pool.Exec(ctx, `TRUNCATE thing`); err != nil {
		return err
	}
	if _, err := s.pool.Exec(ctx, `INSERT INTO thing SELECT generate_series(0, $1)`, trials); err != nil {
		return err
	}
	const atOnce = 16
	errs := make([]error, atOnce)
	var wg sync.WaitGroup
	for w := range atOnce {
		wg.Go(func() {
			for i := w; i < trials && errs[w] == nil; i += atOnce {
				errs[w] = sleep(ctx, i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *sleepers) note(n *int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*n++
}

// write writes as the first or second holder; a first that comes after the second
// is stale.
func write(ctx context.Context, tx pgx.Tx, i int, writer int64) (stale bool, err error) {
	var before int64
	if err := tx.QueryRow(ctx, `SELECT writer FROM thing WHERE id = $1 FOR UPDATE`, i).Scan(&before); err != nil {
		return false, err
	}
	_, err = tx.Exec(ctx, `UPDATE thing SET writer = $2 WHERE id = $1`, i, writer)
	return before > writer, err
}

// A sleeping store loses every extension, as if the process were stopped.
type sleepingStore struct{ *lockpg.Store }

func (sleepingStore) Extend(ctx context.Context, _ lock.Request) error {
	<-ctx.Done()
	return ctx.Err()
}

func (s *sleepers) ours(store *lockpg.Store) func(ctx context.Context, i int) error {
	sleeper := lock.New(sleepingStore{store}, &lock.Options{TTL: sleepTTL, Margin: 40 * time.Millisecond})
	next := lock.New(store, &lock.Options{Poll: 20 * time.Millisecond})
	return func(ctx context.Context, i int) error {
		key := fmt.Sprint("thing ", i)
		first, err := sleeper.Lock(ctx, key)
		if err != nil {
			return err
		}
		early := i%2 == 0 // guards first, and then sleeps in its transaction
		tx, err := s.pool.Begin(ctx)
		if err != nil {
			return err
		}
		defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }() // after a commit it does nothing
		guard := func() (refused bool, err error) {
			tag, err := tx.Exec(ctx, lockpg.GuardSQL, first.Keys(), first.Owner()) // Guard without its look at the local clock
			return err == nil && tag.RowsAffected() != 1, err
		}
		refused := false
		if early {
			if refused, err = guard(); err != nil {
				return err
			}
		}
		<-first.Context().Done()
		told := time.Now().Add(s.ahead)
		var ends time.Time
		if err := s.pool.QueryRow(ctx, `SELECT expires_at FROM lock_lease WHERE key = $1`, key).Scan(&ends); err != nil {
			return err
		}
		if told.Before(ends) {
			s.note(&s.signalled)
		}
		second := make(chan error, 1)
		go func() {
			second <- next.Do(ctx, key, func(ctx context.Context, lease *lock.Lease) error {
				return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
					if err := lockpg.Guard(ctx, tx, lease); err != nil {
						return err
					}
					_, err := write(ctx, tx, i, 2)
					return err
				})
			})
		}()
		if early {
			time.Sleep(sleepTTL) // the other cannot begin, for its predecessor may still commit
		} else {
			if err := <-second; err != nil {
				return err
			}
			if refused, err = guard(); err != nil {
				return err
			}
		}
		if !refused {
			stale, err := write(ctx, tx, i, 1)
			if err != nil {
				return err
			}
			if err := tx.Commit(ctx); err != nil {
				return err
			}
			if stale {
				s.note(&s.stale)
			}
		}
		_ = first.Release(ctx) // it is lost
		if early {
			_ = tx.Rollback(ctx) // after a commit it does nothing
			return <-second
		}
		return nil
	}
}

// peer is the same with a lock that has nothing to guard with.
func (s *sleepers) peer(obtain func(ctx context.Context, key string) error) func(ctx context.Context, i int) error {
	return func(ctx context.Context, i int) error {
		key := fmt.Sprint("thing ", i)
		if err := obtain(ctx, key); err != nil {
			return err
		}
		time.Sleep(sleepTTL)
		if err := obtain(ctx, key); err != nil { // as another process
			return err
		}
		for _, writer := range []int64{2, 1} {
			err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
				stale, err := write(ctx, tx, i, writer)
				if err == nil && stale {
					s.note(&s.stale)
				}
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
}
