package schedulepg

import (
	"context"
	"strings"

	"github.com/ashlar-go/ashlar/schedule"
)

// ClaimTogether is Claim without the queue of those who look at the overlap of a
// schedule.
func (s *Store) ClaimTogether(ctx context.Context, req schedule.ClaimRequest) (schedule.Claim, error) {
	return s.claim(ctx, &req, strings.Replace(lockSQL, oneAtATime, "", 1))
}
