package outboxpg_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/internal/pgtest"
	"github.com/ashlar-go/ashlar/outbox"
	"github.com/ashlar-go/ashlar/outbox/outboxpg"
)

// Writers may go through PgBouncer in transaction mode, where each of their
// transactions runs on another connection of the server.
func TestPgBouncer(t *testing.T) {
	direct := pgtest.Open(t, pgtest.Database(t))
	if err := outboxpg.Migrate(t.Context(), direct); err != nil {
		t.Fatal(err)
	}
	via := pgtest.Bounce(t, direct)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 20 {
				err := pgx.BeginFunc(t.Context(), via, func(tx pgx.Tx) error {
					return outboxpg.Append(t.Context(), tx, outbox.Message{ID: fmt.Sprintf("%d-%02d", w, i), Topic: "t", Key: fmt.Sprint(w)})
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	last := make(map[string]string)
	for _, m := range drain(t, direct, 160) {
		if m.ID <= last[m.Key] {
			t.Errorf("key %s: %s after %s", m.Key, m.ID, last[m.Key])
		}
		last[m.Key] = m.ID
	}
}
