package audit_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"inkan/audit"
	"inkan/scope"
)

// kill writes a kill into the record.
func (d *desk) kill(t testing.TB, k scope.Kill) scope.Counter {
	t.Helper()
	e, err := k.Event(d.scope)
	if err != nil {
		t.Fatal(err)
	}
	n, err := d.log.Event(context.Background(), e, d.id)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// attempt asks for an action of the kind and returns what refused it.
func (d *desk) attempt(t testing.TB, n uint64, a *scope.Action) error {
	t.Helper()
	_, err := d.log.Record(context.Background(), permit(t, d.scope, a), d.id)
	return err
}

func cancel(n uint64) *scope.Action {
	a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"2","OrigClOrdID":"1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1"}}`, id(n)))
	if err != nil {
		panic(err)
	}
	return a
}

var stop = scope.Kill{Scope: scope.KillAgent, Reason: "runs wild", By: "uid 0"}

func TestEvent(t *testing.T) {
	d := newDesk(t)
	d.sign(t, d.record(t, 1))
	if n := d.kill(t, stop); n != 2 {
		t.Fatalf("the event is entry %d", n)
	}
	refused := &scope.Refusal{Rule: scope.RuleKill}
	if err := d.attempt(t, 2, action(2, "100")); !errors.Is(err, refused) {
		t.Errorf("an order after the kill: %v", err)
	}
	if err := d.attempt(t, 3, cancel(3)); err != nil {
		t.Errorf("a cancel after the kill: %v", err)
	}
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	d.open(t)
	if err := d.attempt(t, 4, action(4, "100")); !errors.Is(err, refused) {
		t.Errorf("an order after a new start: %v", err)
	}
	if r, err := d.verify(t); err != nil || r.Events != 1 || r.Permits != 2 || r.Denials != 2 || r.Entries != 5 {
		t.Fatalf("%+v, %v", r, err)
	}

	d.seal(t)
	export := d.export(t, audit.ExportOptions{})
	if r, err := d.verifyExport(export); err != nil || r[0].Events != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	if !bytes.Contains(export, []byte(`"event":"{\"by\":\"uid 0\",\"reason\":\"runs wild\",\"scope\":\"agent\"}"`)) {
		t.Error("the export does not have the event's text")
	}
	var unproven *audit.Unproven
	if _, err := d.verifyExport(bytes.Replace(export, []byte("runs wild"), []byte("runs well"), 1)); !errors.As(err, &unproven) {
		t.Errorf("a changed event verifies: %v", err)
	}
}

// TestEventLasts: an event is found at a start, however many entries and days ago it was.
func TestEventLasts(t *testing.T) {
	d := newDesk(t)
	now := time.Now()
	reopen := func() {
		if err := d.log.Close(); err != nil {
			t.Fatal(err)
		}
		var err error
		if d.log, err = audit.Open(context.Background(), d.path, audit.Options{Now: func() time.Time { return now }}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = d.log.Close() })
	}
	reopen()
	d.kill(t, scope.Kill{Scope: scope.KillVenue, Venue: "XLON", Reason: "halted", By: "uid 0"})
	d.kill(t, stop)
	now = now.Add(3 * scope.MaxWindow)
	for range 3 {
		if err := d.log.Refuse(t.Context(), nil, &scope.Refusal{Rule: scope.RuleForm, Message: "not JSON"}, d.id); err != nil {
			t.Fatal(err)
		}
	}
	reopen()
	p, err := scope.Check(d.scope, action(1, "1"), scope.Env{Now: now, AttestedAt: now})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.log.Record(t.Context(), p, d.id); !errors.Is(err, &scope.Refusal{Rule: scope.RuleKill}) {
		t.Errorf("an order after %s and a new start: %v", 3*scope.MaxWindow, err)
	}
}

// TestEventIsNeeded: an entry that leaves an event out of its account does not verify.
func TestEventIsNeeded(t *testing.T) {
	for name, change := range map[string]func(*scope.Statement){
		"no event named":    func(s *scope.Statement) { s.Controls = 0 },
		"a permit as event": func(s *scope.Statement) { s.Controls = 1 },
	} {
		d := newDesk(t)
		d.record(t, 1)
		d.kill(t, stop)
		if err := d.attempt(t, 3, cancel(3)); err != nil {
			t.Fatal(err)
		}
		if err := d.log.Close(); err != nil {
			t.Fatal(err)
		}
		d.rewrite(t, 3, change)
		_, err := d.verify(t)
		if u, ok := errors.AsType[*audit.Unproven](err); !ok || u.Rule != audit.RuleOrder {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := audit.Open(t.Context(), d.path, audit.Options{}); !errors.Is(err, audit.ErrDamaged) {
			t.Errorf("%s: the log opens: %v", name, err)
		}
	}
}

func TestEventForm(t *testing.T) {
	d := newDesk(t)
	for name, text := range map[string]string{
		"empty": "", "not JSON": "stop", "spelling": `{"scope":"agent","reason":"x","by":"y"}`, "scope": `{"by":"y","reason":"x","scope":"galaxy"}`,
		"venue": `{"by":"y","reason":"x","scope":"agent","venue":"XPAR"}`, "no venue": `{"by":"y","reason":"x","scope":"venue"}`, "line end": `{"by":"y","reason":"a\nb","scope":"agent"}`,
		"unknown": `{"by":"y","reason":"x","scope":"agent","until":"noon"}`, "long": `{"by":"y","reason":"` + strings.Repeat("x", 257) + `","scope":"agent"}`,
	} {
		if e, err := scope.NewEvent(scope.EventKill, text, d.scope); err == nil {
			t.Errorf("%s: %v", name, e)
		}
	}
	if _, err := scope.NewEvent("order.new", "{}", d.scope); err == nil {
		t.Error("an action passes for an event")
	}
	if _, err := scope.NewEvent(scope.EventKill, `{"by":"y","reason":"x","scope":"agent"}`, nil); err == nil {
		t.Error("an event without a scope")
	}
}

// rewrite changes the last entry of a closed log and makes the rest agree.
func (d *desk) rewrite(t testing.TB, n uint64, change func(*scope.Statement)) {
	t.Helper()
	db, err := sql.Open("sqlite", d.path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var b []byte
	if err := db.QueryRow("SELECT statement FROM leaf WHERE counter = ?", n).Scan(&b); err != nil {
		t.Fatal(err)
	}
	st, err := scope.ParseStatement(b)
	if err != nil {
		t.Fatal(err)
	}
	change(st)
	if b, err = st.Marshal(); err != nil {
		t.Fatal(err)
	}
	leaf, sum := tlog.RecordHash(b), sha256.Sum256(b)
	exec := func(query string, a ...any) {
		if _, err := db.Exec(query, a...); err != nil {
			t.Fatal(err)
		}
	}
	exec("UPDATE leaf SET statement = ? WHERE counter = ?", b, n)
	exec("UPDATE hash SET hash = ? WHERE idx = ?", leaf[:], tlog.StoredHashIndex(0, int64(n)-1))
	root, err := tlog.TreeHash(int64(n), tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			var h []byte
			if err := db.QueryRow("SELECT hash FROM hash WHERE idx = ?", x).Scan(&h); err != nil {
				return nil, err
			}
			copy(out[i][:], h)
		}
		return out, nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	exec("UPDATE head SET root = ?, previous = ?", root[:], sum[:])
}
