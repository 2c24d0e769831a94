-- The order service's own tables. It shares none with payments: it learns what
-- it knows from payment.events.
CREATE TABLE orders (
	id         text        COLLATE "C" PRIMARY KEY,
	state      text        NOT NULL CHECK (state IN ('AWAITING_PAYMENT', 'PAYMENT_FAILED', 'CONFIRMED')),
	payment_id uuid        NOT NULL, -- the one that decided the state
	amount     bigint      NOT NULL CHECK (amount > 0),
	currency   text        NOT NULL,
	updated_at timestamptz NOT NULL DEFAULT now()
);

-- Records that no code can make sense of. They are set aside so that those
-- behind them are not held up.
CREATE TABLE order_rejected (
	topic     text        NOT NULL,
	partition integer     NOT NULL,
	"offset"  bigint      NOT NULL,
	reason    text        NOT NULL,
	at        timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (topic, partition, "offset")
);
