package app_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-go/ashlar/examples/internal/app"
)

type log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func start(t *testing.T, h http.Handler, opts app.ServerOptions) (url string, l *log, stop func() error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l = &log{}
	opts.Logger = slog.New(slog.NewTextHandler(l, nil))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- app.NewServer(h, &opts).Run(ctx, ln) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = stop() })
	return "http://" + ln.Addr().String(), l, stop
}

type answer struct {
	StatusCode int
	Header     http.Header
}

func get(t *testing.T, url string, header ...string) (answer, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header}, string(body)
}

func TestServer(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /things/{id}", func(w http.ResponseWriter, r *http.Request) {
		app.WriteJSON(w, http.StatusOK, app.RequestID(r.Context()))
	})
	mux.HandleFunc("GET /panic", func(http.ResponseWriter, *http.Request) { panic("secret-in-a-panic") })
	broken := errors.New("no database")
	url, l, stop := start(t, mux, app.ServerOptions{Ready: func(context.Context) error { return broken }})

	if resp, _ := get(t, url+"/healthz"); resp.StatusCode != 200 {
		t.Error(resp.StatusCode)
	}
	if resp, body := get(t, url+"/readyz"); resp.StatusCode != 503 || strings.Contains(body, "database") {
		t.Error(resp.StatusCode, body)
	}
	for _, tt := range []struct {
		id   string
		kept bool
	}{{"", false}, {"abc-12", true}, {"01890000-1111-7111-8111-111111111111", true}, {"4111111111111111", false}, {"a b", false}, {strings.Repeat("a", 50), false}} {
		resp, body := get(t, url+"/things/secret-in-the-path?q=secret-in-the-query", "X-Request-Id", tt.id, "Cookie", "secret-in-a-header")
		id := resp.Header.Get("X-Request-Id")
		if id == "" || (id == tt.id) != tt.kept || strings.TrimSpace(body) != `"`+id+`"` {
			t.Errorf("id %q became %q, the handler saw %s", tt.id, id, body)
		}
	}
	if resp, body := get(t, url+"/panic"); resp.StatusCode != 500 || resp.Header.Get("Content-Type") != "application/problem+json" || strings.Contains(body, "secret") {
		t.Error(resp.StatusCode, body)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if s := l.String(); strings.Contains(s, "secret") || !strings.Contains(s, `route="GET /things/{id}"`) || !strings.Contains(s, "abc-12") {
		t.Errorf("the log:\n%s", s)
	}
}

// A request in flight is finished; one that takes too long is cut off.
func TestDrain(t *testing.T) {
	for _, tt := range []struct {
		name  string
		drain time.Duration
		clean bool
	}{{"finished", time.Minute, true}, {"cut off", 50 * time.Millisecond, false}} {
		t.Run(tt.name, func(t *testing.T) {
			entered, finish := make(chan struct{}), make(chan struct{})
			url, _, stop := start(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				close(entered)
				<-finish
				app.WriteJSON(w, http.StatusOK, "done")
			}), app.ServerOptions{Drain: tt.drain})
			answered := make(chan error, 1)
			go func() {
				resp, err := http.Get(url)
				if err == nil {
					resp.Body.Close()
				}
				answered <- err
			}()
			<-entered
			stopped := make(chan error, 1)
			go func() { stopped <- stop() }()
			if tt.clean {
				for { // until no new connection is taken
					conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
					if err != nil {
						break
					}
					conn.Close()
				}
				close(finish)
			}
			if err := <-answered; (err == nil) != tt.clean {
				t.Errorf("the request: %v", err)
			}
			if err := <-stopped; (err == nil) != tt.clean {
				t.Errorf("Run: %v", err)
			}
			if !tt.clean {
				close(finish)
			}
		})
	}
}
