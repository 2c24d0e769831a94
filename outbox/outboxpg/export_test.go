package outboxpg

import (
	"context"

	"github.com/ashlar-go/ashlar/outbox"
)

// FetchAcrossGaps is Fetch without the gap rule, for the test that shows that
// the suite notices.
func (s *Store) FetchAcrossGaps(ctx context.Context, from []outbox.Position, limit int) ([]outbox.Record, error) {
	recs, err := s.parked(ctx, from, maxParked)
	if err != nil {
		return nil, err
	}
	fresh, err := s.read(ctx, from, limit, limit)
	return append(recs, fresh...), err
}
