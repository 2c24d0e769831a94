package stack

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// The programs that are fetched run, for root too, and parallel runs that fetch
// them at once do not harm each other.
func TestFetchedPostgres(t *testing.T) {
	if os.Getenv("ASHLAR_TEST_DOWNLOADS") != "1" {
		t.Skip("it downloads 30 MB; ASHLAR_TEST_DOWNLOADS=1 runs it")
	}
	cache, err := os.MkdirTemp("", "fetch-test-")
	if err == nil {
		err = os.Chmod(cache, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(cache)
	r := &run{dir: cache, log: testLog{t}, timeout: time.Minute}
	var bins [2]string
	var errs [2]error
	var wg sync.WaitGroup
	for i := range bins {
		wg.Go(func() { bins[i], errs[i] = fetchPostgres(t.Context(), r, cache) })
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil || bins[i] != bins[0] {
			t.Fatalf("fetch %d: %q, %v", i, bins[i], err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "fetch-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	svc, err := startPostgres(t.Context(), r, bins[0])
	if err != nil {
		t.Fatal(err)
	}
	svc.Name = Postgres
	defer func() {
		if err := svc.inst.close(); err != nil {
			t.Error(err)
		}
	}()
	if !strings.HasPrefix(svc.Version, "17.") {
		t.Errorf("version %q", svc.Version)
	}
	write(t, svc, "one")
	if err := svc.Restart(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if got := read(t, svc); got != "one" {
		t.Errorf("got %q", got)
	}
}
