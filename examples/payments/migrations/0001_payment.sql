-- The legal transitions are data. No code path can store another one: the
-- trigger below notes the state that a payment comes from, and the foreign key
-- looks the pair up here.
CREATE TABLE payment_transition (
	from_state text NOT NULL,
	to_state   text NOT NULL,
	PRIMARY KEY (from_state, to_state)
);

INSERT INTO payment_transition VALUES
	('NONE', 'INITIATED'),
	('INITIATED', 'AUTHORIZED'),
	('INITIATED', 'DECLINED'),
	('INITIATED', 'PENDING_VERIFICATION'),
	('PENDING_VERIFICATION', 'AUTHORIZED'),
	('PENDING_VERIFICATION', 'DECLINED');

CREATE TABLE payment (
	id              uuid        PRIMARY KEY,
	attempt_id      uuid        NOT NULL UNIQUE, -- our reference at the gateway
	idempotency_key text        COLLATE "C" NOT NULL UNIQUE, -- for ever, whatever is remembered elsewhere
	request_hash    bytea       NOT NULL,
	order_id        text        COLLATE "C" NOT NULL,
	amount          bigint      NOT NULL CHECK (amount BETWEEN 1 AND 99999999999), -- minor units
	currency        text        NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
	method          text        NOT NULL CHECK (method IN ('card', 'paypal', 'wallet', 'gift_card')),
	token           text        NOT NULL,
	state           text        NOT NULL DEFAULT 'INITIATED',
	previous_state  text        NOT NULL DEFAULT 'NONE',
	seq             integer     NOT NULL DEFAULT 1,
	reason          text        NOT NULL DEFAULT '',
	gateway_id      text        NOT NULL DEFAULT '',
	created_at      timestamptz NOT NULL DEFAULT now(),
	updated_at      timestamptz NOT NULL DEFAULT now(),
	next_check_at   timestamptz NOT NULL, -- when the reconciler may look at it
	FOREIGN KEY (previous_state, state) REFERENCES payment_transition (from_state, to_state)
);

-- An order is paid once: another payment for it can begin only after all
-- earlier ones were declined.
CREATE UNIQUE INDEX payment_live_order ON payment (order_id) WHERE state <> 'DECLINED';

CREATE INDEX payment_unsettled ON payment (next_check_at) WHERE state IN ('INITIATED', 'PENDING_VERIFICATION');

CREATE TABLE payment_event (
	payment_id uuid        NOT NULL REFERENCES payment (id),
	seq        integer     NOT NULL,
	from_state text        NOT NULL,
	to_state   text        NOT NULL,
	at         timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (payment_id, seq)
);

CREATE FUNCTION payment_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'INSERT' THEN
		NEW.previous_state := 'NONE';
		NEW.seq := 1;
		RETURN NEW;
	END IF;
	IF (NEW.id, NEW.attempt_id, NEW.idempotency_key, NEW.request_hash, NEW.order_id, NEW.amount, NEW.currency, NEW.method, NEW.token, NEW.created_at)
		IS DISTINCT FROM
		(OLD.id, OLD.attempt_id, OLD.idempotency_key, OLD.request_hash, OLD.order_id, OLD.amount, OLD.currency, OLD.method, OLD.token, OLD.created_at) THEN
		RAISE EXCEPTION 'what a payment is for cannot change' USING ERRCODE = 'restrict_violation';
	END IF;
	IF NEW.state IS DISTINCT FROM OLD.state THEN
		NEW.previous_state := OLD.state;
		NEW.seq := OLD.seq + 1;
		NEW.updated_at := clock_timestamp();
	ELSE
		NEW.previous_state := OLD.previous_state;
		NEW.seq := OLD.seq;
	END IF;
	RETURN NEW;
END $$;

CREATE TRIGGER payment_before BEFORE INSERT OR UPDATE ON payment FOR EACH ROW EXECUTE FUNCTION payment_before();

CREATE FUNCTION payment_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF TG_OP = 'INSERT' OR NEW.seq <> OLD.seq THEN
		INSERT INTO payment_event (payment_id, seq, from_state, to_state) VALUES (NEW.id, NEW.seq, NEW.previous_state, NEW.state);
	END IF;
	RETURN NULL;
END $$;

CREATE TRIGGER payment_history AFTER INSERT OR UPDATE ON payment FOR EACH ROW EXECUTE FUNCTION payment_history();
