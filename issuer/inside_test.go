package issuer_test

import (
	"bytes"
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"inkan/internal/problem"
	"inkan/internal/sqlite"
)

// lines is a log that is read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestInsideStaysInside: what the inventory's database said is in the log, and not
// in the answer to a host.
func TestInsideStaysInside(t *testing.T) {
	o := newOffice(t)
	db, err := sqlite.Open(filepath.Join(o.dir, "inventory.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	_, err = db.ExecContext(t.Context(), "CREATE TRIGGER broken BEFORE UPDATE ON device BEGIN SELECT RAISE(ABORT, 'planted'); END")
	o.must(t, err)
	_, err = o.dev.Enrol(t.Context(), "https://"+o.addresses.Agent, o.roots, "a", nil)
	if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Status != http.StatusInternalServerError || strings.Contains(p.Detail, "planted") {
		t.Errorf("the host got %v", err)
	}
	if !strings.Contains(o.log.String(), "planted") {
		t.Errorf("the log does not say why: %s", o.log)
	}
}
