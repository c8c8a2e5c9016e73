package audit_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"inkan/audit"
	"inkan/scope"
)

// failing is a real anchor that fails on demand, before or after it has done what it was asked.
type failing struct {
	audit.Anchor
	before, after atomic.Bool
}

var errFault = errors.New("the TPM does not answer")

func (f *failing) Advance(from, target uint64) (uint64, bool, error) {
	if f.before.Load() {
		return 0, false, errFault
	}
	v, moved, err := f.Anchor.Advance(from, target)
	if f.after.Load() {
		return 0, moved, errFault
	}
	return v, moved, err
}

// TestAnchorFails: where each answer waits for the binding, none is given while
// the counter does not answer, and what was recorded is answered afterwards.
func TestAnchorFails(t *testing.T) {
	a := newAnchored(t, 0)
	a.close(t)
	f := &failing{Anchor: a.options.Anchor}
	a.options.Anchor = f
	a.start(t)
	for _, fault := range []*atomic.Bool{&f.before, &f.after} {
		a.next++
		p := permit(t, a.scope, action(a.next, "1"))
		fault.Store(true)
		_, err := a.log.Record(context.Background(), p, a.id)
		if r, ok := errors.AsType[*scope.Refusal](err); !ok || r.Rule != scope.RuleRollback || !strings.Contains(r.Message, errFault.Error()) {
			t.Fatalf("the counter fails: %v", err)
		}
		if s := a.log.Anchoring(); s.Error == "" || s.Finding != nil {
			t.Errorf("the state: %+v", s)
		}
		fault.Store(false)
		r, err := a.log.Record(context.Background(), p, a.id)
		if err != nil || !r.Repeated() {
			t.Fatalf("the counter works again: %v", err)
		}
		if s := a.log.Anchoring(); s.Error != "" || s.Entries < r.Counter() {
			t.Errorf("the state: %+v", s)
		}
	}
	a.close(t)
	a.start(t)
	if f := a.log.Finding(); f != nil {
		t.Errorf("%+v", f)
	}
}

// TestAnchorPatience: a record that could not be bound for long takes nothing
// more, until it could.
func TestAnchorPatience(t *testing.T) {
	defer audit.AnchorPatience(0)()
	a := newAnchored(t, 10*time.Millisecond)
	a.close(t)
	f := &failing{Anchor: a.options.Anchor}
	a.options.Anchor = f
	a.start(t)
	f.before.Store(true)
	var err error
	for err == nil {
		err = a.order(t, time.Now())
		time.Sleep(time.Millisecond) // it is refused when its time is over
	}
	if r, ok := errors.AsType[*scope.Refusal](err); !ok || r.Rule != scope.RuleRollback || !strings.Contains(r.Message, "does not answer") {
		t.Fatal(err)
	}
	f.before.Store(false)
	for errors.Is(err, &scope.Refusal{Rule: scope.RuleRollback}) {
		err = a.order(t, time.Now())
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
}
