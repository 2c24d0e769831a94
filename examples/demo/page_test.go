package main

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/ashlar-go/ashlar/internal/pgtest"
)

// A person pays on the page, in a real browser, and sees the event appear.
func TestPage(t *testing.T) {
	browser := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			browser = path
			break
		}
	}
	if browser == "" {
		pgtest.Missing(t, "no Chromium on PATH; the demo's page is tested in one")
	}
	url := startDemo(t)

	profile, err := os.MkdirTemp("", "demo-profile-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // the browser's own processes may write for a moment after its end
		for range 100 {
			if os.RemoveAll(profile) == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Errorf("%s cannot be removed", profile)
	})
	opts := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(browser), chromedp.UserDataDir(profile),
		chromedp.NoSandbox, chromedp.DisableGPU, chromedp.WindowSize(1280, 1500),
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true))
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), opts...)
	defer cancel()
	ctx, cancel = chromedp.NewContext(ctx)
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()

	see := func(id, text string) chromedp.Action {
		return chromedp.Poll(`document.getElementById("`+id+`").textContent.includes("`+text+`")`, nil, chromedp.WithPollingInterval(50*time.Millisecond))
	}
	var wide bool
	steps := []struct {
		name    string
		actions chromedp.Tasks
	}{
		{"the page opens", chromedp.Tasks{chromedp.Navigate(url), see("payments", "No payments yet")}},
		{"an approved payment", chromedp.Tasks{
			chromedp.SetValue("#amount", "12,30"), chromedp.Click("#pay"),
			see("answer", "201"), see("ledger", "12.30 EUR"), see("events", "authorized"), see("orders", "confirmed"), see("verdict", "equal"),
		}},
		{"the same key again", chromedp.Tasks{chromedp.Click("#repeat"), see("answer", "200, from the record")}},
		{"the same key many times", chromedp.Tasks{chromedp.Click("#burst"), see("answer", "with 1 payment")}},
		{"a time-out after the charge, in yen", chromedp.Tasks{
			chromedp.SetValue("#amount", "777"), chromedp.SetValue("#currency", "JPY"), chromedp.Click(`input[value=tok_timeout_after]`), chromedp.Click("#pay"),
			see("answer", "Do not retry with a new key"), see("events", "pending verification"), see("ledger", "777 JPY"), see("verdict", "equal"),
		}},
		{"a crash of the service", chromedp.Tasks{
			chromedp.SetValue("#kill", "after-gateway"), chromedp.Click(`input[value=tok_ok]`), chromedp.SetValue("#amount", "555"), chromedp.Click("#pay"),
			see("answer", "502"), see("crashes", "1"), see("ledger", "555 JPY"), see("verdict", "equal"),
			chromedp.Click("#repeat"), see("answer", "200, from the record"),
		}},
		{"not an amount", chromedp.Tasks{chromedp.SetValue("#amount", "1.5"), chromedp.Click("#pay"), see("answer", "Not an amount")}},
		{"a phone", chromedp.Tasks{
			chromedp.EmulateViewport(360, 740, chromedp.EmulateMobile),
			chromedp.Evaluate(`document.documentElement.scrollWidth > window.innerWidth`, &wide),
		}},
	}
	for _, s := range steps {
		if err := chromedp.Run(ctx, s.actions); err != nil {
			var text string
			_ = chromedp.Run(ctx, chromedp.Text("main", &text))
			t.Fatalf("%s: %v\n%s", s.name, err, text)
		}
	}
	if wide {
		t.Error("on a phone the page scrolls sideways")
	}
}

// startDemo runs the demo until the test ends and returns the page's address.
func startDemo(t *testing.T) string {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	out, errs := &buffer{}, &buffer{}
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"--port", "0"}, out, errs) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("demo: %v", err)
		}
	})
	address := regexp.MustCompile(`http://127\.0\.0\.1:\d+`)
	for {
		if url := address.FindString(out.String()); url != "" && strings.HasSuffix(out.String(), "\n") {
			return url
		}
		select {
		case err := <-done:
			done <- err
			t.Fatalf("the demo ended: %v\n%s", err, errs.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// What the page's server passes on has one request id, not one of each server.
func TestProxiedAnswerHasOneRequestID(t *testing.T) {
	resp, err := http.Post(startDemo(t)+"/payments", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if ids := resp.Header.Values("X-Request-Id"); len(ids) != 1 {
		t.Errorf("request ids %v, want one", ids)
	}
}
