package approver_test

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/approver"
	"inkan/scope"
)

// controlled is a desk whose agent has controllers: one who may all, and one who may
// approve alone. Its limit for an order is soft.
func controlled(t *testing.T) (d *desk, risk, clerk *ecdsa.PrivateKey) {
	t.Helper()
	d, risk, clerk = newDesk(t), newKey(t), newKey(t)
	var list []string
	for _, c := range []struct {
		key       *ecdsa.PrivateKey
		may, name string
	}{{clerk, `"approve"`, "clerk"}, {risk, `"approve","override","policy"`, "risk"}} {
		text, err := scope.ControllerKey(&c.key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf(`{"key":%q,"may":[%s],"name":%q}`, text, c.may, c.name))
	}
	d.limits = strings.NewReplacer(
		`"allowed_venues":["XPAR"]`, `"allowed_venues":["XPAR"],"controllers":[`+strings.Join(list, ",")+`],"human_approval_above":[{"amount":"25000","currency":"EUR"}]`,
		`"amount":"15000"`, `"amount":"15000","block":"soft"`,
		`"amount":"20000"`, `"amount":"60000"`).Replace(scopeJSON)
	d.agent = d.certify(t, nil)
	return d, risk, clerk
}

func (d *desk) certified(t *testing.T) *scope.Scope {
	t.Helper()
	s, err := scope.ParseCanonical([]byte(d.limits))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// sign is what a controller does with an action.
type sign func(*scope.Action) string

// sized makes the next statement that of some shares, with authorizations.
func sized(s *scope.Statement, qty string, list []sign) {
	q := mustDecimal(qty)
	s.Order.OrderQty = &q
	for _, f := range list {
		s.Authorized = append(s.Authorized, f(s.Action()))
	}
}

// honest makes the next statement what a signer writes that holds what is in its record.
func (d *desk) honest(t *testing.T, qty string, list ...sign) func(*scope.Statement) {
	return func(s *scope.Statement) {
		t.Helper()
		sized(s, qty, list)
		p, err := scope.Check(d.certified(t), s.Action(), s.Env(s.Attestation.Time.Time))
		if err != nil {
			t.Fatal(err)
		}
		g, r := d.book.Decide(p, s.Time.Time)
		if r != nil {
			t.Fatal(r)
		}
		s.Decision.Notional.Amount, _, _ = p.Notional()
		s.Decision.Utilisation, s.Decision.Policy = g.Utilisation, g.Policy
	}
}

// lying makes it a permit of an order worth some amount, as if the certificate's
// limits over time were all that there is.
func (d *desk) lying(t *testing.T, qty, worth string, list ...sign) func(*scope.Statement) {
	return func(s *scope.Statement) {
		t.Helper()
		sized(s, qty, list)
		s.Decision.Notional.Amount = mustDecimal(worth)
		s.Decision.Utilisation = d.book.Utilisation(d.certified(t), scope.UseOfStatement(s))
	}
}

// TestPolicy: a policy in the agent's record narrows what the approver authorizes,
// whatever the signer says that it permitted; what is no policy of a controller does nothing.
func TestPolicy(t *testing.T) {
	d, risk, clerk := controlled(t)
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
	defer func() {
		if err := record.Close(); err != nil {
			t.Error(err)
		}
	}()
	now := time.Now().UTC().Truncate(time.Second)
	wide := strings.Replace(scopeJSON, `"max_notional_per_window"`, `"human_approval_above":[{"amount":"25000","currency":"EUR"}],"max_notional_per_window"`, 1)
	narrow := strings.NewReplacer(`"15000"`, `"5000"`, `"20000"`, `"7000"`).Replace(wide)
	policy := func(key *ecdsa.PrivateKey, agent string, version uint32, text string, expires time.Time) string {
		t.Helper()
		s, err := scope.Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		p, err := scope.SignPolicy(key, agent, version, s, now.Add(-time.Minute), expires)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	// send hands a policy over as the next event of the record. Only if it takes effect does the desk count it.
	send := func(text string, effective bool) *scope.Digest {
		t.Helper()
		e := d.next(t, "10", event(scope.EventPolicy, text))
		if st := d.place(t, e); effective {
			d.book.Replay(st)
		} else {
			d.book.Pass(st)
		}
		if err := d.approver.Append(t.Context(), d.client, d.entries(e)); err != nil {
			t.Fatal(err)
		}
		sum := scope.Digest(sha256.Sum256([]byte(text)))
		return &sum
	}
	passes := func(what, qty string) {
		t.Helper()
		if err := d.decide(d.request(d.write(t, d.next(t, "10", d.honest(t, qty))))); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	tries := func(what string, rule scope.Rule, change func(*scope.Statement)) {
		t.Helper()
		refused(t, what, rule, d.decide(d.request(d.next(t, "10", change))))
	}
	naming := func(sum *scope.Digest, change func(*scope.Statement)) func(*scope.Statement) {
		return func(s *scope.Statement) { change(s); s.Decision.Policy = sum }
	}

	passes("before the policy", "110") // 5,500
	sum := send(policy(risk, d.agent.ID, 2, narrow, now.Add(time.Hour)), true)
	tries("outside the policy, which is not named", scope.RuleOrderNotional, d.lying(t, "101", "5050"))
	tries("outside the policy, which is named", scope.RuleOrderNotional, naming(sum, d.lying(t, "101", "5050")))
	tries("above the policy's sum with what was before it", scope.RuleNotionalWindow, naming(sum, d.lying(t, "31", "1550")))
	tries("inside, without its name", approver.RuleUsage, naming(nil, d.honest(t, "10")))
	tries("inside, with another one's name", approver.RuleUsage, naming(&scope.Digest{1}, d.honest(t, "10")))
	tries("inside, with the certificate's use of limits", approver.RuleUsage, naming(sum, d.lying(t, "10", "500")))
	passes("inside", "10")

	// None of these takes its place.
	good := policy(risk, d.agent.ID, 3, narrow, now.Add(time.Hour))
	for what, text := range map[string]string{
		"of nobody":                 policy(newKey(t), d.agent.ID, 3, wide, now.Add(time.Hour)),
		"of one who may not":        policy(clerk, d.agent.ID, 3, wide, now.Add(time.Hour)),
		"of another agent":          policy(risk, d.agent.ID+"x", 3, wide, now.Add(time.Hour)),
		"with an older version":     policy(risk, d.agent.ID, 1, wide, now.Add(time.Hour)),
		"wider than the scope":      policy(risk, d.agent.ID, 3, strings.Replace(wide, `"15000"`, `"15001"`, 1), now.Add(time.Hour)),
		"with another signature":    good[:len(good)-8] + "AAAAAAAA",
		"that ended before it came": policy(risk, d.agent.ID, 3, wide, now.Add(-time.Second)),
	} {
		forged := send(text, false)
		tries("after a policy "+what, scope.RuleOrderNotional, naming(forged, d.lying(t, "101", "5050")))
		tries("inside, naming a policy "+what, approver.RuleUsage, naming(forged, d.honest(t, "1")))
	}
	passes("inside, after them", "10")

	// A signer that writes down what the policy forbids has it in its record, and no authorization.
	hidden := d.write(t, d.next(t, "10", naming(sum, d.lying(t, "101", "5050"))))
	if err := d.approver.Append(t.Context(), d.client, d.entries(hidden)); err != nil {
		t.Fatal(err)
	}
	refused(t, "outside the policy, in the record", scope.RuleOrderNotional, d.decide(d.request(hidden)))
	if err := record.Close(); err != nil {
		t.Fatal(err)
	}
	record = open()
	refused(t, "the same after a new start", scope.RuleOrderNotional, d.decide(d.request(hidden)))
	tries("outside the policy after a new start", scope.RuleOrderNotional, d.lying(t, "101", "5050"))

	// It ends, and only cancels pass until there is another one.
	end := time.Now().UTC().Truncate(time.Second).Add(2 * time.Second)
	send(policy(risk, d.agent.ID, 4, wide, end), true)
	time.Sleep(time.Until(end))
	tries("after its end", scope.RulePolicyExpired, d.lying(t, "1", "50"))
	cancel := d.next(t, "10", func(s *scope.Statement) {
		s.Kind, s.Order, s.Decision.Notional = scope.OrderCancel, &scope.Order{ClOrdID: "2", OrigClOrdID: "1", SecurityID: "FR0000120271", SecurityIDSource: "4", Side: "1"}, nil
		s.Decision.Utilisation = d.book.Utilisation(d.certified(t), scope.UseOfStatement(s))
	})
	if err := d.decide(d.request(d.write(t, cancel))); err != nil {
		t.Errorf("a cancel after its end: %v", err)
	}
	send(policy(risk, d.agent.ID, 5, wide, now.Add(time.Hour)), true)
	passes("under the next one", "101")
}

// TestAuthorizations: what a controller signed for one action lifts the limit
// that it names for that action, at the approver too, and nothing else.
func TestAuthorizations(t *testing.T) {
	d, risk, clerk := controlled(t)
	now := time.Now().UTC().Truncate(time.Second)
	until := func(key *ecdsa.PrivateKey, agent string, rule scope.Rule, expires time.Time) sign {
		return func(a *scope.Action) string {
			t.Helper()
			text, err := scope.SignAuthorization(key, agent, a, rule, "client is waiting", now.Add(-time.Minute), expires)
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
	}
	by := func(key *ecdsa.PrivateKey, rule scope.Rule) sign {
		return until(key, d.agent.ID, rule, now.Add(time.Hour))
	}
	lifts := by(risk, scope.RuleOrderNotional)
	var used string
	keep := func(a *scope.Action) string { used = lifts(a); return used }
	if err := d.decide(d.request(d.write(t, d.next(t, "10", d.honest(t, "400", keep))))); err != nil { // 20,000
		t.Fatalf("lifted: %v", err)
	}
	for _, x := range []struct {
		what string
		rule scope.Rule
		list []sign
	}{
		{"without one", scope.RuleOrderNotional, nil},
		{"of nobody", scope.RuleControlKey, []sign{by(newKey(t), scope.RuleOrderNotional)}},
		{"of one who may not", scope.RuleControlPower, []sign{by(clerk, scope.RuleOrderNotional)}},
		{"with another signature", scope.RuleControlSignature, []sign{func(a *scope.Action) string { s := lifts(a); return s[:len(s)-8] + "AAAAAAAA" }}},
		{"for the action before it", scope.RuleAuthorizationAction, []sign{func(*scope.Action) string { return used }}},
		{"for a smaller order", scope.RuleAuthorizationAction, []sign{func(a *scope.Action) string {
			o, less := *a.Order, *a
			q := mustDecimal("301")
			o.OrderQty, less.Order = &q, &o
			return lifts(&less)
		}}},
		{"of another agent", scope.RuleControlAgent, []sign{until(risk, d.agent.ID+"x", scope.RuleOrderNotional, now.Add(time.Hour))}},
		{"that has expired", scope.RuleControlTime, []sign{until(risk, d.agent.ID, scope.RuleOrderNotional, now.Add(-time.Second))}},
		{"of another limit", scope.RuleOrderNotional, []sign{by(risk, scope.RuleNotionalWindow)}},
		{"twice", scope.RuleAuthorizationTwice, []sign{lifts, lifts}},
	} {
		refused(t, "an authorization "+x.what, x.rule, d.decide(d.request(d.next(t, "10", d.lying(t, "400", "20000", x.list...)))))
	}

	// Above another amount a person approves besides.
	approves := by(clerk, scope.RuleApproval)
	refused(t, "not approved", scope.RuleApproval, d.decide(d.request(d.next(t, "10", d.lying(t, "600", "30000", lifts)))))
	refused(t, "approved, and not lifted", scope.RuleOrderNotional, d.decide(d.request(d.next(t, "10", d.lying(t, "600", "30000", approves)))))
	if err := d.decide(d.request(d.write(t, d.next(t, "10", d.honest(t, "600", lifts, approves))))); err != nil {
		t.Errorf("lifted and approved: %v", err)
	}
	// What was lifted counts like any other: 50,000 of 60,000 are used, and that limit is hard.
	refused(t, "above the sum", scope.RuleNotionalWindow, d.decide(d.request(d.next(t, "10", d.lying(t, "201", "10050")))))
	refused(t, "above the sum, lifted", scope.RuleAuthorizationHard, d.decide(d.request(d.next(t, "10", d.lying(t, "201", "10050", by(risk, scope.RuleNotionalWindow))))))
	if err := d.decide(d.request(d.write(t, d.next(t, "10", d.honest(t, "200"))))); err != nil {
		t.Errorf("what is left: %v", err)
	}
}

// TestControllersChange: an event that an approver sees after the agent's
// controllers have changed is that of a controller of its time, for as long as
// the agent could have shown it under its certificate. Afterwards it is not, nor when that was revoked.
func TestControllersChange(t *testing.T) {
	for name, revoked := range map[string]bool{"as it was": false, "revoked": true} {
		t.Run(name, func(t *testing.T) {
			d, before, after := newDesk(t), newKey(t), newKey(t)
			certify := func(key *ecdsa.PrivateKey) {
				text, err := scope.ControllerKey(&key.PublicKey)
				if err != nil {
					t.Fatal(err)
				}
				d.limits = strings.Replace(scopeJSON, `"allowed_venues":["XPAR"]`, fmt.Sprintf(`"allowed_venues":["XPAR"],"controllers":[{"key":%q,"may":["rearm"],"name":"risk"}]`, text), 1)
				d.agent = d.certify(t, nil)
			}
			certify(before)
			if err := d.decide(d.request(d.write(t, d.next(t, "1", nil)))); err != nil {
				t.Fatal(err)
			}
			kill := d.write(t, d.next(t, "1", event(scope.EventKill, stop)))
			now := time.Now().UTC().Truncate(time.Second)
			text, err := scope.SignRearm(before, d.agent.ID, 2, "prices checked", now, now.Add(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			rearm := d.write(t, d.next(t, "1", event(scope.EventRearm, text)))
			d.revoked[d.agent.Chain[0].SerialNumber.String()] = revoked
			certify(after)
			err = d.decide(d.request(d.write(t, d.next(t, "1", nil)), kill, rearm))
			if revoked {
				refused(t, "a re-arm under a certificate that was revoked", scope.RuleKill, err)
			} else if err != nil {
				t.Errorf("after the re-arm: %v", err)
			}
		})
	}
}
