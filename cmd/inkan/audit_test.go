package main

import (
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	"inkan/audit"
)

// TestShowOfAnything: what stands in a file of somebody else reaches a terminal as text.
func TestShowOfAnything(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	log, err := audit.Open(t.Context(), path, audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(`INSERT INTO leaf VALUES(1, NULL, x'00', ?), (2, NULL, x'00', ?)`, []byte(`{"aud":"\u001b[2J","act":"\u202e","scope":{"dec":"de\nny","msg":"\u009b2J"},"ord":{"Side":"\u0007","SecurityID":"\t"}}`), []byte(`{"\u001b[2J":1}`)); err != nil {
		t.Fatal(err)
	}
	code, out, errs := call("", "audit", "show", "--log", path, "--limit", "1")
	if code != 0 || strings.Count(out, "\n") != 2 || strings.ContainsAny(out, "\x1b\u202e\u009b\a\t") {
		t.Errorf("exit code %d, %q, %s", code, out, errs)
	}
	code, out, errs = call("", "audit", "show", "--log", path, "--from", "2")
	if code == 0 || !strings.Contains(errs, `\x1b[2J`) || strings.ContainsAny(errs, "\x1b") {
		t.Errorf("exit code %d, %s, %q", code, out, errs)
	}
}
