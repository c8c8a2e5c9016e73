package audit_test

import (
	"database/sql"
	"errors"
	"strings"
	"testing"
	"time"

	"inkan/audit"
	"inkan/scope"
)

const osMember = `"os":{"execute":["/usr"]},`

// confined returns a desk whose agent was started under confinement.
func confined(t *testing.T, change func(*scope.StartDocument)) (*desk, []byte) {
	t.Helper()
	d := newDeskWith(t, strings.Replace(scopeJSON, `"version"`, osMember+`"version"`, 1))
	doc := scope.StartDocument{Version: 1, Agent: d.agent.ID, Executable: scope.StartFile{Path: "/usr/bin/x", SHA256: strings.Repeat("0", 64)}, Files: []scope.StartFile{}, Args: []string{"x"}, OS: d.scope.OS().Digest(), Landlock: 7, Launcher: strings.Repeat("1", 64)}
	if change != nil {
		change(&doc)
	}
	b, err := doc.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if d.id.Run, err = doc.Run(); err != nil {
		t.Fatal(err)
	}
	return d, b
}

func (d *desk) recordConfined(t *testing.T) {
	t.Helper()
	p, err := scope.Check(d.scope, action(1, "100"), scope.Env{Now: time.Now(), AttestedAt: time.Now(), Run: d.id.Run})
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.log.Record(t.Context(), p, d.id)
	if err != nil {
		t.Fatal(err)
	}
	d.sign(t, r)
	if err := d.log.Refuse(t.Context(), action(2, "501"), &scope.Refusal{Rule: scope.RuleOrderNotional, Message: "too much"}, d.id); err != nil {
		t.Fatal(err)
	}
}

// TestStart: what statements say of a start is what the record's start document says.
func TestStart(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*scope.StartDocument)
		keep   bool
		sql    string
		want   string
	}{
		"a good one":            {keep: true},
		"no start document":     {want: "entry 1: its start document is not in the record"},
		"a changed document":    {keep: true, sql: `UPDATE start SET document = CAST(replace(CAST(document AS TEXT), '"x"', '"y"') AS BLOB)`, want: "entry 1: it says another thing of its start"},
		"another agent's start": {keep: true, change: func(d *scope.StartDocument) { d.Agent += "b" }, want: "entry 1: it says another thing of its start"},
		"not a start document":  {keep: true, sql: `UPDATE start SET document = CAST('{}' AS BLOB)`, want: "entry 1: start document"},
	} {
		t.Run(name, func(t *testing.T) {
			d, doc := confined(t, c.change)
			if c.keep {
				if err := d.log.AddStart(t.Context(), doc); err != nil {
					t.Fatal(err)
				}
			}
			d.recordConfined(t)
			if err := d.log.Close(); err != nil {
				t.Fatal(err)
			}
			if c.sql != "" {
				db, err := sql.Open("sqlite", d.path)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := db.Exec(c.sql); err != nil {
					t.Fatal(err)
				}
				if err := db.Close(); err != nil {
					t.Fatal(err)
				}
			}
			r, err := d.verify(t)
			if c.want == "" {
				if err != nil || r.Permits != 1 || r.Denials != 1 {
					t.Errorf("got %+v, %v", r, err)
				}
				return
			}
			if _, ok := errors.AsType[*audit.Unproven](err); !ok || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want something about %q", err, c.want)
			}
		})
	}
	d, doc := confined(t, nil)
	if err := d.log.AddStart(t.Context(), append(doc, ' ')); err == nil {
		t.Error("what is no start document was kept")
	}
}
