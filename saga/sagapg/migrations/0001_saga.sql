-- Sagas: a row each, which is all that is known of one. Names are unqualified:
-- the tables go to the first schema of search_path.

CREATE TABLE saga_runner (
	id         uuid        PRIMARY KEY,
	expires_at timestamptz NOT NULL,
	dead       boolean     NOT NULL DEFAULT false -- its sagas are free to take
) WITH (fillfactor = 50);

CREATE TABLE saga_instance (
	id         text        COLLATE "C" PRIMARY KEY,
	name       text        COLLATE "C" NOT NULL, -- of the definition
	version    integer     NOT NULL,
	status     text        NOT NULL CHECK (status IN ('running', 'compensating', 'done', 'compensated', 'stuck')),
	owner      uuid        REFERENCES saga_runner, -- who has it in hand: the fence
	wake_at    timestamptz, -- when to take it in hand, if nobody has it; null: not before it is edited
	deaths     integer     NOT NULL DEFAULT 0,
	cancel     text,
	signals    jsonb,      -- name -> payload in base64
	started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	ended_at   timestamptz,
	cause      text        NOT NULL DEFAULT '',
	reason     text        NOT NULL DEFAULT '',
	state      bytea       NOT NULL,
	steps      json        NOT NULL DEFAULT '[]' -- last, so that what is appended is all that changes on the page
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.02);

-- A row grows with each step, on its page: rows that have ended are soon gone.
-- None of these names a column that changes from step to step: a checkpoint
-- touches no index.
CREATE INDEX saga_instance_due ON saga_instance (name, wake_at) WHERE owner IS NULL AND wake_at IS NOT NULL;
CREATE INDEX saga_instance_owner ON saga_instance (owner) WHERE owner IS NOT NULL;
CREATE INDEX saga_instance_stuck ON saga_instance (id) WHERE status = 'stuck';
CREATE INDEX saga_instance_ended ON saga_instance (ended_at) WHERE ended_at IS NOT NULL;

-- What people have done.
CREATE TABLE saga_audit (
	n      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	saga   text        COLLATE "C" NOT NULL,
	at     timestamptz NOT NULL DEFAULT clock_timestamp(),
	actor  text        NOT NULL,
	action text        NOT NULL,
	detail text        NOT NULL,
	reason text        NOT NULL
);
CREATE INDEX saga_audit_saga ON saga_audit (saga, n);

-- Sagas that have ended, in four slots that are truncated in turn.
CREATE TABLE saga_control (
	one        boolean     PRIMARY KEY DEFAULT true CHECK (one),
	slot       smallint    NOT NULL DEFAULT 0, -- the one in use
	rotated_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO saga_control DEFAULT VALUES;

CREATE TABLE saga_archive (
	slot       smallint    NOT NULL,
	id         text        COLLATE "C" NOT NULL,
	name       text        COLLATE "C" NOT NULL,
	version    integer     NOT NULL,
	status     text        NOT NULL,
	cancel     text,
	signals    jsonb,
	started_at timestamptz NOT NULL,
	ended_at   timestamptz NOT NULL,
	cause      text        NOT NULL,
	state      bytea       NOT NULL,
	steps      json        NOT NULL
) PARTITION BY LIST (slot);
CREATE TABLE saga_archive_0 PARTITION OF saga_archive FOR VALUES IN (0);
CREATE TABLE saga_archive_1 PARTITION OF saga_archive FOR VALUES IN (1);
CREATE TABLE saga_archive_2 PARTITION OF saga_archive FOR VALUES IN (2);
CREATE TABLE saga_archive_3 PARTITION OF saga_archive FOR VALUES IN (3);
CREATE INDEX saga_archive_id ON saga_archive (id);

-- What participants have done for a saga; see sagapg.Barrier.
CREATE TABLE saga_barrier (
	saga text        COLLATE "C" NOT NULL,
	step text        COLLATE "C" NOT NULL,
	undo boolean     NOT NULL,
	at   timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (saga, step, undo)
);
CREATE INDEX saga_barrier_age ON saga_barrier USING brin (at);
