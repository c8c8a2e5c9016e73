package issuer_test

import (
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"inkan/internal/problem"
	"inkan/internal/sqlite"
)

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
