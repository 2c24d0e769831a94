-- The outbox: an insert-only log in three slots that are truncated in turn.
-- Names are unqualified: the tables go to the first schema of search_path.

CREATE TABLE outbox_control (
	one  boolean  PRIMARY KEY DEFAULT true CHECK (one),
	slot smallint NOT NULL DEFAULT 0 -- the slot that writers use
);
INSERT INTO outbox_control DEFAULT VALUES;

CREATE TABLE outbox_message (
	slot       smallint    NOT NULL,
	lane       smallint    NOT NULL,
	seq        bigint      NOT NULL, -- position in the lane
	id         text        NOT NULL,
	topic      text        NOT NULL,
	key        text        NOT NULL,
	payload    bytea       NOT NULL,
	headers    jsonb,
	created_at timestamptz NOT NULL DEFAULT now()
) PARTITION BY LIST (slot);
ALTER TABLE outbox_message ALTER COLUMN payload SET STORAGE EXTERNAL;

-- A slot never has dead tuples, so vacuum has nothing to do in it, and
-- statistics taken while it is empty would mislead the planner later.
CREATE TABLE outbox_message_0 PARTITION OF outbox_message FOR VALUES IN (0)
	WITH (autovacuum_enabled = false, toast.autovacuum_enabled = false);
CREATE TABLE outbox_message_1 PARTITION OF outbox_message FOR VALUES IN (1)
	WITH (autovacuum_enabled = false, toast.autovacuum_enabled = false);
CREATE TABLE outbox_message_2 PARTITION OF outbox_message FOR VALUES IN (2)
	WITH (autovacuum_enabled = false, toast.autovacuum_enabled = false);
CREATE INDEX outbox_message_order ON outbox_message (lane, seq);

-- Each lane has a sequence of positions and one that is its cursor. A cursor is
-- a sequence because it is written in place: an old snapshot elsewhere cannot
-- make it leave dead versions behind.
DO $$
BEGIN
	FOR lane IN 0..15 LOOP
		EXECUTE format('CREATE SEQUENCE outbox_seq_%s AS bigint CACHE 1', lane);
		EXECUTE format('CREATE SEQUENCE outbox_cursor_%s AS bigint MINVALUE 0 START 0', lane);
	END LOOP;
END $$;

CREATE TABLE outbox_lane (
	lane       smallint    PRIMARY KEY CHECK (lane BETWEEN 0 AND 15),
	owner      text, -- the relay that holds it
	epoch      bigint      NOT NULL DEFAULT 0, -- rises when the owner changes
	expires_at timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 50);
INSERT INTO outbox_lane (lane) SELECT generate_series(0, 15);

CREATE TABLE outbox_relay (
	relay      text        PRIMARY KEY,
	expires_at timestamptz NOT NULL
);

-- Messages whose delay is not over.
CREATE TABLE outbox_delayed (
	n          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	due_at     timestamptz NOT NULL,
	lane       smallint    NOT NULL,
	id         text        NOT NULL,
	topic      text        NOT NULL,
	key        text        NOT NULL,
	payload    bytea       NOT NULL,
	headers    jsonb
);
CREATE INDEX outbox_delayed_due ON outbox_delayed (due_at, n);

-- Messages set aside: one that failed, and those of its key behind it.
CREATE TABLE outbox_parked (
	lane       smallint    NOT NULL,
	seq        bigint      NOT NULL,
	attempts   integer     NOT NULL, -- 0: waits behind another
	next_at    timestamptz NOT NULL,
	error      text        NOT NULL,
	id         text        NOT NULL,
	topic      text        NOT NULL,
	key        text        NOT NULL,
	payload    bytea       NOT NULL,
	headers    jsonb,
	created_at timestamptz NOT NULL,
	PRIMARY KEY (lane, seq)
);
CREATE INDEX outbox_parked_key ON outbox_parked (lane, key, seq);

-- Dead letters.
CREATE TABLE outbox_dead (
	lane       smallint    NOT NULL,
	seq        bigint      NOT NULL,
	attempts   integer     NOT NULL,
	failed_at  timestamptz NOT NULL DEFAULT now(),
	error      text        NOT NULL,
	id         text        NOT NULL,
	topic      text        NOT NULL,
	key        text        NOT NULL,
	payload    bytea       NOT NULL,
	headers    jsonb,
	created_at timestamptz NOT NULL,
	PRIMARY KEY (lane, seq)
);
CREATE INDEX outbox_dead_id ON outbox_dead (id);

-- What consumers have processed; see outboxpg.Inbox.
CREATE TABLE outbox_inbox (
	consumer    text        NOT NULL,
	message_id  text        NOT NULL,
	received_at timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (consumer, message_id)
);
CREATE INDEX outbox_inbox_age ON outbox_inbox USING brin (received_at);
