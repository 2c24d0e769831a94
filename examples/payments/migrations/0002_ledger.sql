-- An append-only double-entry ledger. Amounts are minor units; a debit is
-- positive, a credit negative. The database itself refuses what does not
-- balance and whatever would alter what is written.
CREATE TABLE ledger_account (name text PRIMARY KEY);

INSERT INTO ledger_account VALUES
	('gateway_receivable'), -- what the gateway has taken for us and owes us
	('merchant_payable');   -- what we owe the seller

CREATE TABLE ledger_transaction (
	id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	payment_id uuid        NOT NULL REFERENCES payment (id),
	kind       text        NOT NULL CHECK (kind IN ('capture')),
	xact       xid8        NOT NULL DEFAULT pg_current_xact_id(),
	created_at timestamptz NOT NULL DEFAULT now(),
	UNIQUE (payment_id, kind)
);

CREATE TABLE ledger_entry (
	id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	transaction_id bigint NOT NULL REFERENCES ledger_transaction (id),
	account        text   NOT NULL REFERENCES ledger_account (name),
	currency       text   NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
	amount         bigint NOT NULL CHECK (amount <> 0)
);

CREATE INDEX ledger_entry_transaction ON ledger_entry (transaction_id);

-- At commit, the entries of a transaction add up to zero in each currency, and
-- there are some.
CREATE FUNCTION ledger_balanced() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	tx bigint := CASE TG_TABLE_NAME WHEN 'ledger_entry' THEN (to_jsonb(NEW) ->> 'transaction_id')::bigint ELSE NEW.id END;
BEGIN
	IF NOT EXISTS (SELECT FROM ledger_entry WHERE transaction_id = tx) THEN
		RAISE EXCEPTION 'ledger transaction % has no entries', tx USING ERRCODE = 'check_violation';
	END IF;
	IF EXISTS (SELECT FROM ledger_entry WHERE transaction_id = tx GROUP BY currency HAVING sum(amount) <> 0) THEN
		RAISE EXCEPTION 'ledger transaction % does not balance', tx USING ERRCODE = 'check_violation';
	END IF;
	RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER ledger_balanced AFTER INSERT ON ledger_entry
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION ledger_balanced();
CREATE CONSTRAINT TRIGGER ledger_balanced AFTER INSERT ON ledger_transaction
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION ledger_balanced();

-- Entries come in the database transaction that made their ledger transaction:
-- nothing is added to one that is committed.
CREATE FUNCTION ledger_closed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NOT EXISTS (SELECT FROM ledger_transaction WHERE id = NEW.transaction_id AND xact = pg_current_xact_id()) THEN
		RAISE EXCEPTION 'ledger transaction % is closed', NEW.transaction_id USING ERRCODE = 'check_violation';
	END IF;
	RETURN NEW;
END $$;

CREATE TRIGGER ledger_closed BEFORE INSERT ON ledger_entry FOR EACH ROW EXECUTE FUNCTION ledger_closed();

CREATE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	RAISE EXCEPTION '% is append-only: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END $$;

-- TRUNCATE fires no row trigger, so it needs one of its own. ENABLE ALWAYS holds
-- also under session_replication_role = replica.
DO $$
DECLARE t text;
BEGIN
	FOREACH t IN ARRAY ARRAY['ledger_account', 'ledger_transaction', 'ledger_entry', 'payment_event'] LOOP
		EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON %I FOR EACH ROW EXECUTE FUNCTION append_only()', t);
		EXECUTE format('CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON %I FOR EACH STATEMENT EXECUTE FUNCTION append_only()', t);
		EXECUTE format('ALTER TABLE %I ENABLE ALWAYS TRIGGER append_only, ENABLE ALWAYS TRIGGER append_only_truncate', t);
	END LOOP;
END $$;

ALTER TABLE ledger_entry ENABLE ALWAYS TRIGGER ledger_balanced, ENABLE ALWAYS TRIGGER ledger_closed;
ALTER TABLE ledger_transaction ENABLE ALWAYS TRIGGER ledger_balanced;
