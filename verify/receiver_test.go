package verify_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/verify"
)

const scopeJSON = `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`

// venue is a receiver and an agent that sends to it.
type venue struct {
	ca     *testca.CA
	agent  *testca.Agent
	config verify.Config
	scope  *scope.Scope
	next   uint64
}

func newVenue(t testing.TB) *venue {
	t.Helper()
	v := &venue{ca: testca.New(t)}
	v.agent = v.ca.Agent(t, "a", []byte(scopeJSON), nil)
	v.config = verify.Config{Audiences: []string{"XPAR"}, Roots: v.ca.Roots, Revocation: verify.NoRevocation{}, Replay: verify.NewMemoryStore(1000, time.Now().Add(-time.Hour))}
	var err error
	if v.scope, err = scope.ParseCanonical([]byte(scopeJSON)); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *venue) receiver(t testing.TB) *verify.Receiver {
	t.Helper()
	r, err := verify.NewReceiver(v.config)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	return base64.RawURLEncoding.EncodeToString(b[:])
}

func dec(s string) *scope.Decimal {
	d, err := scope.ParseDecimal(s)
	if err != nil {
		panic(err)
	}
	return &d
}

// statement is a good one; a test changes it.
func (v *venue) statement() *scope.Statement {
	v.next++
	now := time.Now().UTC().Truncate(time.Microsecond)
	s := &scope.Statement{
		Version: 1, Issuer: "CN=Test CA", Agent: v.agent.ID, Audience: "XPAR", ID: newID(), Counter: scope.Counter(v.next), Time: scope.Timestamp{Time: now}, Expires: now.Add(30 * time.Second).Unix(),
		Kind:        scope.OrderNew,
		Order:       &scope.Order{ClOrdID: "1", SecurityID: "FR0000120271", SecurityIDSource: "4", Side: "1", OrdType: "2", Price: dec("50"), OrderQty: dec("100"), Currency: "EUR", TimeInForce: "0"},
		Decision:    scope.Decision{Decision: scope.DecisionPermit, Certificate: sha256.Sum256(v.agent.Chain[0].Raw), Scope: v.scope.Hash(), Notional: &scope.Amount{Amount: *dec("5000"), Currency: "EUR"}},
		Attestation: scope.Attestation{Evidence: "00", Time: scope.Timestamp{Time: now.Truncate(time.Second)}},
	}
	if v.next > 1 {
		s.Previous = scope.Digest{1}
	}
	return s
}

func (v *venue) sign(t testing.TB, payload []byte) string {
	t.Helper()
	alg, _, err := jws.Algorithm(v.agent.Key.Public())
	if err != nil {
		t.Fatal(err)
	}
	h, err := jws.NewHeader(alg, v.agent.Chain, true)
	if err != nil {
		t.Fatal(err)
	}
	input := h.SigningInput(payload)
	sig, err := jws.Sign(v.agent.Key, input)
	if err != nil {
		t.Fatal(err)
	}
	return jws.Compact(input, sig)
}

func (v *venue) action(t testing.TB, change func(*scope.Statement)) string {
	t.Helper()
	s := v.statement()
	if change != nil {
		change(s)
	}
	b, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return v.sign(t, b)
}

// header replaces the protected header's members, keeping payload and signature.
func header(compact string, change func(map[string]any)) string {
	p := strings.Split(compact, ".")
	b, _ := base64.RawURLEncoding.DecodeString(p[0])
	var m map[string]any
	_ = json.Unmarshal(b, &m)
	change(m)
	b, _ = json.Marshal(m)
	p[0] = base64.RawURLEncoding.EncodeToString(b)
	return strings.Join(p, ".")
}

func part(compact string, n int, change func([]byte) []byte) string {
	p := strings.Split(compact, ".")
	b, _ := base64.RawURLEncoding.DecodeString(p[n])
	p[n] = base64.RawURLEncoding.EncodeToString(change(b))
	return strings.Join(p, ".")
}

func TestAccepts(t *testing.T) {
	v := newVenue(t)
	got, err := v.receiver(t).Verify(t.Context(), []byte(v.action(t, nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.Agent != v.agent.ID || got.Action.Order.ClOrdID != "1" {
		t.Errorf("accepted %+v", got)
	}
}

// TestRefusals forges one fault each; the reason that must refuse it is the
// first word of the name.
func TestRefusals(t *testing.T) {
	type forged struct {
		venue  func(*venue)
		action func(*scope.Statement)
		jws    func(string) string
		body   *verify.Body
	}
	agent := func(change func(*x509.Certificate)) func(*venue) {
		return func(v *venue) { v.agent = v.ca.Agent(t, "a", []byte(scopeJSON), change) }
	}
	for name, f := range map[string]forged{
		"form two parts":              {jws: func(s string) string { return s[:strings.LastIndex(s, ".")] }},
		"form four parts":             {jws: func(s string) string { return s + ".x" }},
		"form padded":                 {jws: func(s string) string { return s + "=" }},
		"form line end":               {jws: func(s string) string { return s[:len(s)-4] + "\n" + s[len(s)-4:] }},
		"form too large":              {jws: func(s string) string { return s + strings.Repeat("A", 200<<10) }},
		"header alg none":             {jws: func(s string) string { return header(s, func(m map[string]any) { m["alg"] = "none" }) }},
		"header alg HS256":            {jws: func(s string) string { return header(s, func(m map[string]any) { m["alg"] = "HS256" }) }},
		"header alg of another curve": {jws: func(s string) string { return header(s, func(m map[string]any) { m["alg"] = "ES384" }) }},
		"header another typ":          {jws: func(s string) string { return header(s, func(m map[string]any) { m["typ"] = "JWT" }) }},
		"header no typ":               {jws: func(s string) string { return header(s, func(m map[string]any) { delete(m, "typ") }) }},
		"header crit": {jws: func(s string) string {
			return header(s, func(m map[string]any) { m["crit"] = []string{"b64"}; m["b64"] = false })
		}},
		"header jwk": {jws: func(s string) string {
			return header(s, func(m map[string]any) { m["jwk"] = map[string]string{"kty": "EC"} })
		}},
		"header jku": {jws: func(s string) string { return header(s, func(m map[string]any) { m["jku"] = "https://example.org" }) }},
		"header another thumbprint": {jws: func(s string) string {
			return header(s, func(m map[string]any) { m["x5t#S256"] = strings.Repeat("A", 43) })
		}},
		"header duplicate member": {jws: func(s string) string {
			return part(s, 0, func(b []byte) []byte { return append([]byte(`{"alg":"none",`), b[1:]...) })
		}},
		"certificate missing":    {jws: func(s string) string { return header(s, func(m map[string]any) { delete(m, "x5c") }) }},
		"certificate another CA": {venue: func(v *venue) { v.agent = testca.New(t).Agent(t, "a", []byte(scopeJSON), nil) }},
		"certificate without the usage": {venue: agent(func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = nil
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		})},
		"certificate with two usages":     {venue: agent(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })},
		"certificate without a scope":     {venue: agent(func(c *x509.Certificate) { c.ExtraExtensions = c.ExtraExtensions[1:] })},
		"certificate scope not critical":  {venue: agent(func(c *x509.Certificate) { c.ExtraExtensions[0].Critical = false })},
		"certificate without attestation": {venue: agent(func(c *x509.Certificate) { c.ExtraExtensions = c.ExtraExtensions[:1] })},
		"certificate unknown critical extension": {venue: agent(func(c *x509.Certificate) {
			e := c.ExtraExtensions[1]
			e.Id, e.Critical = asn1.ObjectIdentifier{1, 2, 3}, true
			c.ExtraExtensions = append(c.ExtraExtensions, e)
		})},
		"certificate that lives too long":       {venue: agent(func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(25 * time.Hour) })},
		"certificate of a CA":                   {venue: agent(func(c *x509.Certificate) { c.IsCA = true })},
		"certificate with two names":            {venue: agent(func(c *x509.Certificate) { c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "x"}) })},
		"certificate scope in another spelling": {venue: func(v *venue) { v.agent = v.ca.Agent(t, "a", []byte(scopeJSON+" "), nil) }},
		"certificate_expired":                   {venue: agent(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })},
		"certificate_expired before its time":   {venue: agent(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })},
		"certificate_revoked":                   {venue: func(v *venue) { v.config.Revocation = v.crl(t, time.Hour, v.agent) }},
		"revocation_unknown no list": {venue: func(v *venue) {
			v.config.Revocation = &verify.CRL{MaxAge: time.Hour, Load: func(context.Context) ([]byte, error) { return nil, errors.New("no network") }}
		}},
		"revocation_unknown old list":           {venue: func(v *venue) { v.config.Revocation = v.crl(t, -time.Minute) }},
		"revocation_unknown older than allowed": {venue: func(v *venue) { l := v.crl(t, time.Hour); l.MaxAge = time.Second; v.config.Revocation = l }},
		"revocation_unknown list of another CA": {venue: func(v *venue) { o := newVenue(t); v.config.Revocation = o.crl(t, time.Hour) }},
		"signature changed":                     {jws: func(s string) string { return part(s, 2, func(b []byte) []byte { b[5] ^= 1; return b }) }},
		"signature in DER":                      {jws: func(s string) string { return part(s, 2, func(b []byte) []byte { return append([]byte{0x30}, b...) }) }},
		"signature short":                       {jws: func(s string) string { return part(s, 2, func(b []byte) []byte { return b[:63] }) }},
		"signature empty":                       {jws: func(s string) string { return s[:strings.LastIndex(s, ".")+1] }},
		"signature over another payload": {jws: func(s string) string {
			return part(s, 1, func(b []byte) []byte { return bytes.Replace(b, []byte(`"100"`), []byte(`"101"`), 1) })
		}},
		"statement denial":                 {action: func(s *scope.Statement) { s.Decision.Decision, s.Decision.Rule = scope.DecisionDeny, "x" }},
		"statement of another certificate": {action: func(s *scope.Statement) { s.Decision.Certificate[0] ^= 1 }},
		"policy of another scope":          {action: func(s *scope.Statement) { s.Decision.Scope[0] ^= 1 }},
		"statement of another agent":       {action: func(s *scope.Statement) { s.Agent = "spiffe://example.org/agent/b" }},
		"audience":                         {venue: func(v *venue) { v.config.Audiences = []string{"XLON"} }},
		"expired": {action: func(s *scope.Statement) {
			s.Expires = time.Now().Add(-3 * time.Second).Unix()
			s.Time.Time = s.Time.Time.Add(-20 * time.Second)
		}},
		"expired lives too long":             {action: func(s *scope.Statement) { s.Expires += 3600 }},
		"not_yet_valid":                      {action: func(s *scope.Statement) { s.Time.Time = s.Time.Time.Add(time.Minute); s.Expires += 60 }},
		"replay before the start":            {venue: func(v *venue) { v.config.Replay = verify.NewMemoryStore(10, time.Now().Add(time.Minute)) }},
		"replay_store full":                  {venue: func(v *venue) { v.config.Replay = verify.NewMemoryStore(0, time.Time{}) }},
		"body that the action does not name": {body: &verify.Body{Format: scope.NativeHTTPBody}},
		"body missing": {action: func(s *scope.Statement) {
			s.Native = &scope.Native{Format: scope.NativeHTTPBody, SHA256: strings.Repeat("00", 32)}
		}},
		"body another": {action: func(s *scope.Statement) {
			s.Native = &scope.Native{Format: scope.NativeHTTPBody, SHA256: strings.Repeat("00", 32)}
		},
			body: &verify.Body{Format: scope.NativeHTTPBody, SHA256: [32]byte{1}}},
		"scope above the limit":    {action: func(s *scope.Statement) { s.Order.OrderQty = dec("501") }},
		"scope another notional":   {action: func(s *scope.Statement) { s.Decision.Notional.Amount = *dec("1") }},
		"scope no notional":        {action: func(s *scope.Statement) { s.Decision.Notional = nil }},
		"scope another instrument": {action: func(s *scope.Statement) { s.Order.SecurityID = "FR0000131104" }},
		"attestation_age":          {venue: func(v *venue) { v.config.MaxAttestationAge = time.Nanosecond }},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVenue(t)
			if f.venue != nil {
				f.venue(v)
			}
			compact := v.action(t, f.action)
			if f.jws != nil {
				compact = f.jws(compact)
			}
			reason, _, _ := strings.Cut(name, " ")
			got, err := v.receiver(t).Verify(t.Context(), []byte(compact), f.body)
			if !errors.Is(err, &verify.Refusal{Reason: verify.Reason(reason)}) || got != nil {
				t.Errorf("got %v, want %s", err, reason)
			}
		})
	}
}

// crl makes a revocation list that ends after d.
func (v *venue) crl(t testing.TB, d time.Duration, revoked ...*testca.Agent) *verify.CRL {
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-2 * time.Minute), NextUpdate: time.Now().Add(d)}
	for _, a := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: a.Chain[0].SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, v.ca.Certificate, v.ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	return &verify.CRL{MaxAge: time.Hour, Load: func(context.Context) ([]byte, error) { return der, nil }}
}

// TestEveryReasonIsInTheProtocol: docs/protocol.md has every reason's line.
func TestEveryReasonIsInTheProtocol(t *testing.T) {
	doc, err := os.ReadFile("../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range verify.Reasons {
		if line := fmt.Sprintf("| %d | `%s` | %s |", r.Check, r.Reason, r.What); !strings.Contains(string(doc), line) {
			t.Errorf("docs/protocol.md does not have the line\n%s", line)
		}
	}
}

func stores(t *testing.T) map[string]verify.ReplayStore {
	s, err := verify.OpenSQLiteStore(t.Context(), filepath.Join(t.TempDir(), "replay.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return map[string]verify.ReplayStore{"memory": verify.NewMemoryStore(1000, time.Time{}), "SQLite": s}
}

func TestReplay(t *testing.T) {
	for name, store := range stores(t) {
		t.Run(name, func(t *testing.T) {
			v := newVenue(t)
			v.config.Replay = store
			r := v.receiver(t)
			verifyIt := func(compact string) error { _, err := r.Verify(t.Context(), []byte(compact), nil); return err }
			first, second := v.action(t, nil), v.action(t, nil)
			if err := verifyIt(second); err != nil {
				t.Fatal(err)
			}
			if err := verifyIt(first); err != nil {
				t.Fatalf("an earlier number that arrives later: %v", err)
			}
			for _, again := range []string{first, second} {
				if err := verifyIt(again); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonReplay}) {
					t.Errorf("a second time: %v", err)
				}
			}
			// The same number under another id, as a signer that lost its record would sign.
			if err := verifyIt(v.action(t, func(s *scope.Statement) { s.Counter = 2 })); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonCounter}) {
				t.Errorf("a number that was used: %v", err)
			}
			if err := verifyIt(v.action(t, func(s *scope.Statement) { s.Counter = 5000 })); err != nil {
				t.Fatal(err)
			}
			if err := verifyIt(v.action(t, func(s *scope.Statement) { s.Counter = 5000 - verify.CounterWindow })); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonCounter}) {
				t.Errorf("a number below the window: %v", err)
			}
			if err := verifyIt(v.action(t, func(s *scope.Statement) { s.Counter = 5001 - verify.CounterWindow })); err != nil {
				t.Errorf("the lowest number of the window: %v", err)
			}
			// A refused action is not used up.
			wrong := v.action(t, func(s *scope.Statement) {
				s.Counter = 5001
				s.Native = &scope.Native{Format: scope.NativeHTTPBody, SHA256: strings.Repeat("00", 32)}
			})
			if err := verifyIt(wrong); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonBody}) {
				t.Fatal(err)
			}
			if _, err := r.Verify(t.Context(), []byte(wrong), &verify.Body{Format: scope.NativeHTTPBody}); err != nil {
				t.Errorf("after a refusal: %v", err)
			}
		})
	}
}

// TestReplayRace: of many uses of one action at a time exactly one succeeds.
func TestReplayRace(t *testing.T) {
	for name, store := range stores(t) {
		t.Run(name, func(t *testing.T) {
			v := newVenue(t)
			v.config.Replay = store
			r := v.receiver(t)
			compact := []byte(v.action(t, nil))
			var wg sync.WaitGroup
			accepted := make(chan struct{}, 32)
			for range 32 {
				wg.Go(func() {
					if _, err := r.Verify(t.Context(), compact, nil); err == nil {
						accepted <- struct{}{}
					}
				})
			}
			wg.Wait()
			if len(accepted) != 1 {
				t.Errorf("accepted %d times", len(accepted))
			}
		})
	}
}

func TestReference(t *testing.T) {
	collar := strings.Replace(scopeJSON, `"version":1`, `"price_collar_bps":{"bps":100,"max_age_ms":1000,"source":"XPAR"},"version":1`, 1)
	v := newVenue(t)
	v.agent = v.ca.Agent(t, "a", []byte(collar), nil)
	var err error
	if v.scope, err = scope.ParseCanonical([]byte(collar)); err != nil {
		t.Fatal(err)
	}
	withReference := func(s *scope.Statement) {
		s.Decision.Reference = &scope.Reference{Price: *dec("50"), Currency: "EUR", Source: "XPAR", Time: s.Time}
	}
	if _, err := v.receiver(t).Verify(t.Context(), []byte(v.action(t, withReference)), nil); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonScope}) {
		t.Errorf("the signer's reference price was believed: %v", err)
	}
	v.config.AcceptReference = true
	if _, err := v.receiver(t).Verify(t.Context(), []byte(v.action(t, withReference)), nil); err != nil {
		t.Errorf("with AcceptReference: %v", err)
	}
	v.config.References = func(string) *scope.ReferencePrice {
		return &scope.ReferencePrice{Instrument: "isin:FR0000120271", Price: *dec("40"), Currency: "EUR", Source: "XPAR", Time: time.Now().Add(-100 * time.Millisecond)}
	}
	if _, err := v.receiver(t).Verify(t.Context(), []byte(v.action(t, withReference)), nil); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonScope}) {
		t.Errorf("the venue's own reference price did not count: %v", err)
	}
}

func TestMiddleware(t *testing.T) {
	v := newVenue(t)
	r := v.receiver(t)
	backend := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		got, ok := verify.FromContext(req.Context())
		if !ok {
			t.Error("the request came through without an action")
		}
		fmt.Fprint(w, got.Agent)
	})
	s := httptest.NewServer(r.Middleware(1024, backend))
	defer s.Close()
	body := []byte(`{"order":1}`)
	sum := sha256.Sum256(body)
	action := func() string {
		return v.action(t, func(s *scope.Statement) {
			s.Native = &scope.Native{Format: scope.NativeHTTPBody, SHA256: fmt.Sprintf("%x", sum)}
		})
	}
	used := action()
	for _, c := range []struct {
		name    string
		headers []string
		body    []byte
		status  int
	}{
		{"good", []string{used}, body, 200},
		{"replayed", []string{used}, body, 409},
		{"no header", nil, body, 400},
		{"two headers", []string{action(), action()}, body, 400},
		{"changed body", []string{action()}, []byte(`{"order":2}`), 403},
		{"too large a body", []string{action()}, make([]byte, 2000), 413},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL, bytes.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header[verify.Header] = c.headers
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != c.status {
			t.Errorf("%s: status %d, want %d", c.name, res.StatusCode, c.status)
		}
	}
}

func TestConfig(t *testing.T) {
	good := newVenue(t).config
	for name, change := range map[string]func(*verify.Config){
		"no audience":   func(c *verify.Config) { c.Audiences = nil },
		"no roots":      func(c *verify.Config) { c.Roots = nil },
		"no revocation": func(c *verify.Config) { c.Revocation = nil },
		"no replay":     func(c *verify.Config) { c.Replay = nil },
		"negative":      func(c *verify.Config) { c.MaxSkew = -1 },
	} {
		c := good
		change(&c)
		if _, err := verify.NewReceiver(c); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

// TestIndependentJudges: a JOSE library and openssl accept our signatures.
func TestIndependentJudges(t *testing.T) {
	v := newVenue(t)
	compact := v.action(t, nil)
	sig, err := jose.ParseSignedCompact(compact, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := sig.Verify(v.agent.Chain[0].PublicKey)
	if err != nil || !bytes.Contains(payload, []byte(`"act":"order.new"`)) {
		t.Errorf("go-jose: %v", err)
	}
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("openssl is missing: apt-get install openssl")
	}
	m, err := jws.Split([]byte(compact))
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(m.Signature[:32]), new(big.Int).SetBytes(m.Signature[32:])})
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(v.agent.Chain[0].PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"input": m.SigningInput, "sig": der, "key": spki} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("openssl", "dgst", "-sha256", "-verify", dir+"/key", "-keyform", "DER", "-signature", dir+"/sig", dir+"/input").CombinedOutput()
	if err != nil {
		t.Errorf("openssl: %v: %s", err, out)
	}
}

// TestOtherKeys: RSA and P-384 keys, as HSMs have them.
func TestOtherKeys(t *testing.T) {
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	v := newVenue(t)
	v.agent = v.ca.AgentWithKey(t, "a", []byte(scopeJSON), crypto.Signer(k), nil)
	if _, err := v.receiver(t).Verify(t.Context(), []byte(v.action(t, nil)), nil); err != nil {
		t.Error(err)
	}
}

func FuzzVerify(f *testing.F) {
	v := newVenue(f)
	r := v.receiver(f)
	good := v.action(f, nil)
	f.Add([]byte(good))
	f.Add([]byte("a.b.c"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := r.Verify(context.Background(), b, nil); err == nil && string(b) != good {
			t.Errorf("accepted %q", b)
		}
	})
}

func FuzzHeader(f *testing.F) {
	v := newVenue(f)
	r := v.receiver(f)
	p := strings.SplitN(v.action(f, nil), ".", 2)
	h, _ := base64.RawURLEncoding.DecodeString(p[0])
	f.Add(h)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := r.Verify(context.Background(), []byte(base64.RawURLEncoding.EncodeToString(b)+"."+p[1]), nil); err == nil && !bytes.Equal(b, h) {
			t.Errorf("accepted the header %q", b)
		}
	})
}

// BenchmarkVerify stands beside BenchmarkECDSA: what verification costs
// beyond the signature.
func BenchmarkVerify(b *testing.B) { benchmarkVerify(b, newVenue(b)) }

// BenchmarkVerifyLimits has limits over time in the scope.
func BenchmarkVerifyLimits(b *testing.B) {
	v := newVenue(b)
	v.rescope(b, `"max_notional_per_window":[{"currency":"EUR","amount":"999999999999","window":{"rolling_s":3600}}],"max_qty_per_window":[{"instrument":"*","qty":"999999999","window":{"day_cut":"22:00"}}],"max_orders_per_window":[{"count":999999999,"window":{"rolling_s":60}}]`)
	benchmarkVerify(b, v)
}

func benchmarkVerify(b *testing.B, v *venue) {
	v.config.Replay = verify.NewMemoryStore(1<<30, time.Time{})
	r := v.receiver(b)
	var list [][]byte
	for range 2000 {
		list = append(list, []byte(v.action(b, func(s *scope.Statement) { s.Expires += 200 })))
	}
	n := 0
	for b.Loop() {
		if n == len(list) {
			b.StopTimer()
			v.config.Replay = verify.NewMemoryStore(1<<30, time.Time{})
			r, n = v.receiver(b), 0
			b.StartTimer()
		}
		if _, err := r.Verify(context.Background(), list[n], nil); err != nil {
			b.Fatal(err)
		}
		n++
	}
}

func BenchmarkECDSA(b *testing.B) {
	k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	sum := sha256.Sum256(nil)
	sig, _ := ecdsa.SignASN1(rand.Reader, k, sum[:])
	for b.Loop() {
		if !ecdsa.VerifyASN1(&k.PublicKey, sum[:], sig) {
			b.Fatal("does not verify")
		}
	}
}
