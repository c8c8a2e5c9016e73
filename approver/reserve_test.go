package approver_test

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"inkan/approver"
	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/testca"
	"inkan/scope"
)

// reserveJSON is the scope of the reserve: a third of an order, inside scopeJSON.
var reserveJSON = strings.Replace(scopeJSON, `"max_order_notional":[{"amount":"15000"`, `"max_order_notional":[{"amount":"5000"`, 1)

// withReserve is a desk whose approver consents to a reserve for a minute.
func withReserve(t *testing.T) (d *desk, reserve *testca.Agent) {
	t.Helper()
	d = newDesk(t)
	d.approver = d.newApprover(t, reserveConfig(t, ""), d.record)
	return d, d.certifyReserve(t, reserveJSON, nil)
}

func reserveConfig(t *testing.T, before string) *approver.Config {
	t.Helper()
	file := filepath.Join(t.TempDir(), "reserve.yaml")
	if err := os.WriteFile(file, []byte(reserveJSON), 0o600); err != nil {
		t.Fatal(err)
	}
	return config(t, fmt.Sprintf("    reserve: {scope: %s, for: 60s}\n%s", file, before))
}

// certifyReserve makes an action certificate of a key in reserve mode.
func (d *desk) certifyReserve(t *testing.T, limits string, change func(*certext.Attestation)) *testca.Agent {
	t.Helper()
	policy, err := attest.PolicyKeyPublic(&newKey(t).PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	auth, err := attest.KeyPolicy(attest.ModeReserve, policy, policyRef)
	if err != nil {
		t.Fatal(err)
	}
	own := d.limits
	d.limits = limits
	defer func() { d.limits = own }()
	return d.certifyKey(t, newKey(t), auth, func(a *certext.Attestation) {
		a.Mode = attest.ModeReserve
		if change != nil {
			change(a)
		}
	})
}

func consentRequest(a *testca.Agent) *approver.Request {
	r := &approver.Request{Nonce: make([]byte, attest.NonceTPMSize)}
	for _, c := range a.Chain {
		r.Chain = append(r.Chain, c.Raw)
	}
	return r
}

func (d *desk) consents(t *testing.T, a *testca.Agent) error {
	t.Helper()
	_, err := d.approver.Consent(t.Context(), d.client, consentRequest(a))
	return err
}

// TestConsent: an approver consents for as long as it is configured to, and
// what it gave stands in its record.
func TestConsent(t *testing.T) {
	d, reserve := withReserve(t)
	path := filepath.Join(t.TempDir(), "record.db")
	record, err := approver.OpenRecord(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	d.approver = d.newApprover(t, reserveConfig(t, ""), record)
	r := consentRequest(reserve)
	for range 2 {
		x, err := d.approver.Consent(t.Context(), d.client, r)
		if err != nil {
			t.Fatal(err)
		}
		if x.Expiration != -60 {
			t.Errorf("expiration %d, -60 is expected", x.Expiration)
		}
		if err := attest.VerifyConsent(&d.key.PublicKey, x, r.Nonce, policyRef); err != nil {
			t.Error(err)
		}
		if err := attest.VerifyAuthorization(d.area, x, r.Nonce, [32]byte{}, policyRef); err == nil {
			t.Error("a consent passes for an authorization")
		}
	}
	if err := record.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var n, seconds int
	if err := db.QueryRowContext(t.Context(), "SELECT count(*), min(until - time) / 1000000 FROM consent WHERE agent = ?", d.agent.ID).Scan(&n, &seconds); err != nil || n != 2 || seconds != 60 {
		t.Errorf("the record has %d consents, of %d s: %v", n, seconds, err)
	}
}

// TestConsentRefused: to whom no consent is given.
func TestConsentRefused(t *testing.T) {
	d, reserve := withReserve(t)
	refused(t, "the key in approver mode", approver.RuleMode, d.consents(t, d.agent))
	r := d.request(d.next(t, "1", nil))
	r.Chain = consentRequest(reserve).Chain
	refused(t, "an authorization for the reserve's key", approver.RuleMode, d.decide(r))
	refused(t, "entries under the reserve's certificate alone", approver.RuleMode, d.approver.Append(t.Context(), d.client, &approver.Request{Chain: r.Chain, Entries: [][]byte{d.next(t, "1", nil)}}))
	refused(t, "a wider scope", approver.RuleScopeWider, d.consents(t, d.certifyReserve(t, scopeJSON, nil)))
	refused(t, "a key in an HSM", approver.RuleMode, d.consents(t, d.certifyReserve(t, reserveJSON, func(a *certext.Attestation) { a.Protection = certext.ProtectionHSMDeclared })))
	refused(t, "another key Name", approver.RuleKeyName, d.consents(t, d.certifyReserve(t, reserveJSON, func(a *certext.Attestation) { a.KeyName = strings.Repeat("00", 34) })))
	refused(t, "an attestation of last week", scope.RuleAttestationAge, d.consents(t, d.certifyReserve(t, reserveJSON, func(a *certext.Attestation) { a.Time = a.Time.Add(-7 * 24 * time.Hour) })))
	own := d.client
	d.client = d.tlsCertificate(t, "spiffe://example.org/agent/other")
	refused(t, "another agent", approver.RuleClient, d.consents(t, reserve))
	d.client = own
	d.revoked[reserve.Chain[0].SerialNumber.String()] = true
	refused(t, "a revoked certificate", approver.RuleRevoked, d.consents(t, reserve))
	clear(d.revoked)
	d.unknown = fmt.Errorf("no list")
	refused(t, "revocation is not known", approver.RuleRevocation, d.consents(t, reserve))
	d.unknown = nil
	if err := d.consents(t, reserve); err != nil {
		t.Errorf("after all of these: %v", err)
	}
	d.approver = d.newApprover(t, config(t, ""), d.record)
	refused(t, "no reserve is configured", approver.RuleReserve, d.consents(t, reserve))
	d.approver = d.newApprover(t, reserveConfig(t, ""), d.record)
	kill := d.write(t, d.next(t, "1", event(scope.EventKill, stop)))
	if err := d.approver.Append(t.Context(), d.client, d.entries(kill)); err != nil {
		t.Fatal(err)
	}
	refused(t, "a kill in the agent's record", scope.RuleKill, d.consents(t, reserve))
}

// TestConsentIssuerKills: a kill in the issuer's list, at one of the reserve's
// venues too, ends consents; and so does a list that is not there.
func TestConsentIssuerKills(t *testing.T) {
	d, reserve := withReserve(t)
	var kills []scope.IssuedKill
	working := true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !working {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		now := time.Now().UTC().Truncate(time.Second)
		text, err := (&scope.KillList{Number: 1, ThisUpdate: now, NextUpdate: now.Add(time.Hour), Kills: append([]scope.IssuedKill{}, kills...)}).Sign(d.ca.Key)
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write([]byte(text))
	}))
	defer server.Close()
	renew := func() { d.approver = d.newApprover(t, reserveConfig(t, "kills_url: "+server.URL+"\n"), d.record) }
	renew()
	if err := d.consents(t, reserve); err != nil {
		t.Fatal(err)
	}
	since := time.Now().UTC().Truncate(time.Second)
	for what, k := range map[string]scope.IssuedKill{
		"all agents": {ID: "k", Scope: scope.KillFirm, Reason: "drill", Since: since},
		"a venue":    {ID: "k", Scope: scope.KillVenue, Venue: "XPAR", Reason: "drill", Since: since},
	} {
		kills = []scope.IssuedKill{k}
		renew()
		refused(t, what, scope.RuleKill, d.consents(t, reserve))
	}
	working = false
	renew()
	refused(t, "no list", approver.RuleKillState, d.consents(t, reserve))
}

// TestReserveCounts: what was signed from the reserve counts when the approver sees it.
func TestReserveCounts(t *testing.T) {
	d, reserve := withReserve(t)
	agent, limits := d.agent, d.limits
	d.agent, d.limits = reserve, reserveJSON
	first := d.write(t, d.next(t, "100", nil)) // 5,000
	d.agent, d.limits = agent, limits
	refused(t, "without the entry", approver.RuleGap, d.decide(d.request(d.next(t, "300", nil))))
	if err := d.decide(d.request(d.write(t, d.next(t, "300", nil)), first)); err != nil { // 15,000
		t.Fatal(err)
	}
	refused(t, "more than is left", scope.RuleNotionalWindow, d.decide(d.request(d.next(t, "1", nil))))
}

// TestConsentRequestForm: chain and nonce, and nothing else.
func TestConsentRequestForm(t *testing.T) {
	nonce := strings.Repeat("A", 43) + "="
	if _, err := approver.ParseConsentRequest([]byte(`{"chain":["AA=="],"nonce":"` + nonce + `"}`)); err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{
		"nothing":           ``,
		"no chain":          `{"chain":[],"nonce":"` + nonce + `"}`,
		"too long a chain":  `{"chain":["AA==","AA==","AA==","AA=="],"nonce":"` + nonce + `"}`,
		"no nonce":          `{"chain":["AA=="]}`,
		"a short nonce":     `{"chain":["AA=="],"nonce":"AAAA"}`,
		"a statement":       `{"chain":["AA=="],"nonce":"` + nonce + `","statement":"AA=="}`,
		"entries":           `{"chain":["AA=="],"nonce":"` + nonce + `","entries":["AA=="]}`,
		"an unknown member": `{"chain":["AA=="],"nonce":"` + nonce + `","seconds":900}`,
	} {
		_, err := approver.ParseConsentRequest([]byte(text))
		refused(t, what, scope.RuleForm, err)
	}
}

// TestReserveConfig: a reserve is bounded, and says so.
func TestReserveConfig(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := write("good", reserveJSON)
	unbounded := write("unbounded", strings.Replace(reserveJSON, `"max_notional_per_window":[{"amount":"20000","currency":"EUR","window":{"rolling_s":3600}}],`, "", 1))
	for text, want := range map[string]string{
		"{scope: " + good + ", for: 15m}":             "",
		"{scope: " + good + ", for: 10s}":             "",
		"{scope: " + good + "}":                       "scope and for are expected",
		"{for: 1m}":                                   "scope and for are expected",
		"{scope: " + good + ", for: 16m}":             "10s to 15m0s",
		"{scope: " + good + ", for: 9s}":              "10s to 15m0s",
		"{scope: " + good + ", for: 10.5s}":           "whole seconds",
		"{scope: " + good + ", for: -1m}":             "10s to 15m0s",
		"{scope: " + unbounded + ", for: 1m}":         "no limit over time",
		"{scope: " + dir + "/none, for: 1m}":          "no such file",
		"{scope: " + good + ", for: 1m, x: 1}":        "x",
		"{scope: " + write("bad", "x") + ", for: 1m}": "bad",
	} {
		_, err := approver.ParseConfig([]byte("listen: 127.0.0.1:0\ntrust_domain: example.org\nkey: file:k\ncertificate: c\ncertificate_key: k\nca: ca\ncrl_url: http://x/crl\nrecord: r.db\nagents:\n  - name: mm-07\n    reserve: "+text+"\n"), dir)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %q is expected", text, err, want)
		}
	}
}

// consentable says whether a body asks for what may be consented to, for any session.
func consentable(body []byte, chain [][]byte) bool {
	q, err := approver.ParseConsentRequest(body)
	return err == nil && slices.EqualFunc(q.Chain, chain, bytes.Equal)
}

// TestFuzzedConsents: changed requests get no consent, and each a refusal.
func TestFuzzedConsents(t *testing.T) {
	d, reserve := withReserve(t)
	honest := consentRequest(reserve)
	m := &mutator{Rand: mrand.New(mrand.NewPCG(3, 4)), honest: []*approver.Request{honest}, other: newDesk(t).request(nil).Chain}
	ask := func(body []byte) error {
		q, err := approver.ParseConsentRequest(body)
		if err == nil {
			_, err = d.approver.Consent(t.Context(), d.client, q)
		}
		return err
	}
	for n := 0; n < 5000; {
		body := m.request()
		if consentable(body, honest.Chain) {
			continue
		}
		n++
		var refusal *scope.Refusal
		if err := ask(body); err == nil {
			t.Errorf("a consent for %.400s", body)
		} else if !errors.As(err, &refusal) {
			t.Errorf("%v, a refusal is expected, for %.400s", err, body)
		}
	}
	if err := ask(mustJSON(honest)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func FuzzParseConsentRequest(f *testing.F) {
	nonce := strings.Repeat("A", 43) + "="
	f.Add([]byte(`{"chain":["AA=="],"nonce":"` + nonce + `"}`))
	f.Add([]byte(`{"chain":[],"nonce":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := approver.ParseConsentRequest(b)
		if err != nil {
			return
		}
		if len(q.Chain) == 0 || len(q.Nonce) != attest.NonceTPMSize || len(q.Statement) != 0 || len(q.Entries) != 0 {
			t.Errorf("%q was taken as %+v", b, q)
		}
	})
}
