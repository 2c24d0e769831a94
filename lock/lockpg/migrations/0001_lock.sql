-- One row per key that was ever wanted and not purged since; a key is free where
-- expires_at is over. The token of a lease comes from a sequence, so that no token
-- comes back when rows are removed.
--
-- No index but that of the key: with the free space, an acquisition or extension
-- stays on its page and touches no index.
CREATE TABLE lock_lease (
	key        text COLLATE "C" PRIMARY KEY,
	owner      text COLLATE "C" NOT NULL DEFAULT '',
	token      bigint NOT NULL DEFAULT 0,
	expires_at timestamptz NOT NULL DEFAULT 'epoch',
	used_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
	waited     boolean NOT NULL DEFAULT false
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 200);

CREATE SEQUENCE lock_token AS bigint OWNED BY lock_lease.token;

-- The highest token that a resource has seen; see Fence.
CREATE TABLE lock_fence (
	resource text COLLATE "C" PRIMARY KEY,
	token    bigint NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 200);
