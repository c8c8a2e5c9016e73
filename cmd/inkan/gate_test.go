package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"inkan/internal/httpsig"
	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer/client"
	"inkan/verify/gate"
)

const gateScope = `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`

func writeFile(t *testing.T, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// certify makes a TLS certificate and its files.
func certify(t *testing.T, ca *testca.CA, dir, name string, usage x509.ExtKeyUsage, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{usage}, BasicConstraintsValid: true}
	change(c)
	der, err := x509.CreateCertificate(rand.Reader, c, ca.Certificate, &k.PublicKey, ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, name+".pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	writeFile(t, filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
}

// signedFor signs an order for a body as a signer does.
func signedFor(t *testing.T, a *testca.Agent, n int, body []byte) string {
	t.Helper()
	return signedNative(t, a, n, scope.NativeHTTPBody, sha256.Sum256(body))
}

// signedNative is signedFor for a message of any format.
func signedNative(t *testing.T, a *testca.Agent, n int, format string, digest [32]byte) string {
	t.Helper()
	s, err := scope.ParseCanonical([]byte(gateScope))
	if err != nil {
		t.Fatal(err)
	}
	action, err := scope.ParseAction(fmt.Appendf(nil, `{"id":%q,"aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"50","OrderQty":"100","Currency":"EUR","TimeInForce":"0"},"native":{"fmt":%q,"sha-256":"%x"}}`,
		client.NewID(), format, digest))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	p, err := scope.Check(s, action, scope.Env{Now: now, AttestedAt: now})
	if err != nil {
		t.Fatal(err)
	}
	amount, currency, _ := p.Notional()
	st := &scope.Statement{Version: 1, Issuer: "CN=Test CA", Agent: a.ID, Audience: "XPAR", ID: action.ID, Counter: scope.Counter(n), Time: scope.Timestamp{Time: now}, Expires: now.Add(30 * time.Second).Unix(), Kind: action.Kind, Order: action.Order, Native: action.Native,
		Decision: scope.Decision{Decision: scope.DecisionPermit, Certificate: sha256.Sum256(a.Chain[0].Raw), Scope: s.Hash(), Notional: &scope.Amount{Amount: amount, Currency: currency}}, Attestation: scope.Attestation{Evidence: "00", Time: scope.Timestamp{Time: now.Truncate(time.Second)}}}
	if n > 1 {
		st.Previous = scope.Digest{1}
	}
	b, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	h, err := jws.NewHeader("ES256", a.Chain, true)
	if err != nil {
		t.Fatal(err)
	}
	input := h.SigningInput(b)
	sig, err := jws.Sign(a.Key, input)
	if err != nil {
		t.Fatal(err)
	}
	return jws.Compact(input, sig)
}

// gateVenue is what a gate stands between: an agent and a backend that knows
// nothing of it, with the files that a configuration names.
type gateVenue struct {
	dir            string
	ca             *testca.CA
	agent          *testca.Agent
	tls            tls.Certificate // the agent's
	lists, backend string          // URLs
}

func newGateVenue(t *testing.T) *gateVenue {
	t.Helper()
	v := &gateVenue{dir: t.TempDir(), ca: testca.New(t)}
	certify(t, v.ca, v.dir, "gate", x509.ExtKeyUsageServerAuth, func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} })
	v.tls = certify(t, v.ca, v.dir, "agent", x509.ExtKeyUsageClientAuth, func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/agent/a"}}
	})
	v.agent = v.ca.Agent(t, "a", []byte(gateScope), nil)
	writeFile(t, filepath.Join(v.dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: v.ca.Certificate.Raw}))
	writeFile(t, filepath.Join(v.dir, "routes.yaml"), []byte(`- method: POST
  path: /orders
  kinds: [order.new]
  body:
    id: {field: ord.ClOrdID}
    isin: {field: ord.SecurityID}
    qty: {field: ord.OrderQty}
    price: {field: ord.Price}
  implied: {ord.SecurityIDSource: "4", ord.Side: "1", ord.OrdType: "2", ord.Currency: EUR, ord.TimeInForce: "0"}
`))
	crl, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}, v.ca.Certificate, v.ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	lists := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(crl) }))
	t.Cleanup(lists.Close)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header.Get("Agent-Id")) }))
	t.Cleanup(backend.Close)
	v.lists, v.backend = lists.URL, backend.URL
	return v
}

// config is a gate's configuration with a key and a store, and more lines.
func (v *gateVenue) config(key, store, more string) string {
	return fmt.Sprintf("listen: 127.0.0.1:0\ncertificate: gate.pem\nkey: %q\nca: ca.pem\ntrust_domain: example.org\naudience: [XPAR]\ncrl_url: %s\nreplay_db: %q\nbackend: %s\nroutes: routes.yaml\n%s", key, v.lists, store, v.backend, more)
}

// post sends an action with a body to a gate; change may change the request.
func (v *gateVenue) post(t *testing.T, address string, certificates []tls.Certificate, jws string, body []byte, change func(*http.Request)) (status int, text string) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: v.ca.Roots, Certificates: certificates}, DisableKeepAlives: true}, Timeout: 30 * time.Second}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+address+"/orders", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Agent-Action", jws)
	req.Header.Set("Content-Type", "application/json")
	if change != nil {
		change(req)
	}
	res, err := c.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(b)
}

var gateBody = []byte(`{"id":"A-1","isin":"FR0000120271","qty":"100","price":"50"}`)

// TestGateCommand runs the command before a backend that knows nothing of it.
func TestGateCommand(t *testing.T) {
	v := newGateVenue(t)
	dir, a, agentTLS := v.dir, v.agent, v.tls
	config := v.config("gate.key", "seen.db", "request_signature: checked\nagents: {'spiffe://example.org/agent/a': ['127.0.0.0/8']}\n")
	path := writeFile(t, filepath.Join(dir, "gate.yaml"), []byte(config))
	if code, _, errs := call("", "gate", "check", "--config", path); code != 0 {
		t.Fatalf("check: exit code %d: %s", code, errs)
	}
	if _, err := os.Stat(filepath.Join(dir, "seen.db")); err == nil {
		t.Error("a check makes the store, which then belongs to whoever checked")
	}
	for name, text := range map[string]string{"unknown member": config + "x: y\n", "backend is missing": strings.Replace(config, "backend: "+v.backend+"\n", "", 1), "a password file is for": config + "replay_db_password_file: gate.key\n", "replay_db_password_file": strings.Replace(config, "seen.db", "postgres://gate:secret@/x?host=/run", 1), "ends in .csv": config + "regions: routes.yaml\n", "checked or required": strings.Replace(config, "checked", "sometimes", 1), "a prefix such as": strings.Replace(config, "127.0.0.0/8", "here", 1)} {
		if code, _, errs := call("", "gate", "check", "--config", writeFile(t, filepath.Join(dir, "bad.yaml"), []byte(text))); code == 0 || !strings.Contains(errs, name) {
			t.Errorf("want something about %q: exit code %d: %s", name, code, errs)
		}
	}

	var ready struct{ Address string }
	stop := startCommand(t, &ready, "gate", "serve", "--config", path)
	var change func(*http.Request) // before it is sent
	post := func(certificates []tls.Certificate, jws string, body []byte) (int, string) {
		t.Helper()
		return v.post(t, ready.Address, certificates, jws, body, change)
	}
	mine := []tls.Certificate{agentTLS}
	body := gateBody
	good := signedFor(t, a, 1, body)
	if status, text := post(mine, good, body); status != 200 || text != a.ID {
		t.Errorf("a good order: %d %s", status, text)
	}
	larger := []byte(`{"id":"A-1","isin":"FR0000120271","qty":"1000","price":"50"}`)
	for name, c := range map[string]struct {
		certificates []tls.Certificate
		jws          string
		body         []byte
		reason       string
	}{
		"replayed":               {mine, good, body, `"reason":"replay"`},
		"changed body":           {mine, signedFor(t, a, 2, body), larger, `"reason":"body"`},
		"another order's digest": {mine, signedFor(t, a, 3, larger), larger, `"reason":"mismatch"`},
		"no client certificate":  {nil, signedFor(t, a, 4, body), body, ""}, // what the client sees depends on what it was writing
	} {
		status, text := post(c.certificates, c.jws, c.body)
		if c.certificates == nil && status == 0 {
			continue // the handshake failed; writing may notice before the server's alert is read
		}
		if status == 200 || !strings.Contains(text, c.reason) {
			t.Errorf("%s: %d %s", name, status, text)
		}
	}
	// The request's own signature is checked where it is there.
	change = func(r *http.Request) {
		if err := httpsig.Sign(r, body, agentTLS.PrivateKey.(crypto.Signer), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if status, text := post(mine, signedFor(t, a, 5, body), body); status != 200 {
		t.Errorf("a signed request: %d %s", status, text)
	}
	sign := change
	change = func(r *http.Request) { sign(r); r.Header.Set("Signature", "agent=:AAAA:") }
	if status, text := post(mine, signedFor(t, a, 6, body), body); status != 401 || !strings.Contains(text, `"reason":"request_signature"`) {
		t.Errorf("a request with another signature: %d %s", status, text)
	}
	if err := stop(); err != nil {
		t.Errorf("it ended so: %v", err)
	}
}

// startCommand starts the command as a process of its own, since it confines
// itself, and reads the line with which it says that it is ready.
func startCommand(t *testing.T, ready any, args ...string) (stop func() error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return startProgram(t, self, new(bytes.Buffer), ready, args...)
}

// startProgram is startCommand with another build of the command. What it logs is
// in errs when it has ended.
func startProgram(t *testing.T, program string, errs *bytes.Buffer, ready any, args ...string) (stop func() error) {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "INKAN_TEST_COMMAND=1")
	cmd.Stderr = errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceValue(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		return cmd.Wait()
	})
	t.Cleanup(func() { _ = stop() })
	if err := json.NewDecoder(out).Decode(ready); err != nil {
		_ = stop()
		t.Fatalf("%v did not start: %s", args, errs.String())
	}
	return stop
}

// TestGateDocumented: docs/gate.md has every reason's line.
func TestGateDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/gate.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range gate.Reasons {
		if line := fmt.Sprintf("| %d | `%s` | %s |", r.Status, r.Reason, r.What); !strings.Contains(string(doc), line) {
			t.Errorf("docs/gate.md does not have the line\n%s", line)
		}
	}
}
