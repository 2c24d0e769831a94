package schedulepg_test //nolint:testableexamples // it needs a server

import (
	"context"
	"os/signal"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
	"github.com/ashlar-go/ashlar/schedule"
	"github.com/ashlar-go/ashlar/schedule/schedulepg"
)

// remind appends a message for each tick, exactly once: the message and the
// record that the tick is done are committed together.
func remind(ctx context.Context, tx pgx.Tx, run schedule.Run) error {
	return outboxpg.Append(ctx, tx, outbox.Message{Topic: "reminders", Key: run.Schedule.Name, Payload: run.Payload})
}

// serve runs in every instance of the service.
func serve(pool *pgxpool.Pool) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := schedulepg.Migrate(ctx, pool); err != nil {
		return err
	}
	store := schedulepg.New(pool)
	if _, err := store.Define(ctx, schedule.Definition{Name: "remind", Spec: "0 9 * * MON", Zone: "Europe/Berlin"}); err != nil {
		return err
	}
	runner := schedule.New(store, nil)
	runner.Handle("remind", schedulepg.HandleTx(pool, remind))
	return runner.Run(ctx)
}

// Every Monday at nine, one of the instances appends a message to the outbox.
func ExampleHandleTx() {
	var pool *pgxpool.Pool // of the service
	if pool == nil {
		return
	}
	_ = serve(pool)
}
