package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
)

const topic = "bench"

// An env is what the experiments run on: a Postgres server, and a Kafka broker
// in this process, the same for all.
type env struct {
	quick   bool
	dsn     string
	cluster *kfake.Cluster
	client  *kgo.Client
	schemas atomic.Int64
}

func newEnv(ctx context.Context, quick bool) (*env, error) {
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(4, topic))
	if err != nil {
		return nil, err
	}
	client, err := kgo.NewClient(kgo.SeedBrokers(cluster.ListenAddrs()...), kgo.MaxBufferedRecords(100_000), kgo.ProducerLinger(0))
	if err != nil {
		return nil, err
	}
	return &env{quick: quick, dsn: os.Getenv("TEST_POSTGRES_URL"), cluster: cluster, client: client}, nil
}

func (e *env) close() {
	e.client.Close()
	e.cluster.Close()
}

// n is a number of messages: a tenth of it in the quick form.
func (e *env) n(full int) int {
	if e.quick {
		return full / 10
	}
	return full
}

// schema returns a pool on a fresh schema, and a function that removes both.
func (e *env) schema(ctx context.Context) (*pgxpool.Pool, func(), error) {
	name := fmt.Sprintf("bench_%d_%d", os.Getpid(), e.schemas.Add(1))
	admin, err := pgxpool.New(ctx, e.dsn)
	if err != nil {
		return nil, nil, err
	}
	if _, err := admin.Exec(ctx, "CREATE SCHEMA "+name); err != nil {
		admin.Close()
		return nil, nil, err
	}
	u, err := url.Parse(e.dsn)
	if err != nil {
		return nil, nil, err
	}
	q := u.Query()
	q.Set("search_path", name)
	u.RawQuery = q.Encode()
	cfg, err := pgxpool.ParseConfig(u.String())
	if err != nil {
		return nil, nil, err
	}
	cfg.MaxConns = 64
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	return pool, func() {
		pool.Close()
		_, _ = admin.Exec(context.WithoutCancel(ctx), "DROP SCHEMA "+name+" CASCADE") // the server is ours, and ends with us
		admin.Close()
	}, nil
}
