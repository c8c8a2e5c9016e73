package approver_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	mrand "math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/approver"
	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/verify"
)

const scopeJSON = `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_notional_per_window":[{"amount":"20000","currency":"EUR","window":{"rolling_s":3600}}],"max_order_notional":[{"amount":"15000","currency":"EUR"}],"version":1}`

var policyRef = attest.PolicyRef("example.org")

// desk is an approver, an agent's certificates, and the record of its signer.
type desk struct {
	limits   string // of the agent, canonical
	ca       *testca.CA
	name     string // of the agent
	agent    *testca.Agent
	client   *x509.Certificate // the agent's TLS certificate
	key      *ecdsa.PrivateKey // the approver's
	area     []byte            // its TPMT_PUBLIC
	record   *approver.Record
	approver *approver.Approver
	revoked  map[string]bool // by serial number
	unknown  error           // of the revocation

	book     *scope.Book // as the signer keeps it
	counter  uint64
	previous scope.Digest
	log      [][]byte
	clock    time.Time // of the last entry
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Check implements verify.Revocation.
func (d *desk) Check(_ context.Context, c, _ *x509.Certificate, _ time.Time) error {
	if d.revoked[c.SerialNumber.String()] {
		return &verify.Refusal{Reason: verify.ReasonRevoked, Detail: "revoked"}
	}
	return d.unknown
}

func config(t testing.TB, more string) *approver.Config {
	t.Helper()
	dir := t.TempDir()
	c, err := approver.ParseConfig([]byte("listen: 127.0.0.1:0\ntrust_domain: example.org\nkey: file:k\ncertificate: c\ncertificate_key: k\nca: ca\ncrl_url: http://x/crl\nrecord: r.db\nagents:\n  - name: mm-07\n"+more), dir)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newDesk(t testing.TB) *desk {
	t.Helper()
	d := &desk{ca: testca.New(t), name: "mm-07", limits: scopeJSON, key: newKey(t), revoked: make(map[string]bool), book: scope.NewBook()}
	d.agent = d.certify(t, nil)
	d.client = d.tlsCertificate(t, d.agent.ID)
	var err error
	if d.area, err = attest.PolicyKeyPublic(&d.key.PublicKey); err != nil {
		t.Fatal(err)
	}
	if d.record, err = approver.OpenRecord(t.Context(), filepath.Join(t.TempDir(), "record.db")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.record.Close(); err != nil {
			t.Error(err)
		}
	})
	d.approver = d.newApprover(t, config(t, ""), d.record)
	return d
}

func (d *desk) newApprover(t testing.TB, c *approver.Config, r *approver.Record) *approver.Approver {
	t.Helper()
	a, err := approver.New(c, d.key, d.ca.Roots, d, r, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// certify makes an action certificate of a key in approver mode; change may
// change what it says of the key.
func (d *desk) certify(t testing.TB, change func(*certext.Attestation)) *testca.Agent {
	t.Helper()
	policy, err := attest.PolicyKeyPublic(&newKey(t).PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	auth, err := attest.KeyPolicy(attest.ModeApprover, policy, policyRef)
	if err != nil {
		t.Fatal(err)
	}
	return d.certifyKey(t, newKey(t), auth, change)
}

func (d *desk) certifyKey(t testing.TB, k crypto.Signer, auth []byte, change func(*certext.Attestation)) *testca.Agent {
	t.Helper()
	name, err := attest.ActionKeyName(k.Public().(*ecdsa.PublicKey), auth)
	if err != nil {
		t.Fatal(err)
	}
	a := certext.Attestation{Policy: "test", EvidenceSHA256: "00", Time: time.Now().UTC().Truncate(time.Second), Protection: certext.ProtectionTPM, Mode: attest.ModeApprover,
		KeyName: hex.EncodeToString(name), AuthPolicy: hex.EncodeToString(auth), EK: certext.EKPinned, Device: "test"}
	if change != nil {
		change(&a)
	}
	return d.ca.AgentWithKey(t, d.name, []byte(d.limits), k, func(c *x509.Certificate) {
		x, err := certext.AttestationExtension(a)
		if err != nil {
			t.Fatal(err)
		}
		c.ExtraExtensions[1] = x
	})
}

func (d *desk) tlsCertificate(t testing.TB, id string) *x509.Certificate {
	t.Helper()
	return d.tlsAgent(t, id).Chain[0]
}

func (d *desk) tlsAgent(t testing.TB, id string) *testca.Agent {
	t.Helper()
	return d.ca.Agent(t, strings.TrimPrefix(id, "spiffe://example.org/agent/"), []byte(scopeJSON), func(c *x509.Certificate) {
		c.SerialNumber, c.UnknownExtKeyUsage, c.ExtKeyUsage, c.ExtraExtensions = big.NewInt(mrand.Int64()), nil, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, []pkix.Extension{}
	})
}

func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it does not fail
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// next is the next statement of the signer's record, of an order of some
// shares at 50; change may change it.
func (d *desk) next(t testing.TB, qty string, change func(*scope.Statement)) []byte {
	t.Helper()
	a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":%q,"aud":"XPAR","act":"order.new","ord":{"ClOrdID":"1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"50","OrderQty":%q,"Currency":"EUR","TimeInForce":"0"}}`, newID(), qty))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	if now.Before(d.clock) {
		now = d.clock
	}
	leaf := d.agent.Chain[0]
	s, err := scope.ParseCanonical([]byte(d.limits))
	if err != nil {
		t.Fatal(err)
	}
	att, err := certext.ParseAttestation(leaf)
	if err != nil {
		t.Fatal(err)
	}
	permit, err := scope.Check(s, a, scope.Env{Now: now, AttestedAt: att.Time})
	if err != nil {
		t.Fatal(err)
	}
	notional, _, _ := permit.Notional()
	st := &scope.Statement{Version: 1, Issuer: leaf.Issuer.String(), Agent: d.agent.ID, Audience: a.Audience, ID: a.ID, Counter: scope.Counter(d.counter + 1), Previous: d.previous,
		Time: scope.Timestamp{Time: now}, Expires: now.Add(30 * time.Second).Unix(), Kind: a.Kind, Order: a.Order, Controls: d.book.Lasting(),
		Decision:    scope.Decision{Decision: scope.DecisionPermit, Certificate: sha256.Sum256(leaf.Raw), Scope: s.Hash(), Notional: &scope.Amount{Amount: notional, Currency: "EUR"}},
		Attestation: scope.Attestation{Evidence: att.EvidenceSHA256, Time: scope.Timestamp{Time: att.Time}}}
	st.Decision.Utilisation = d.book.Utilisation(s, scope.UseOfStatement(st))
	if change != nil {
		change(st)
	}
	b, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustDecimal(s string) scope.Decimal {
	d, err := scope.ParseDecimal(s)
	if err != nil {
		panic(err)
	}
	return d
}

// write puts a statement into the signer's record.
func (d *desk) write(t testing.TB, b []byte) []byte {
	t.Helper()
	d.book.Replay(d.place(t, b))
	return b
}

// place puts a statement into the signer's record, and counts nothing.
func (d *desk) place(t testing.TB, b []byte) *scope.Statement {
	t.Helper()
	st, err := scope.ParseStatement(b)
	if err != nil {
		t.Fatal(err)
	}
	d.counter, d.previous, d.clock = uint64(st.Counter), sha256.Sum256(b), st.Time.Time
	d.log = append(d.log, b)
	return st
}

func (d *desk) request(statement []byte, entries ...[]byte) *approver.Request {
	nonce := make([]byte, attest.NonceTPMSize)
	_, _ = rand.Read(nonce) // it does not fail
	r := &approver.Request{Nonce: nonce, Statement: statement, Entries: entries}
	for _, c := range d.agent.Chain {
		r.Chain = append(r.Chain, c.Raw)
	}
	return r
}

func (d *desk) decide(r *approver.Request) error {
	a, err := d.approver.Decide(context.Background(), d.client, r)
	if err != nil {
		return err
	}
	return genuine(d.area, d.agent, a, r)
}

// refused fails the test unless the rule refuses.
func refused(t *testing.T, what string, rule scope.Rule, err error) {
	t.Helper()
	var r *scope.Refusal
	if !errors.As(err, &r) || r.Rule != rule {
		t.Errorf("%s: %v, a refusal by %s is expected", what, err, rule)
	}
}

func TestDecide(t *testing.T) {
	d := newDesk(t)
	for i := range 3 {
		b := d.write(t, d.next(t, "10", nil))
		if err := d.decide(d.request(b)); err != nil {
			t.Fatalf("statement %d: %v", i+1, err)
		}
		if err := d.decide(d.request(b)); err != nil {
			t.Fatalf("statement %d, again for another session: %v", i+1, err)
		}
	}
}

// TestStatements: what is wrong with a statement is found without a trace: the
// true one is authorized afterwards.
func TestStatements(t *testing.T) {
	d := newDesk(t)
	d.write(t, d.next(t, "10", nil))
	if err := d.decide(d.request(d.log[0])); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name   string
		rule   scope.Rule
		change func(*scope.Statement)
	}{
		{"above the limit", scope.RuleOrderNotional, func(s *scope.Statement) { q := mustDecimal("301"); s.Order.OrderQty = &q }},
		{"another venue", scope.RuleVenues, func(s *scope.Statement) { s.Audience = "XLON" }},
		{"a notional of its own", approver.RuleStatement, func(s *scope.Statement) { s.Decision.Notional.Amount = mustDecimal("1") }},
		{"no notional", approver.RuleStatement, func(s *scope.Statement) { s.Decision.Notional = nil }},
		{"another certificate", approver.RuleStatement, func(s *scope.Statement) { s.Decision.Certificate[0]++ }},
		{"another scope", approver.RuleStatement, func(s *scope.Statement) { s.Decision.Scope[0]++ }},
		{"another agent", approver.RuleStatement, func(s *scope.Statement) { s.Agent += "x" }},
		{"another issuer", approver.RuleStatement, func(s *scope.Statement) { s.Issuer += "x" }},
		{"other evidence", approver.RuleStatement, func(s *scope.Statement) { s.Attestation.Evidence = "01" }},
		{"evidence of another time", approver.RuleStatement, func(s *scope.Statement) { s.Attestation.Time.Time = s.Attestation.Time.Time.Add(time.Second) }},
		{"a denial", approver.RuleStatement, func(s *scope.Statement) {
			s.Decision.Decision, s.Decision.Rule, s.Decision.Message = scope.DecisionDeny, "x", "y"
		}},
		{"of the future", approver.RuleTime, func(s *scope.Statement) { s.Time.Time = s.Time.Time.Add(time.Hour); s.Expires += 3600 }},
		{"expired", approver.RuleTime, func(s *scope.Statement) { s.Expires = time.Now().Unix() - 2 }},
		{"too long a life", approver.RuleTime, func(s *scope.Statement) { s.Expires += 3600 }},
		{"a gap", approver.RuleGap, func(s *scope.Statement) { s.Counter++ }},
		{"a fork", approver.RuleFork, func(s *scope.Statement) { s.Previous[0]++ }},
		{"a used number", approver.RuleFork, func(s *scope.Statement) { s.Counter--; s.Previous = scope.Digest{} }},
		{"earlier than its predecessor", approver.RuleStatement, func(s *scope.Statement) { s.Time.Time = s.Time.Time.Add(-time.Minute) }},
		{"usage that is not true", approver.RuleUsage, func(s *scope.Statement) { s.Decision.Utilisation[0].Used = "0" }},
		{"no usage", approver.RuleUsage, func(s *scope.Statement) { s.Decision.Utilisation = nil }},
	} {
		refused(t, x.name, x.rule, d.decide(d.request(d.next(t, "10", x.change))))
	}
	// The window: 500 are used, 20000 are allowed.
	for range 3 {
		d.write(t, d.next(t, "130", nil)) // 6500 each
		if err := d.decide(d.request(d.log[len(d.log)-1])); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, "above the sum", scope.RuleNotionalWindow, d.decide(d.request(d.next(t, "1", nil))))
	refused(t, "not a statement", approver.RuleStatement, d.decide(d.request([]byte(`{"ver":1}`))))
}

// TestEntries: what was not authorized is seen, and counts.
func TestEntries(t *testing.T) {
	d := newDesk(t)
	first := d.write(t, d.next(t, "200", nil)) // 10000, not authorized
	denied := d.write(t, d.next(t, "10", func(s *scope.Statement) {
		s.Decision = scope.Decision{Decision: scope.DecisionDeny, Rule: scope.RuleSides, Message: "no", Certificate: s.Decision.Certificate, Scope: s.Decision.Scope}
	}))
	last := d.write(t, d.next(t, "190", nil)) // 9500
	err := d.decide(d.request(last))
	refused(t, "entries are missing", approver.RuleGap, err)
	var r *scope.Refusal
	if errors.As(err, &r) && r.Value != "0" {
		t.Errorf("the approver says it has %s entries", r.Value)
	}
	refused(t, "some entries are missing", approver.RuleGap, d.decide(d.request(last, first)))
	refused(t, "entries in another order", approver.RuleGap, d.decide(d.request(last, denied, first)))
	if err := d.decide(d.request(last, first, denied)); err != nil {
		t.Fatal(err)
	}
	refused(t, "11 more", scope.RuleNotionalWindow, d.decide(d.request(d.next(t, "11", nil))))
	if err := d.decide(d.request(first)); err != nil {
		t.Errorf("the first one, afterwards: %v", err)
	}
	refused(t, "a denial", approver.RuleStatement, d.decide(d.request(denied)))
	other := d.next(t, "1", func(s *scope.Statement) { s.Counter, s.Previous = 1, scope.Digest{} })
	refused(t, "another first one", approver.RuleFork, d.decide(d.request(other)))
	refused(t, "entries that fork", approver.RuleGap, d.decide(d.request(d.next(t, "1", nil), other)))

	// Entries alone, as a signer with a long record sends them.
	more := d.write(t, d.next(t, "1", nil))
	if err := d.approver.Append(t.Context(), d.client, &approver.Request{Chain: d.request(nil).Chain, Entries: [][]byte{more}}); err != nil {
		t.Fatal(err)
	}
	if err := d.decide(d.request(more)); err != nil {
		t.Errorf("an entry that came before it was asked for: %v", err)
	}
}

// TestRestart: what counts is read from the record.
func TestRestart(t *testing.T) {
	d := newDesk(t)
	path := filepath.Join(t.TempDir(), "r.db")
	open := func() *approver.Record {
		r, err := approver.OpenRecord(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		d.approver = d.newApprover(t, config(t, ""), r)
		return r
	}
	r := open()
	b := d.write(t, d.next(t, "300", nil)) // 15000
	if err := d.decide(d.request(b)); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open()
	defer r.Close()
	refused(t, "101 more", scope.RuleNotionalWindow, d.decide(d.request(d.next(t, "101", nil))))
	if err := d.decide(d.request(d.write(t, d.next(t, "100", nil)))); err != nil {
		t.Errorf("100 more: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	refused(t, "the record is closed", approver.RuleRecord, d.decide(d.request(d.next(t, "1", nil))))
}

func TestCertificates(t *testing.T) {
	for _, x := range []struct {
		name   string
		rule   scope.Rule
		change func(t *testing.T, d *desk)
	}{
		{"another CA", approver.RuleCertificate, func(t *testing.T, d *desk) { d.ca = testca.New(t); d.agent = d.certify(t, nil) }},
		{"a key in local mode", approver.RuleMode, func(t *testing.T, d *desk) {
			d.agent = d.certify(t, func(a *certext.Attestation) { a.Mode = attest.ModeLocal })
		}},
		{"a key in an HSM", approver.RuleMode, func(t *testing.T, d *desk) {
			d.agent = d.certify(t, func(a *certext.Attestation) { a.Protection = certext.ProtectionHSMDeclared })
		}},
		{"another key's Name", approver.RuleKeyName, func(t *testing.T, d *desk) {
			d.agent = d.certify(t, func(a *certext.Attestation) { a.KeyName = "000b" + strings.Repeat("00", 32) })
		}},
		{"another policy", approver.RuleKeyName, func(t *testing.T, d *desk) {
			d.agent = d.certify(t, func(a *certext.Attestation) { a.AuthPolicy = strings.Repeat("00", 32) })
		}},
		{"no policy", approver.RuleKeyName, func(t *testing.T, d *desk) {
			d.agent = d.certify(t, func(a *certext.Attestation) { a.AuthPolicy = "" })
		}},
		{"old evidence", scope.RuleAttestationAge, func(t *testing.T, d *desk) {
			d.agent = d.certify(t, func(a *certext.Attestation) { a.Time = a.Time.Add(-25 * time.Hour) })
		}},
		{"revoked", approver.RuleRevoked, func(_ *testing.T, d *desk) { d.revoked[d.agent.Chain[0].SerialNumber.String()] = true }},
		{"the TLS certificate revoked", approver.RuleRevoked, func(_ *testing.T, d *desk) { d.revoked[d.client.SerialNumber.String()] = true }},
		{"revocation unknown", approver.RuleRevocation, func(_ *testing.T, d *desk) { d.unknown = errors.New("no list") }},
		{"another client", approver.RuleClient, func(t *testing.T, d *desk) { d.client = d.tlsCertificate(t, "spiffe://example.org/agent/mm-08") }},
		{"no client", approver.RuleClient, func(_ *testing.T, d *desk) { d.client = nil }},
		{"an agent that is not known", approver.RuleAgent, func(t *testing.T, d *desk) {
			c, err := approver.ParseConfig([]byte("listen: x\ntrust_domain: example.org\nkey: x\ncertificate: c\ncertificate_key: k\nca: ca\ncrl_url: x\nrecord: r.db\nagents: [{name: mm-08}]\n"), t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			d.approver = d.newApprover(t, c, d.record)
		}},
		{"a scope wider than the approver's", approver.RuleScopeWider, func(t *testing.T, d *desk) {
			path := filepath.Join(t.TempDir(), "scope.json")
			if err := os.WriteFile(path, []byte(strings.Replace(scopeJSON, "15000", "14000", 1)), 0o600); err != nil {
				t.Fatal(err)
			}
			d.approver = d.newApprover(t, config(t, "    scope: "+path+"\n"), d.record)
		}},
		{"a certificate that does not belong to the chain", approver.RuleCertificate, func(t *testing.T, d *desk) { d.agent.Chain = append(d.agent.Chain, d.client) }},
		{"the root in the chain", approver.RuleCertificate, func(t *testing.T, d *desk) { d.agent.Chain = append(d.agent.Chain, d.ca.Certificate) }},
		{"a TLS certificate in its place", approver.RuleCertificate, func(_ *testing.T, d *desk) { d.agent.Chain = []*x509.Certificate{d.client} }},
	} {
		t.Run(x.name, func(t *testing.T) {
			d := newDesk(t)
			b := d.next(t, "1", nil)
			x.change(t, d)
			if again := d.agent.Chain[0]; len(again.ExtKeyUsage) == 0 {
				b = d.next(t, "1", nil) // of the certificate that there is now
			}
			refused(t, x.name, x.rule, d.decide(d.request(b)))
		})
	}
	d := newDesk(t)
	path := filepath.Join(t.TempDir(), "scope.json")
	if err := os.WriteFile(path, []byte(scopeJSON), 0o600); err != nil {
		t.Fatal(err)
	}
	d.approver = d.newApprover(t, config(t, "    scope: "+path+"\n"), d.record)
	if err := d.decide(d.request(d.next(t, "1", nil))); err != nil {
		t.Errorf("a scope equal to the approver's: %v", err)
	}
}

// TestInsideStaysInside: why revocation is not known is the refusal's cause, and no
// part of what the signer is told.
func TestInsideStaysInside(t *testing.T) {
	d := newDesk(t)
	b := d.next(t, "1", nil)
	d.unknown = errors.New("planted")
	r, ok := errors.AsType[*scope.Refusal](d.decide(d.request(b)))
	if !ok || r.Rule != approver.RuleRevocation || !errors.Is(r, d.unknown) || strings.Contains(r.Error(), "planted") {
		t.Errorf("got %v", r)
	}
}

// TestRenewal: entries under an earlier certificate, which this approver has
// not seen, count and are not authorized.
func TestRenewal(t *testing.T) {
	d := newDesk(t)
	old := d.write(t, d.next(t, "300", nil))
	oldChain := d.request(nil).Chain
	d.agent = d.certify(t, nil)
	b := d.write(t, d.next(t, "100", nil))
	if err := d.decide(d.request(b, old)); err != nil {
		t.Fatal(err)
	}
	q := d.request(old)
	q.Chain = oldChain
	refused(t, "seen under a certificate that was not known", approver.RuleChecked, d.decide(q))
}

func TestParseRequest(t *testing.T) {
	d := newDesk(t)
	good, err := json.Marshal(d.request(d.next(t, "1", nil)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := approver.ParseRequest(good, true); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]string{
		"empty": "", "not JSON": "x", "no chain": `{"nonce":"AAAA","statement":"AAAA"}`,
		"a digest":       strings.Replace(string(good), `"nonce"`, `"digest":"AAAA","nonce"`, 1),
		"cpHash":         strings.Replace(string(good), `"nonce"`, `"cpHash":"","nonce"`, 1),
		"expiration":     strings.Replace(string(good), `"nonce"`, `"expiration":-1,"nonce"`, 1),
		"twice":          strings.Replace(string(good), `"nonce"`, `"chain":[],"nonce"`, 1),
		"empty nonce":    string(regexpNonce(good, "")),
		"short nonce":    string(regexpNonce(good, "AAAA")),
		"long nonce":     string(regexpNonce(good, base64.StdEncoding.EncodeToString(make([]byte, 64)))),
		"no statement":   strings.Replace(string(good), `"statement"`, `"entries":[],"x"`, 1),
		"more after it":  string(good) + "{}",
		"many in chain":  `{"chain":["AAAA","AAAA","AAAA","AAAA"],"nonce":"` + base64.StdEncoding.EncodeToString(make([]byte, 32)) + `","statement":"AAAA"}`,
		"too many":       `{"chain":["AAAA"],"entries":[` + strings.Repeat(`"AAAA",`, approver.MaxEntries) + `"AAAA"],"nonce":"` + base64.StdEncoding.EncodeToString(make([]byte, 32)) + `","statement":"AAAA"}`,
		"null":           "null",
		"an array of it": "[" + string(good) + "]",
	} {
		if _, err := approver.ParseRequest([]byte(b), true); err == nil {
			t.Errorf("%s was taken", name)
		} else {
			refused(t, name, scope.RuleForm, err)
		}
	}
	if _, err := approver.ParseRequest(good, false); err == nil {
		t.Error("a statement was taken where entries alone are expected")
	}
}

func regexpNonce(b []byte, nonce string) []byte {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		panic(err)
	}
	m["nonce"] = json.RawMessage(`"` + nonce + `"`)
	out, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return out
}

func TestConfig(t *testing.T) {
	good := "listen: 127.0.0.1:0\ntrust_domain: example.org\nkey: file:k\ncertificate: c\ncertificate_key: k\nca: ca\ncrl_url: http://x/crl\nrecord: r.db\nagents: [{name: mm-07}]\n"
	if _, err := approver.ParseConfig([]byte(good), "/"); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"no agents":          strings.Replace(good, "[{name: mm-07}]", "[]", 1),
		"an agent twice":     strings.Replace(good, "[{name: mm-07}]", "[{name: a},{name: a}]", 1),
		"an agent's name":    strings.Replace(good, "mm-07", "A/B", 1),
		"no record":          strings.Replace(good, "record: r.db\n", "", 1),
		"a password's file":  good + "record_password_file: x\n",
		"unknown member":     good + "approve_all: true\n",
		"no revocation list": strings.Replace(good, "crl_url: http://x/crl\n", "", 1),
		"old lists":          good + "max_revocation_age: 1000h\n",
		"old evidence":       good + "max_attestation_age: 48h\n",
		"no scope there":     strings.Replace(good, "{name: mm-07}", "{name: mm-07, scope: nowhere}", 1),
	} {
		if _, err := approver.ParseConfig([]byte(bad), "/"); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// TestCertificatesEnd: what was found good at an earlier request is not good
// for ever: the chain, and the certificate of a connection that stays open.
func TestCertificatesEnd(t *testing.T) {
	d := newDesk(t)
	if err := d.decide(d.request(d.write(t, d.next(t, "1", nil)))); err != nil {
		t.Fatal(err)
	}
	valid := *d.client
	for name, at := range map[string]time.Time{"expired": valid.NotAfter.Add(time.Second), "not valid yet": valid.NotBefore.Add(-time.Second)} {
		client := valid
		client.NotBefore, client.NotAfter = client.NotBefore.Add(time.Since(at)), client.NotAfter.Add(time.Since(at))
		d.client = &client
		refused(t, "a TLS certificate that is "+name, approver.RuleClient, d.decide(d.request(d.next(t, "1", nil))))
	}
	// A CA that ends before what it issued.
	old := d.ca.Certificate
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: old.Subject, NotBefore: old.NotBefore, NotAfter: time.Now().Add(time.Minute),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: old.KeyUsage, SubjectKeyId: old.SubjectKeyId}, old, &d.ca.Key.PublicKey, d.ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	key := d.ca.Key
	d = newDesk(t)
	d.ca = &testca.CA{Key: key, Certificate: c, Roots: x509.NewCertPool()}
	d.ca.Roots.AddCert(c)
	d.agent = d.certify(t, nil)
	d.client = d.tlsCertificate(t, d.agent.ID)
	d.approver = d.newApprover(t, config(t, ""), d.record)
	if err := d.decide(d.request(d.write(t, d.next(t, "1", nil)))); err != nil {
		t.Fatal(err)
	}
	d.approver.SetClock(func() time.Time { return time.Now().Add(2 * time.Minute) })
	refused(t, "a chain whose CA has ended", approver.RuleCertificate, d.decide(d.request(d.next(t, "1", func(s *scope.Statement) { s.Expires += 200 }))))
}
