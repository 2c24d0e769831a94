-- Definitions, and one row for each run. Names are unqualified: the tables go to
-- the first schema of search_path.

CREATE TABLE schedule_definition (
	name         text        COLLATE "C" PRIMARY KEY,
	handler      text        COLLATE "C" NOT NULL,
	spec         text        NOT NULL,
	zone         text        NOT NULL,
	payload      bytea       NOT NULL,
	misfire      text        NOT NULL,
	backfill     integer     NOT NULL,
	grace        interval    NOT NULL,
	overlap      text        NOT NULL,
	jitter       interval    NOT NULL,
	timeout      interval    NOT NULL,
	attempts     integer     NOT NULL,
	retry_base   interval    NOT NULL,
	retry_max    interval    NOT NULL,
	at_most_once boolean     NOT NULL,
	revision     bigint      NOT NULL,
	version      bigint      NOT NULL DEFAULT 1, -- rises with every change above, and of paused
	paused       boolean     NOT NULL DEFAULT false,
	since        timestamptz NOT NULL DEFAULT now(), -- the ticks are those after it,
	next_tick    timestamptz,                        -- until the first of them is planned here
	next_due     timestamptz NOT NULL DEFAULT '-infinity', -- with its jitter; infinity when there are no more
	missed       bigint      NOT NULL DEFAULT 0
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 500);

CREATE INDEX schedule_definition_due ON schedule_definition (next_due) WHERE NOT paused;

-- Whoever makes the row of a tick has it run. attempt is the fence: it rises
-- with every claim, and an outcome names the one that it is of.
--
-- An extension of a lease changes no indexed column, so it stays on the page.
CREATE TABLE schedule_run (
	id          uuid        PRIMARY KEY,
	schedule    text        COLLATE "C" NOT NULL,
	tick        timestamptz NOT NULL,
	due_at      timestamptz NOT NULL,
	manual      boolean     NOT NULL DEFAULT false,
	key         text        COLLATE "C",
	payload     bytea,
	missed      integer     NOT NULL DEFAULT 0,
	state       text        NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed', 'skipped', 'lost')),
	attempt     integer     NOT NULL DEFAULT 0,
	failures    integer     NOT NULL DEFAULT 0,
	deaths      integer     NOT NULL DEFAULT 0,
	instance    text        NOT NULL DEFAULT '',
	lease_until timestamptz,
	started_at  timestamptz,
	finished_at timestamptz,
	error       text        NOT NULL DEFAULT ''
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

CREATE UNIQUE INDEX schedule_run_tick ON schedule_run (schedule, tick) WHERE NOT manual;
CREATE UNIQUE INDEX schedule_run_key ON schedule_run (schedule, key) WHERE key IS NOT NULL;
CREATE INDEX schedule_run_active ON schedule_run (schedule) WHERE state IN ('waiting', 'running');
CREATE INDEX schedule_run_history ON schedule_run (schedule, tick DESC);
CREATE INDEX schedule_run_finished ON schedule_run (finished_at) WHERE finished_at IS NOT NULL;
