package schedulepg

import (
	"context"
	"log/slog"

	"github.com/jackc/pgx/v5"

	"github.com/ashlar-go/ashlar/internal/pglisten"
)

const channel = "schedule_wake"

// ListenOptions tunes [Listen]. The zero value of each field means its default.
type ListenOptions struct {
	// Logger reports failures. Default slog.Default().
	Logger *slog.Logger
}

// Listen calls wake, the Wake method of a runner, whenever a schedule is
// defined, changed, resumed or triggered by any process, until ctx ends, and
// then returns nil. Without it, runners see that at their next poll. It connects
// with dial and again whenever the connection fails; a connection through
// PgBouncer must be to a pool in session mode, or straight to the server.
func Listen(ctx context.Context, dial func(ctx context.Context) (*pgx.Conn, error), wake func(), opts *ListenOptions) error {
	var o ListenOptions
	if opts != nil {
		o = *opts
	}
	return pglisten.Listen(ctx, dial, channel, wake, o.Logger, "schedulepg: not listening, runners will poll")
}
