package pgmigrate

import (
	"context"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/ashlar-go/ashlar/internal/pgtest"
)

func TestApply(t *testing.T) {
	pool := pgtest.Pool(t)
	files := fstest.MapFS{
		"0001_a.sql": {Data: []byte(`CREATE TABLE a (n int); INSERT INTO a VALUES (1)`)},
		"readme.md":  {Data: []byte(`not SQL`)},
	}
	errs := make(chan error, 8)
	for range cap(errs) {
		go func() { errs <- Apply(context.Background(), pool, "applied", files) }()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	// A later version brings another file; one that fails undoes all of its call.
	files["0002_b.sql"] = &fstest.MapFile{Data: []byte(`INSERT INTO a VALUES (2)`)}
	files["0003_c.sql"] = &fstest.MapFile{Data: []byte(`nonsense`)}
	if err := Apply(t.Context(), pool, "applied", files); err == nil || !strings.Contains(err.Error(), "0003_c.sql") {
		t.Fatalf("Apply with a file that fails = %v, want its name", err)
	}
	var rows int
	count := func() int {
		t.Helper()
		if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM a`).Scan(&rows); err != nil {
			t.Fatal(err)
		}
		return rows
	}
	if got := count(); got != 1 {
		t.Errorf("%d rows after a failed call, want 1", got)
	}
	delete(files, "0003_c.sql")
	for range 2 {
		if err := Apply(t.Context(), pool, "applied", files); err != nil {
			t.Fatal(err)
		}
	}
	if got := count(); got != 2 {
		t.Errorf("%d rows, want each file applied once", got)
	}
}
