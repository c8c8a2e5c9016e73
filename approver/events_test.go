package approver_test

import (
	"path/filepath"
	"testing"

	"inkan/approver"
	"inkan/scope"
)

// event makes the next statement that of an event.
func event(kind scope.Kind, text string) func(*scope.Statement) {
	return func(s *scope.Statement) {
		*s = scope.Statement{Version: 1, Issuer: s.Issuer, Agent: s.Agent, Counter: s.Counter, Previous: s.Previous, Time: s.Time, Expires: s.Expires, Attestation: s.Attestation,
			Kind: kind, Event: text, Controls: s.Controls, Decision: scope.Decision{Decision: scope.DecisionEvent, Certificate: s.Decision.Certificate, Scope: s.Decision.Scope}}
	}
}

const stop = `{"by":"uid 0","reason":"runs wild","scope":"agent"}`

// TestKill: what the signer's record says of a kill holds here too, for as long
// as it lasts, and a signer that leaves it out gets nothing.
func TestKill(t *testing.T) {
	d := newDesk(t)
	path := filepath.Join(t.TempDir(), "record.db")
	open := func() *approver.Record {
		r, err := approver.OpenRecord(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		d.approver = d.newApprover(t, config(t, ""), r)
		return r
	}
	record := open()
	first := d.write(t, d.next(t, "10", nil))
	if err := d.decide(d.request(first)); err != nil {
		t.Fatal(err)
	}
	kill := d.write(t, d.next(t, "10", event(scope.EventKill, stop)))
	refused(t, "an event", approver.RuleStatement, d.decide(d.request(kill)))
	refused(t, "an order whose record lacks the event", approver.RuleGap, d.decide(d.request(d.next(t, "10", nil))))
	refused(t, "an order after the event", scope.RuleKill, d.decide(d.request(d.next(t, "10", nil), kill)))
	refused(t, "an order that names no event", approver.RuleStatement, d.decide(d.request(d.next(t, "10", func(s *scope.Statement) { s.Controls = 0 }), kill)))
	if err := d.approver.Append(t.Context(), d.client, d.entries(kill)); err != nil {
		t.Fatal(err)
	}
	if err := record.Close(); err != nil {
		t.Fatal(err)
	}
	record = open()
	defer func() {
		if err := record.Close(); err != nil {
			t.Error(err)
		}
	}()
	refused(t, "an order after a new start of the approver", scope.RuleKill, d.decide(d.request(d.next(t, "10", nil))))
	mass := func(s *scope.Statement) {
		s.Kind, s.Order, s.Decision.Notional = scope.OrderCancel, &scope.Order{ClOrdID: "2", OrigClOrdID: "1", SecurityID: "FR0000120271", SecurityIDSource: "4", Side: "1"}, nil
		s.Decision.Utilisation = d.book.Utilisation(d.scope(t), scope.UseOfStatement(s))
	}
	if err := d.decide(d.request(d.next(t, "10", mass))); err != nil {
		t.Errorf("a cancel after the kill: %v", err)
	}
}

func (d *desk) scope(t testing.TB) *scope.Scope {
	t.Helper()
	s, err := scope.ParseCanonical([]byte(scopeJSON))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// entries hands over entries alone.
func (d *desk) entries(list ...[]byte) *approver.Request {
	r := d.request(nil, list...)
	r.Nonce, r.Statement = nil, nil
	return r
}
