// Package app is what every reference service's HTTP side has in common: a
// server that drains, health and readiness, request ids, and problem details.
package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// ServerOptions tunes a [Server]. The zero value of each field means its default.
type ServerOptions struct {
	// Drain bounds how long Run waits for requests in flight once its context
	// has ended. Default 15 s.
	Drain time.Duration
	// Ready tells whether the service can do its work. Default: always.
	Ready func(ctx context.Context) error
	// Logger gets one line for each request. Default slog.Default().
	Logger *slog.Logger
}

// A Server serves one handler, and beside it GET /healthz, which says that the
// process lives, and GET /readyz, which says whether to send it requests.
type Server struct {
	http     *http.Server
	opts     ServerOptions
	draining atomic.Bool
}

// NewServer returns a server of handler. It starts nothing; see [Server.Run].
func NewServer(handler http.Handler, opts *ServerOptions) *Server {
	s := &Server{}
	if opts != nil {
		s.opts = *opts
	}
	if s.opts.Drain <= 0 {
		s.opts.Drain = 15 * time.Second
	}
	if s.opts.Logger == nil {
		s.opts.Logger = slog.Default()
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		WriteJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	})
	mux.HandleFunc("GET /readyz", s.ready)
	mux.Handle("/", observe(s.opts.Logger, handler))
	s.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		IdleTimeout:       60 * time.Second,
		// A header of 1 MiB is refused by the handler, with problem details;
		// net/http would refuse it with plain text.
		MaxHeaderBytes: 1<<20 + 64<<10,
		ErrorLog:       slog.NewLogLogger(s.opts.Logger.Handler(), slog.LevelDebug),
	}
	return s
}

func (s *Server) ready(w http.ResponseWriter, r *http.Request) {
	err := error(nil)
	switch {
	case s.draining.Load():
		err = errors.New("draining")
	case s.opts.Ready != nil:
		ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
		defer cancel()
		err = s.opts.Ready(ctx)
	}
	if err != nil {
		s.opts.Logger.WarnContext(r.Context(), "not ready", "error", err)
		WriteProblem(w, &Problem{Type: "about:blank", Title: "Not ready", Status: http.StatusServiceUnavailable})
		return
	}
	WriteJSON(w, http.StatusOK, map[string]string{"status": "ready"})
}

// Run serves on ln, which it closes, until ctx ends. Then it reports not ready,
// takes no new connections, lets requests in flight finish and returns nil; if
// they do not within ServerOptions.Drain, it cuts them and returns an error.
func (s *Server) Run(ctx context.Context, ln net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- s.http.Serve(ln) }()
	select {
	case err := <-failed:
		return fmt.Errorf("app: serve: %w", err)
	case <-ctx.Done():
	}
	s.draining.Store(true)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.opts.Drain)
	defer cancel()
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(fmt.Errorf("app: requests were cut off: %w", err), s.http.Close())
	}
	return nil
}
