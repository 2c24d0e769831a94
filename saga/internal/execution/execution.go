// Package execution is what the saga package shares with the transactional
// steps of its stores.
package execution

import "context"

// A Step is one use of a step that can store its own checkpoint. It travels in
// the context that the step is given.
type Step struct {
	// Runner is who has the saga in hand.
	Runner string
	// Prepare returns the checkpoint, a saga.Checkpoint, that is due when the
	// step has ended with its state as it is now. Until Done nothing else is
	// stored of the saga.
	Prepare func() (any, error)
	// Done ends what Prepare began. The error is nil if the checkpoint is
	// stored; otherwise it is not, or it is not known.
	Done func(err error)
}

type contextKey struct{}

// With returns a context that carries s.
func With(ctx context.Context, s *Step) context.Context {
	return context.WithValue(ctx, contextKey{}, s)
}

// From returns the step that ctx carries, or nil.
func From(ctx context.Context) *Step {
	s, _ := ctx.Value(contextKey{}).(*Step)
	return s
}
