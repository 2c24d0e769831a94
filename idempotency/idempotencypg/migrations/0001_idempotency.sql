-- One record per operation. lease_until is set while an execution claims the
-- key and NULL once the operation is completed.
--
-- A completion changes no indexed column, and the free space lets its row stay
-- on the page, so that the indexes do not grow with it.
CREATE TABLE idempotency_key (
	scope       text        COLLATE "C" NOT NULL,
	id          text        COLLATE "C" NOT NULL,
	fingerprint bytea       NOT NULL,
	token       text        COLLATE "C" NOT NULL,
	lease_until timestamptz,
	expires_at  timestamptz NOT NULL,
	result      bytea,
	PRIMARY KEY (scope, id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

CREATE INDEX idempotency_key_expires_at ON idempotency_key (expires_at);
