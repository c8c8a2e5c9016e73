package audit_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/audit"
)

// TestHostileFile: a file that somebody made for whoever verifies it has an end, and
// takes no memory.
func TestHostileFile(t *testing.T) {
	const numbers = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "
	text := func(sql string) func(*testing.T, *sqlFile) { return func(t *testing.T, f *sqlFile) { f.exec(t, sql) } }
	for name, x := range map[string]struct {
		change func(*testing.T, *sqlFile)
		want   string
	}{
		"entries without an end":      {text("DROP TABLE leaf; CREATE VIEW leaf AS " + numbers + "SELECT n AS counter, NULL AS id, x'00' AS payload, x'00' AS statement FROM c"), "no table leaf"},
		"certificates without an end": {text("DROP TABLE certificate; CREATE VIEW certificate AS " + numbers + "SELECT randomblob(32) AS sha256, randomblob(1000) AS chain FROM c"), "no table certificate"},
		"a head that takes for ever":  {text("DROP TABLE head; CREATE VIEW head AS " + numbers + "SELECT sum(n) AS size, x'' AS root, x'' AS previous, 0 AS time FROM c"), "no table head"},
		"a statement that is made": {text("DROP TABLE leaf; CREATE TABLE leaf(counter INTEGER PRIMARY KEY, id TEXT, payload BLOB, statement BLOB AS (zeroblob(900000000))); INSERT INTO leaf(counter) VALUES(1)"),
			"no column statement"},
		"a large statement": {text("UPDATE leaf SET statement = zeroblob(20000000)"), "too big"},
		"another type":      {text("DROP TABLE head; CREATE TABLE head(size, root, previous, time); INSERT INTO head VALUES('many', x'', x'', 0)"), "size"},
		"a page that is a table's many times": {func(t *testing.T, f *sqlFile) {
			f.exec(t, numbers+"INSERT INTO certificate SELECT randomblob(32), randomblob(40) FROM c LIMIT 3000")
			f.again(t, "certificate")
		}, "more rows than there is room for"},
		"no database": {func(t *testing.T, f *sqlFile) {
			f.close(t)
			if err := os.WriteFile(f.path, random(t, 20_000), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a database"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t)
			d.record(t, 1)
			if err := d.log.Close(); err != nil {
				t.Fatal(err)
			}
			f := openSQL(t, d.path)
			x.change(t, f)
			f.close(t)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			_, err := audit.VerifyFile(ctx, d.path, audit.VerifyOptions{Roots: d.ca.Roots})
			if u, ok := errors.AsType[*audit.Unproven](err); !ok || u.Rule != audit.RuleForm || !strings.Contains(u.Reason, x.want) {
				t.Errorf("%v, expected %q", err, x.want)
			}
		})
	}
	if _, err := audit.VerifyFile(t.Context(), filepath.Join(t.TempDir(), "none"), audit.VerifyOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func random(t *testing.T, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

// sqlFile is a database that a test changes.
type sqlFile struct {
	path string
	db   *sql.DB
}

func openSQL(t *testing.T, path string) *sqlFile {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return &sqlFile{path, db}
}

func (f *sqlFile) exec(t *testing.T, text string, args ...any) {
	t.Helper()
	if _, err := f.db.Exec(text, args...); err != nil {
		t.Fatal(err)
	}
}

func (f *sqlFile) close(t *testing.T) {
	t.Helper()
	if err := f.db.Close(); err != nil {
		t.Fatal(err)
	}
}

// again has each child of a table's root page be the same page.
func (f *sqlFile) again(t *testing.T, table string) {
	t.Helper()
	var root, size int
	if err := errors.Join(f.db.QueryRow("SELECT rootpage FROM sqlite_schema WHERE name = ?", table).Scan(&root), f.db.QueryRow("PRAGMA page_size").Scan(&size)); err != nil {
		t.Fatal(err)
	}
	f.exec(t, "PRAGMA wal_checkpoint(TRUNCATE)")
	f.close(t)
	b, err := os.ReadFile(f.path)
	if err != nil {
		t.Fatal(err)
	}
	page := b[(root-1)*size : root*size]
	if page[0] != 5 { // an interior page of a table
		t.Fatalf("the root page is of type %d", page[0])
	}
	cells := int(binary.BigEndian.Uint16(page[3:]))
	child := bytes.Clone(page[binary.BigEndian.Uint16(page[12:]):][:4])
	// As many cells as SQLite takes, all the first one.
	first := binary.BigEndian.Uint16(page[12:])
	most := min((int(binary.BigEndian.Uint16(page[5:]))-12)/2, (size-8)/6)
	for i := range max(cells, most) {
		binary.BigEndian.PutUint16(page[12+2*i:], first)
	}
	binary.BigEndian.PutUint16(page[3:], uint16(max(cells, most)))
	copy(page[8:], child)
	if err := os.WriteFile(f.path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
