package audit_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"inkan/audit"
	"inkan/internal/anchor"
	"inkan/scope"
	"inkan/simulator"
	"inkan/tpm"
)

// anchored is a desk whose record is bound to a counter in a TPM.
type anchored struct {
	*desk
	sim     *simulator.TPM
	dev     *tpm.Device
	options audit.Options
	next    uint64
}

func newAnchored(t *testing.T, every time.Duration) *anchored {
	t.Helper()
	d := newWindowedDesk(t, `"max_orders_per_window":[{"count":100,"window":{"rolling_s":1200}}]`)
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Dir(d.path)); err != nil {
		t.Fatal(err)
	}
	d.path = filepath.Join(t.TempDir(), "log.db")
	a := &anchored{desk: d, options: audit.Options{Program: [32]byte{1}, BindEvery: every}}
	a.sim, a.dev, a.options.Anchor = newAnchor(t, true)
	a.start(t)
	return a
}

func newAnchor(t *testing.T, makes bool) (*simulator.TPM, *tpm.Device, audit.Anchor) {
	t.Helper()
	sim := simulator.TPMForTest(t)
	dev, err := tpm.Open(sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Close() })
	x := anchor.New(dev, "a")
	if makes {
		if err := x.Make(); err != nil {
			t.Fatal(err)
		}
	}
	return sim, dev, x
}

func (a *anchored) start(t *testing.T) {
	t.Helper()
	var err error
	if a.log, err = audit.Open(t.Context(), a.path, a.options); err != nil {
		t.Fatal(err)
	}
	log := a.log
	t.Cleanup(func() { _ = log.Close() })
	if err := a.log.AddCertificate(t.Context(), a.agent.Chain); err != nil {
		t.Fatal(err)
	}
}

func (a *anchored) close(t *testing.T) {
	t.Helper()
	if err := a.log.Close(); err != nil {
		t.Fatal(err)
	}
}

// order records one order at a moment.
func (a *anchored) order(t *testing.T, at time.Time) error {
	t.Helper()
	a.next++
	p, err := scope.Check(a.scope, action(a.next, "1"), scope.Env{Now: at, AttestedAt: at})
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.log.Record(context.Background(), p, a.id)
	return err
}

// bound waits until all that is recorded is bound.
func (a *anchored) bound(t *testing.T) {
	t.Helper()
	for a.log.Anchoring().Entries != a.log.Head().Size {
		if f := a.log.Finding(); f != nil {
			t.Fatal(f.Found)
		}
		time.Sleep(time.Millisecond) // it is bound in its time
	}
}

// copyTo copies a record that may be open, as it is at one moment, into a place
// where nobody has it open.
func copyTo(t *testing.T, from, to string) {
	t.Helper()
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Remove(to + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	db, err := sql.Open("sqlite", "file:"+from+"?mode=ro&_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec("VACUUM INTO ?", to); err != nil {
		t.Fatal(err)
	}
}

// refuses: everything is refused by rollback, for the cause, and says what to do.
func (a *anchored) refuses(t *testing.T, cause scope.Cause) {
	t.Helper()
	size := a.log.Head().Size
	f := a.log.Finding()
	if f == nil || f.Cause != cause {
		t.Fatalf("found %+v, expected %s", f, cause)
	}
	r, ok := errors.AsType[*scope.Refusal](a.order(t, time.Now()))
	if !ok || r.Rule != scope.RuleRollback || !strings.Contains(r.Message, f.Found) {
		t.Fatalf("an order: %v", r)
	}
	if _, err := a.log.Seal(t.Context(), a.id); !errors.Is(err, &scope.Refusal{Rule: scope.RuleRollback}) {
		t.Fatalf("a head: %v", err)
	}
	if a.log.Head().Size != size {
		t.Fatal("something was recorded")
	}
}

// recovers takes the record up again and shows that windows count as used up
// until they have aged out, if something may be missing.
func (a *anchored) recovers(t *testing.T, loses bool) {
	t.Helper()
	if _, err := a.log.Recover(t.Context(), a.scope, "", "uid 0", a.id); err == nil {
		t.Fatal("recovered without a reason")
	}
	if _, err := a.log.Recover(t.Context(), a.scope, "the disk was replaced", "uid 0", a.id); err != nil {
		t.Fatal(err)
	}
	if _, err := a.log.Recover(t.Context(), a.scope, "again", "uid 0", a.id); err == nil {
		t.Fatal("recovered twice")
	}
	err := a.order(t, time.Now())
	if r, _ := errors.AsType[*scope.Refusal](err); loses != errors.Is(err, &scope.Refusal{Rule: scope.RuleOrdersWindow}) || loses && time.Until(r.FreeAt) < time.Minute {
		t.Fatalf("an order after the recovery: %v", err)
	}
	a.close(t)
	a.start(t)
	if f := a.log.Finding(); f != nil {
		t.Fatalf("after the recovery: %+v", f)
	}
	if err := a.order(t, time.Now()); loses != errors.Is(err, &scope.Refusal{Rule: scope.RuleOrdersWindow}) {
		t.Fatalf("an order after a restart: %v", err)
	}
	if err := a.order(t, time.Now().Add(21*time.Minute)); err != nil {
		t.Fatalf("an order when the window has passed: %v", err)
	}
	a.bound(t)
	a.close(t)
	if _, err := a.verify(t); err != nil {
		t.Fatal(err)
	}
}

// TestRollback: whatever else than the latest record stands in its place is
// found, and nothing is signed until it is recovered.
func TestRollback(t *testing.T) {
	setup := func(t *testing.T) (a *anchored, copied string) {
		a = newAnchored(t, time.Millisecond)
		if err := a.order(t, time.Now()); err != nil {
			t.Fatal(err)
		}
		a.bound(t)
		copied = filepath.Join(t.TempDir(), "copy.db")
		copyTo(t, a.path, copied)
		if err := a.order(t, time.Now()); err != nil {
			t.Fatal(err)
		}
		a.bound(t)
		return a, copied
	}
	t.Run("nothing", func(t *testing.T) {
		a, _ := setup(t)
		a.close(t)
		a.start(t)
		if f := a.log.Finding(); f != nil {
			t.Fatalf("%+v", f)
		}
		if err := a.order(t, time.Now()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("the process is killed", func(t *testing.T) {
		a := newAnchored(t, time.Hour) // what follows is not bound
		if err := a.order(t, time.Now()); err != nil {
			t.Fatal(err)
		}
		killed := filepath.Join(t.TempDir(), "killed.db")
		copyTo(t, a.path, killed) // as it is on disk at this moment
		a.path = killed
		a.start(t)
		if f := a.log.Finding(); f != nil {
			t.Fatalf("%+v", f)
		}
	})
	t.Run("an older copy", func(t *testing.T) {
		a, copied := setup(t)
		a.close(t)
		copyTo(t, copied, a.path)
		a.start(t)
		a.refuses(t, scope.CauseRollback)
		a.recovers(t, true)
	})
	t.Run("an older copy, after a shutdown of the host", func(t *testing.T) {
		a, copied := setup(t)
		a.close(t)
		a.dev.Release()
		if err := errors.Join(a.sim.Close(), a.sim.Restart()); err != nil {
			t.Fatal(err)
		}
		copyTo(t, copied, a.path)
		a.start(t)
		a.refuses(t, scope.CausePower) // the gap could be a loss of power: it is treated alike
		a.recovers(t, true)
	})
	t.Run("deleted", func(t *testing.T) {
		a, _ := setup(t)
		a.close(t)
		if err := os.Remove(a.path); err != nil {
			t.Fatal(err)
		}
		a.start(t)
		a.refuses(t, scope.CauseLost)
		a.recovers(t, true)
	})
	t.Run("on another host", func(t *testing.T) {
		a, _ := setup(t)
		a.close(t)
		_, _, a.options.Anchor = newAnchor(t, true)
		a.start(t)
		a.refuses(t, scope.CauseDevice)
		a.recovers(t, true)
	})
	t.Run("on another host without a counter", func(t *testing.T) {
		a, _ := setup(t)
		a.close(t)
		_, _, a.options.Anchor = newAnchor(t, false)
		a.start(t)
		a.refuses(t, scope.CauseLost)
		a.recovers(t, true)
	})
	t.Run("by another program", func(t *testing.T) {
		a, _ := setup(t)
		a.close(t)
		a.options.Program = [32]byte{2}
		a.start(t)
		a.refuses(t, scope.CauseProgram)
		a.recovers(t, false)
	})
	t.Run("two on copies", func(t *testing.T) {
		a, _ := setup(t)
		b := *a
		second := *a.desk
		b.desk = &second
		b.path = filepath.Join(t.TempDir(), "second.db")
		copyTo(t, a.path, b.path)
		b.start(t)
		if f := b.log.Finding(); f != nil {
			t.Fatalf("the second: %+v", f)
		}
		for a.log.Finding() == nil {
			_ = a.order(t, time.Now()) // the next binding finds it
			time.Sleep(time.Millisecond)
		}
		a.refuses(t, scope.CauseShared)
		a.recovers(t, true)
		for b.log.Finding() == nil {
			_ = b.order(t, time.Now())
			time.Sleep(time.Millisecond)
		}
		b.refuses(t, scope.CauseShared)
	})
	t.Run("loss of power", func(t *testing.T) {
		a, _ := setup(t)
		a.close(t)
		a.dev.Release()
		if err := errors.Join(a.sim.Kill(), a.sim.Restart()); err != nil {
			t.Fatal(err)
		}
		a.start(t)
		a.refuses(t, scope.CausePower)
		a.recovers(t, true)
	})
	t.Run("a counter that is made anew", func(t *testing.T) {
		a, _ := setup(t)
		a.close(t)
		fresh, _ := tpm.Open(a.sim.Address)
		t.Cleanup(func() { _ = fresh.Close() })
		a.options.Anchor = anchor.New(fresh, "b") // as if the index had been removed
		a.start(t)
		a.refuses(t, scope.CauseLost)
		a.recovers(t, true)
	})
}

// TestStrictBinding: where a record is bound with each commit, any copy is too
// old that misses one entry of a permit that was answered.
func TestStrictBinding(t *testing.T) {
	a := newAnchored(t, 0)
	copied := filepath.Join(t.TempDir(), "copy.db")
	copyTo(t, a.path, copied)
	var wg sync.WaitGroup
	for range 3 {
		a.next++
		p := permit(t, a.scope, action(a.next, "1"))
		wg.Go(func() {
			r, err := a.log.Record(context.Background(), p, a.id)
			if err != nil {
				t.Error(err)
			} else if b := a.log.Anchoring(); b.Entries < r.Counter() {
				t.Errorf("entry %d was answered when %d were bound", r.Counter(), b.Entries)
			}
		})
	}
	wg.Wait()
	// The process ends here, without closing anything.
	copyTo(t, copied, a.path+"2")
	a.path += "2"
	a.start(t)
	a.refuses(t, scope.CauseRollback)
}
