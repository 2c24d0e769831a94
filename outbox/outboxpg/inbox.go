package outboxpg

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// An Inbox lets a consumer process each message once, although it may be
// delivered more often: the message's ID is stored in the transaction of the
// consumer's own effect. Its table is made by [Migrate] in the consumer's
// database. It is safe for concurrent use, also by many processes.
type Inbox struct {
	consumer string
}

// NewInbox returns the inbox of a consumer, such as "orders". Different
// consumers each process every message.
func NewInbox(consumer string) *Inbox {
	if consumer == "" {
		panic("outboxpg: NewInbox needs the consumer's name")
	}
	return &Inbox{consumer: consumer}
}

var errDuplicate = errors.New("outboxpg: duplicate")

// Handle calls fn in a transaction unless the message with the given ID was
// processed before; fresh tells which. The effect of fn and the mark that it
// happened are committed together, so that fn takes effect exactly once.
//
// If fn fails or the process dies, nothing is marked and the message can be
// handled again. A duplicate that arrives meanwhile waits for the first to end.
func (b *Inbox) Handle(ctx context.Context, db Beginner, id string, fn func(tx pgx.Tx) error) (fresh bool, err error) {
	err = pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		if fresh, err = b.Accept(ctx, tx, id); err != nil {
			return err
		}
		if !fresh {
			return errDuplicate // rolls back: there is nothing to commit
		}
		return fn(tx)
	})
	if errors.Is(err, errDuplicate) {
		return false, nil
	}
	return fresh && err == nil, err
}

// Accept marks the message as processed in the caller's transaction and tells
// whether it is fresh. The caller skips its effect where it is not.
func (b *Inbox) Accept(ctx context.Context, tx pgx.Tx, id string) (fresh bool, err error) {
	tag, err := tx.Exec(ctx, `INSERT INTO outbox_inbox (consumer, message_id) VALUES ($1, $2) ON CONFLICT DO NOTHING`, b.consumer, id)
	return tag.RowsAffected() == 1, wrap("inbox", err)
}

// AcceptAll is [Inbox.Accept] for a batch, in one round trip: fresh[i] tells of
// ids[i]. Of equal ids in a batch the first is fresh.
func (b *Inbox) AcceptAll(ctx context.Context, tx pgx.Tx, ids []string) (fresh []bool, err error) {
	// Sorted, so that two batches cannot wait for each other.
	sorted := slices.Compact(slices.Sorted(slices.Values(ids)))
	rows, err := tx.Query(ctx, `INSERT INTO outbox_inbox (consumer, message_id)
		SELECT $1, id FROM unnest($2::text[]) id ON CONFLICT DO NOTHING RETURNING message_id`, b.consumer, sorted)
	if err != nil {
		return nil, wrap("inbox", err)
	}
	accepted, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, wrap("inbox", err)
	}
	left := make(map[string]bool, len(accepted))
	for _, id := range accepted {
		left[id] = true
	}
	fresh = make([]bool, len(ids))
	for i, id := range ids {
		fresh[i] = left[id]
		left[id] = false
	}
	return fresh, nil
}

// Purge deletes at most limit marks that are older than age, by the database's
// clock, and returns how many it deleted. Call it regularly, with an age beyond
// which no duplicate can arrive: the broker's retention, say.
func (b *Inbox) Purge(ctx context.Context, pool *pgxpool.Pool, age time.Duration, limit int) (int, error) {
	tag, err := pool.Exec(ctx, `DELETE FROM outbox_inbox WHERE consumer = $1 AND message_id IN (
		SELECT message_id FROM outbox_inbox WHERE consumer = $1 AND received_at < now() - make_interval(secs => $2) LIMIT $3)`,
		b.consumer, age.Seconds(), limit)
	return int(tag.RowsAffected()), wrap("inbox", err)
}
