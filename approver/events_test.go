package approver_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/approver"
	"inkan/scope"
)

// event makes the next statement that of an event.
func event(kind scope.Kind, text string) func(*scope.Statement) {
	return func(s *scope.Statement) {
		*s = scope.Statement{Version: 1, Issuer: s.Issuer, Agent: s.Agent, Counter: s.Counter, Previous: s.Previous, Time: s.Time, Expires: s.Expires, Attestation: s.Attestation, Open: s.Open,
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

// TestForgedRearm: a re-arm document that no controller signed changes nothing
// here, whatever the signer's record says.
func TestForgedRearm(t *testing.T) {
	d := newDesk(t)
	first := d.write(t, d.next(t, "10", nil))
	kill := d.write(t, d.next(t, "10", event(scope.EventKill, stop)))
	now := time.Now().UTC().Truncate(time.Second)
	text, err := scope.SignRearm(newKey(t), d.agent.ID, 2, "mended", now, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	rearm := d.write(t, d.next(t, "10", event(scope.EventRearm, text)))
	refused(t, "an order after it", scope.RuleKill, d.decide(d.request(d.next(t, "10", nil), first, kill, rearm)))
	if err := d.approver.Append(t.Context(), d.client, d.entries(first, kill, rearm)); err != nil {
		t.Fatal(err)
	}
	d.approver = d.newApprover(t, config(t, ""), d.record)
	refused(t, "and again", scope.RuleKill, d.decide(d.request(d.next(t, "10", nil))))
}

// TestIssuerKills: where the approver looks at the issuer's list, what is on it is stopped here.
func TestIssuerKills(t *testing.T) {
	d := newDesk(t)
	now := time.Now().UTC().Truncate(time.Second)
	var kills []scope.IssuedKill
	working := true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		l := scope.KillList{Number: 1, ThisUpdate: now, NextUpdate: now.Add(time.Hour), Kills: append([]scope.IssuedKill{}, kills...)}
		text, err := l.Sign(d.ca.Key)
		if err != nil || !working {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, text+"\n")
	}))
	defer server.Close()
	ask := func() error {
		d.approver = d.newApprover(t, config(t, "kills_url: "+server.URL+"\n"), d.record)
		return d.decide(d.request(d.next(t, "10", nil)))
	}
	kills = []scope.IssuedKill{{ID: "k", Scope: scope.KillFirm, Reason: "drill", Since: now}}
	refused(t, "all are stopped", scope.RuleKill, ask())
	working = false
	refused(t, "there is no list", approver.RuleKillState, ask())
	working, kills = true, nil
	if err := ask(); err != nil {
		t.Errorf("nobody is stopped: %v", err)
	}
}

// at makes the next statement one of another time, under what the signer's record has then.
func (d *desk) at(when time.Time, change func(*scope.Statement)) func(*scope.Statement) {
	return func(s *scope.Statement) {
		s.Time.Time, s.Expires = when, when.Unix()+30
		change(s)
	}
}

// TestNothingIsForgotten: a start of the approver looks for what is older than
// any window where the last entries say that it is. Entries that say otherwise are not taken,
// whatever they are.
func TestNothingIsForgotten(t *testing.T) {
	denied := func(s *scope.Statement) {
		s.Decision = scope.Decision{Decision: scope.DecisionDeny, Rule: scope.RuleSides, Message: "no", Certificate: s.Decision.Certificate, Scope: s.Decision.Scope}
	}
	unknown := event(scope.EventAcknowledge, `{"ClOrdID":"none","by":"uid 0","status":"filled","time":"2026-01-01T00:00:00.000000Z","venue":"XPAR"}`)
	for name, lie := range map[string]func(*scope.Statement){"a denial": denied, "a refused event": unknown, "another kill": event(scope.EventKill, `{"by":"uid 0","reason":"a second time","scope":"venue","venue":"XLON"}`), "a permit": func(*scope.Statement) {}} {
		for _, p := range places(t) {
			t.Run(name+", "+p.name, func(t *testing.T) {
				d := newDesk(t)
				s, err := scope.Parse([]byte(strings.NewReplacer(`"allowed_tif":["0"]`, `"allowed_tif":["0","1"],"max_open_orders":{"count":1}`).Replace(scopeJSON)))
				if err != nil {
					t.Fatal(err)
				}
				d.limits = string(s.Canonical())
				d.agent = d.certify(t, nil)
				long := time.Now().UTC().Truncate(time.Microsecond).Add(-30 * time.Hour)
				resting := d.at(long, func(s *scope.Statement) { s.Order.TimeInForce = "1" })
				open := func() *approver.Record {
					r := p.open(t)
					d.approver = d.newApprover(t, config(t, ""), r)
					return r
				}
				record := open()
				defer func() { _ = record.Close() }()
				order, kill := d.write(t, d.next(t, "1", resting)), d.write(t, d.next(t, "1", d.at(long, event(scope.EventKill, stop))))
				if err := d.approver.Append(t.Context(), d.client, d.entries(order, kill)); err != nil {
					t.Fatal(err)
				}
				forgets := func(s *scope.Statement) {
					lie(s)
					s.Controls, s.Open = 0, 0
				}
				lying := d.next(t, "1", forgets)
				err = d.approver.Append(t.Context(), d.client, d.entries(lying))
				refused(t, "an entry that forgets", approver.RuleStatement, err)
				lasting := scope.Counter(0)
				if err == nil { // what an attacker goes on with
					if st := d.place(t, lying); st.Kind == scope.EventKill {
						lasting = st.Counter
					}
				}
				if err := record.Close(); err != nil {
					t.Fatal(err)
				}
				record = open()
				d.book = scope.NewBook() // it forgot as well
				if b := d.next(t, "1", func(s *scope.Statement) { s.Controls = lasting }); d.decide(d.request(b)) == nil {
					t.Error("an order was authorized")
				}
			})
		}
	}
}
