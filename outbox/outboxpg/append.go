package outboxpg

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/outbox"
)

// Append adds msgs to the outbox in the caller's transaction: they are
// delivered if it commits, and only then. It takes one round trip, and one more for
// messages with a delay.
//
// Messages of one key are delivered in the order of their Append calls. If
// transactions that write the same key may overlap, let each lock what the
// messages tell of (its row, say) before it calls Append, so that the order
// means something. A transaction that has appended holds up the lanes it
// appended to until it ends: keep it short.
//
// Errors wrap [outbox.ErrInvalid] for messages that cannot be delivered and
// [outbox.ErrNotMigrated] when tables are missing; the driver's errors are
// reached with errors.As. After an error of the database the transaction can
// only be rolled back.
func Append(ctx context.Context, tx pgx.Tx, msgs ...outbox.Message) error {
	return (*Writer)(nil).Append(ctx, tx, msgs...)
}

// A Writer appends messages as [Append] does and sets headers on them. The zero
// value and nil are ready to use; it is safe for concurrent use.
type Writer struct {
	// Inject returns headers for the messages of one Append call, such as the
	// trace context of ctx. Headers of the message itself win. Nil adds none.
	Inject func(ctx context.Context) map[string]string
}

// lane number to sequence, resolved when the statement is parsed
var (
	seqArray    = "('{" + lanesList("outbox_seq_") + "}'::regclass[])"
	cursorArray = "('{" + lanesList("outbox_cursor_") + "}'::regclass[])"
)

func lanesList(prefix string) string {
	var b strings.Builder
	for n := range outbox.Lanes {
		if n > 0 {
			b.WriteByte(',')
		}
		b.WriteString(prefix + strconv.Itoa(n))
	}
	return b.String()
}

// place returns the SQL expression for the next position of a lane. The lock
// marks the transaction as one that may still commit a position of the lane, so
// it must be held before the position is taken: CASE fixes that order.
func place(lane string) string {
	return `CASE WHEN pg_try_advisory_xact_lock_shared('outbox_control'::regclass::oid::int4, ` + lane + `::int4)
		THEN nextval(` + seqArray + `[` + lane + `::int4 + 1]) END`
}

const insertColumns = `(slot, lane, seq, id, topic, key, payload, headers)`

// What writers of other drivers use: the table finds the slot.
var insertAny = `INSERT INTO outbox_message ` + insertColumns + `
	VALUES ((SELECT slot FROM outbox_control), $1::smallint, ` + place("$1") + `, $2::text, $3::text, $4::text, $5::bytea, $6::jsonb)`

// The statements for each slot. A writer need not use the current one, so it
// remembers it and spares the server the routing; now and then it asks again.
var (
	insertOne, insertMany, insertOneAsk, insertManyAsk [slots]string

	insertDelayed = `INSERT INTO outbox_delayed (due_at, lane, id, topic, key, payload, headers)
		SELECT clock_timestamp() + make_interval(secs => delay), lane, id, topic, key, payload, headers
		FROM unnest($1::smallint[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::jsonb[], $7::float8[])
			AS m(lane, id, topic, key, payload, headers, delay)`
)

func init() {
	const ask = ` RETURNING (SELECT slot FROM outbox_control)`
	for slot := range slots {
		into := fmt.Sprintf(`INSERT INTO outbox_message_%d %s `, slot, insertColumns)
		insertOne[slot] = into + fmt.Sprintf(`VALUES (%d, $1::smallint, %s, $2::text, $3::text, $4::text, $5::bytea, $6::jsonb)`, slot, place("$1"))
		insertMany[slot] = into + fmt.Sprintf(`SELECT %d, m.lane, %s, m.id, m.topic, m.key, m.payload, m.headers
			FROM unnest($1::smallint[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::jsonb[])
				AS m(lane, id, topic, key, payload, headers)`, slot, place("m.lane"))
		insertOneAsk[slot], insertManyAsk[slot] = insertOne[slot]+ask, insertMany[slot]+ask
	}
}

// A slotHint is what a connection knows of the current slot.
type slotHint struct {
	slot  int
	until time.Time // ask again after it
}

const hintFor = time.Second

func hintOf(tx pgx.Tx) *slotHint {
	conn := tx.Conn()
	if conn == nil {
		return &slotHint{} // not a real connection
	}
	const name = "ashlar outbox slot"
	data := conn.PgConn().CustomData()
	hint, ok := data[name].(*slotHint)
	if !ok {
		hint = &slotHint{}
		data[name] = hint
	}
	return hint
}

// columns are the arguments of insertMany and insertDelayed.
type columns struct {
	lanes             []int16
	ids, topics, keys []string
	payloads          [][]byte
	headers           []*string
	delays            []float64
}

func (c *columns) add(m outbox.Message, lane int, headers *string) {
	c.lanes = append(c.lanes, int16(lane))
	c.ids, c.topics, c.keys = append(c.ids, m.ID), append(c.topics, m.Topic), append(c.keys, m.Key)
	c.payloads = append(c.payloads, nonNil(m.Payload))
	c.headers = append(c.headers, headers)
	c.delays = append(c.delays, m.Delay.Seconds())
}

// Append adds msgs to the outbox in the caller's transaction; see [Append].
func (w *Writer) Append(ctx context.Context, tx pgx.Tx, msgs ...outbox.Message) error {
	var inject map[string]string
	if w != nil && w.Inject != nil {
		inject = w.Inject(ctx)
	}
	if len(msgs) == 1 && msgs[0].Delay <= 0 {
		m, lane, headers, err := prepare(msgs[0], inject)
		if err != nil {
			return fmt.Errorf("outboxpg: message 0: %w", err)
		}
		return wrap("append", insert(ctx, tx, &insertOne, &insertOneAsk,
			int16(lane), m.ID, m.Topic, m.Key, nonNil(m.Payload), headers))
	}
	var now, later columns
	for i, m := range msgs {
		m, lane, headers, err := prepare(m, inject)
		if err != nil {
			return fmt.Errorf("outboxpg: message %d: %w", i, err)
		}
		if m.Delay > 0 {
			later.add(m, lane, headers)
		} else {
			now.add(m, lane, headers)
		}
	}
	if len(later.ids) > 0 {
		_, err := tx.Exec(ctx, insertDelayed, later.lanes, later.ids, later.topics, later.keys, later.payloads, later.headers, later.delays)
		if err != nil {
			return wrap("append", err)
		}
	}
	if len(now.ids) == 0 {
		return nil
	}
	return wrap("append", insert(ctx, tx, &insertMany, &insertManyAsk,
		now.lanes, now.ids, now.topics, now.keys, now.payloads, now.headers))
}

func insert(ctx context.Context, tx pgx.Tx, plain, ask *[slots]string, args ...any) error {
	hint := hintOf(tx)
	if now := time.Now(); now.After(hint.until) {
		slot := hint.slot
		rows, err := tx.Query(ctx, ask[slot], args...)
		if err != nil {
			return err
		}
		_, err = pgx.ForEachRow(rows, []any{&slot}, func() error { return nil })
		if err == nil {
			hint.slot, hint.until = slot, now.Add(hintFor)
		}
		return err
	}
	_, err := tx.Exec(ctx, plain[hint.slot], args...)
	return err
}

func prepare(m outbox.Message, inject map[string]string) (outbox.Message, int, *string, error) {
	if len(inject) > 0 {
		all := maps.Clone(inject)
		maps.Copy(all, m.Headers)
		m.Headers = all
	}
	m, lane, err := outbox.Prepare(m)
	if err != nil || len(m.Headers) == 0 {
		return m, lane, nil, err
	}
	b, err := json.Marshal(m.Headers)
	if err != nil {
		return m, lane, nil, err
	}
	headers := string(b)
	return m, lane, &headers, nil
}

// Statement returns the SQL statement that appends m, and its arguments, for
// those who do not use pgx's own interface:
//
//	query, args, err := outboxpg.Statement(msg)
//	...
//	_, err = tx.ExecContext(ctx, query, args...) // tx is a *sql.Tx
//
// The guarantees are those of [Append]. It works with any driver that knows $1
// placeholders, and through PgBouncer in transaction mode.
func Statement(m outbox.Message) (query string, args []any, err error) {
	m, lane, headers, err := prepare(m, nil)
	if err != nil {
		return "", nil, fmt.Errorf("outboxpg: %w", err)
	}
	var h any
	if headers != nil {
		h = *headers
	}
	args = []any{int64(lane), m.ID, m.Topic, m.Key, nonNil(m.Payload), h}
	if m.Delay > 0 {
		return `INSERT INTO outbox_delayed (due_at, lane, id, topic, key, payload, headers)
			VALUES (clock_timestamp() + make_interval(secs => $7::float8), $1::smallint, $2::text, $3::text, $4::text, $5::bytea, $6::jsonb)`,
			append(args, m.Delay.Seconds()), nil
	}
	return insertAny, args, nil
}

func nonNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
