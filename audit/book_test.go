package audit_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"inkan/audit"
	"inkan/scope"
)

// TestBook: what is kept beside a record changes nothing but how long a start
// takes, whatever is in the file.
func TestBook(t *testing.T) {
	defer audit.KeepBookEvery(1_000_000, 10)()
	d := newWindowedDesk(t, `"max_orders_per_window":[{"count":60,"window":{"rolling_s":3600}}]`)
	file := d.path + ".book"
	n := uint64(0)
	fill := func(count int) {
		t.Helper()
		for range count {
			n++
			d.record(t, n)
		}
	}
	restart := func() {
		t.Helper()
		if err := d.log.Close(); err != nil {
			t.Fatal(err)
		}
		d.open(t)
	}
	used := func() []scope.Utilisation {
		t.Helper()
		u, err := d.log.Usage(t.Context(), d.scope)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	full := func() {
		t.Helper()
		n++
		if _, err := d.log.Record(context.Background(), permit(t, d.scope, action(n, "1")), d.id); !errors.Is(err, &scope.Refusal{Rule: scope.RuleOrdersWindow}) {
			t.Fatalf("the 61st order: %v", err)
		}
	}
	fill(20)
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	older := filepath.Join(t.TempDir(), "older.db")
	copyTo(t, d.path, older)
	d.open(t)
	fill(5) // not enough for another
	restart()
	if b, err := os.ReadFile(file); err != nil || !slices.Equal(b, first) {
		t.Fatalf("the file was written for five entries: %v", err)
	}
	fill(35)
	want := used()
	full()
	restart()
	second, err := os.ReadFile(file)
	if err != nil || slices.Equal(second, first) {
		t.Fatalf("the file was not renewed: %v", err)
	}
	if got := used(); !slices.Equal(got, want) {
		t.Errorf("with the file: %+v, expected %+v", got, want)
	}
	full()
	flipped := func(at int) []byte { b := slices.Clone(second); b[at] ^= 1; return b }
	for name, content := range map[string][]byte{
		"none": nil, "empty": {}, "an earlier one": first, "cut off": second[:len(second)-1], "longer": append(slices.Clone(second), 0), "other magic": flipped(0),
		"another counter": flipped(15), "another entry": flipped(20), "another sum": flipped(60), "another book": flipped(len(second) - 1), "the head alone": second[:80],
	} {
		if err := d.log.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if content != nil {
			if err := os.WriteFile(file, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		d.open(t)
		if got := used(); !slices.Equal(got, want) {
			t.Errorf("%s: %+v, expected %+v", name, got, want)
		}
		full()
		// So that the next Close has something to keep.
		for range 10 {
			full()
		}
	}
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.verify(t); err != nil {
		t.Fatal(err)
	}
	// The file of a later record does not fit an older one.
	copyTo(t, older, d.path)
	d.open(t)
	if got := used(); got[0].Used != "20" {
		t.Errorf("an older record has %+v", got)
	}
}

// TestBookWhileOpen: it is renewed while entries come in, for a process that is killed.
func TestBookWhileOpen(t *testing.T) {
	defer audit.KeepBookEvery(20, 1_000_000)()
	d := newWindowedDesk(t, `"max_orders_per_window":[{"count":1000,"window":{"rolling_s":3600}}]`)
	killed := filepath.Join(t.TempDir(), "killed.db")
	kill := scope.Kill{Scope: scope.KillAgent, Reason: "test", By: "nobody"}
	n := uint64(0)
	for _, err := os.Stat(d.path + ".book"); err != nil; _, err = os.Stat(d.path + ".book") {
		n++
		d.record(t, n)
		if n%20 == 0 {
			time.Sleep(time.Millisecond) // it is written beside
		}
	}
	e, err := kill.Event(d.scope)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.log.Event(t.Context(), e, d.id); err != nil {
		t.Fatal(err)
	}
	copyTo(t, d.path, killed)
	b, err := os.ReadFile(d.path + ".book")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(killed+".book", b, 0o600); err != nil {
		t.Fatal(err)
	}
	want, err := d.log.Usage(t.Context(), d.scope)
	if err != nil {
		t.Fatal(err)
	}
	for _, without := range []bool{false, true} {
		if without {
			if err := os.Remove(killed + ".book"); err != nil {
				t.Fatal(err)
			}
		}
		l, err := audit.Open(t.Context(), killed, audit.Options{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := l.Usage(t.Context(), d.scope)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("without the file %v: %+v, %v, expected %+v", without, got, err, want)
		}
		n++
		if _, err := l.Record(context.Background(), permit(t, d.scope, action(n, "1")), d.id); !errors.Is(err, &scope.Refusal{Rule: scope.RuleKill}) {
			t.Errorf("without the file %v: the kill is forgotten: %v", without, err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
