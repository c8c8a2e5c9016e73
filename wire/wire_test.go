package wire_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"inkan/attest"
	"inkan/hsm"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/simulator"
	"inkan/tpm"
	"inkan/wire"
)

// TestMain is the worker of package hsm too.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "hsm-worker" {
		fmt.Fprintln(os.Stderr, hsm.RunWorker(os.NewFile(3, "parent")))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// host is an agent's state with its TLS key in a device, and a server that
// demands a client certificate.
type host struct {
	ca      *testca.CA
	dir     string
	options wire.Options
	key     crypto.PublicKey
	policy  []byte
	server  *httptest.Server
	port    int
	seen    chan *tls.ConnectionState // of each request
}

const hostScope = `{"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"destinations":[{"host":"127.0.0.1","port":%d}],"version":1}`

func newHost(t *testing.T, device string) *host {
	t.Helper()
	h := &host{ca: testca.New(t), dir: t.TempDir(), seen: make(chan *tls.ConnectionState, 64)}
	h.options = wire.Options{Dir: h.dir, Roots: h.ca.Roots}
	h.policy = []byte("{}")
	switch device {
	case "token":
		h.token(t)
	case "tpm":
		h.tpm(t)
	}
	h.serve(t, nil)
	h.write(t, fmt.Sprintf(hostScope, h.port))
	return h
}

// write writes the state with new certificates.
func (h *host) write(t *testing.T, scope string) {
	h.ca.State(t, h.dir, "a", []byte(scope), h.key, h.policy)
}

func (h *host) token(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	t.Setenv("SOFTHSM2_CONF", s.Config)
	uri := fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", s.Label, s.Module, s.PINFile)
	token, err := hsm.Open(uri, hsm.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer token.Close()
	k, err := token.GenerateKey(hsm.P256, "tls", nil)
	if err != nil {
		t.Fatal(err)
	}
	h.key, h.options.Key = k.Public(), strings.Replace(uri, "?", ";id="+percent(k.Attributes().ID)+"?", 1)
}

func percent(id []byte) string {
	var b strings.Builder
	for _, c := range id {
		fmt.Fprintf(&b, "%%%02x", c)
	}
	return b.String()
}

// tpm makes a key that works in the state that the TPM is in, as an issuer's policy key approves it.
func (h *host) tpm(t *testing.T) {
	s := simulator.TPMForTest(t)
	d, err := tpm.Open(s.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	policy, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	area, err := attest.PolicyKeyPublic(&policy.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	auth, err := attest.AuthPolicy(area, nil)
	if err != nil {
		t.Fatal(err)
	}
	values, err := d.ReadPCRs([]attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 7}}})
	if err != nil {
		t.Fatal(err)
	}
	approved, err := attest.SignPolicy(policy, "first", values, nil)
	if err != nil {
		t.Fatal(err)
	}
	file, public, err := d.CreateKey(attest.KeyTemplate(auth))
	if err != nil {
		t.Fatal(err)
	}
	if h.key, err = attest.PublicKey(public); err != nil {
		t.Fatal(err)
	}
	if h.policy, err = json.Marshal(tpm.Policies{PolicyKey: area, Approved: []attest.ApprovedPolicy{*approved}}); err != nil {
		t.Fatal(err)
	}
	testca.WriteFile(t, h.dir, "tls.tss2.pem", file)
	h.options.TPM = s.Address
}

// serve starts the server, which change may make a bad one.
func (h *host) serve(t *testing.T, change func(*tls.Config)) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := h.ca.TLS(t, "", key.Public(), []string{"127.0.0.1"}, nil)
	h.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.seen <- r.TLS
		_, _ = io.Copy(w, r.Body) // the client may be gone
	}))
	h.server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: key}}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: h.ca.Roots}
	if change != nil {
		change(h.server.TLS)
	}
	h.server.Config.ErrorLog = quiet
	h.server.StartTLS()
	t.Cleanup(h.server.Close)
	h.port = h.server.Listener.Addr().(*net.TCPAddr).Port
}

func open(t *testing.T, o wire.Options) *wire.Identity {
	t.Helper()
	i, err := wire.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = i.Close() })
	return i
}

func post(c *http.Client, url, body string) (string, error) {
	res, err := c.Post(url, "text/plain", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

// TestOneSignature: requests, one after the other or on connections of their
// own, take one signature of the device; a renewed certificate takes one more.
func TestOneSignature(t *testing.T) {
	for _, device := range []string{"token", "tpm"} {
		t.Run(device, func(t *testing.T) {
			h := newHost(t, device)
			i := open(t, h.options)
			c := i.Client(h.ca.Roots)
			requests := func() (serial string) {
				for range 10 {
					if got, err := post(c, h.server.URL, "hello"); err != nil || got != "hello" {
						t.Fatalf("got %q, %v", got, err)
					}
					s := <-h.seen
					if s.Version != tls.VersionTLS13 || s.PeerCertificates[0].URIs[0].String() != "spiffe://example.org/agent/a" {
						t.Fatalf("TLS %x with %v", s.Version, s.PeerCertificates[0].URIs)
					}
					serial = s.PeerCertificates[0].SerialNumber.String()
				}
				return serial
			}
			first := requests()
			if n := i.Signatures(); n != 1 {
				t.Errorf("10 requests took %d signatures", n)
			}
			c.CloseIdleConnections()
			requests()
			if n := i.Signatures(); n != 1 {
				t.Errorf("a new connection was not resumed: %d signatures", n)
			}
			h.write(t, fmt.Sprintf(hostScope, h.port))
			for deadline := time.Now().Add(time.Minute); requests() == first; {
				if time.Now().After(deadline) {
					t.Fatal("the renewed certificate is not used")
				}
			}
			if n := i.Signatures(); n != 2 {
				t.Errorf("after a renewal: %d signatures", n)
			}
		})
	}
}

// TestRenewalKeepsConnections: a connection that is open goes on.
func TestRenewalKeepsConnections(t *testing.T) {
	h := newHost(t, "token")
	i := open(t, h.options)
	d := i.Dialer(h.ca.Roots)
	conn, err := d.Dial(t.Context(), "127.0.0.1", uint16(h.port), "http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	before := i.NotAfter()
	ca := h.ca
	agent := ca.Agent(t, "a", fmt.Appendf(nil, hostScope, h.port), nil)
	leaf := ca.TLS(t, agent.ID, h.key, nil, func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) })
	testca.WriteFile(t, h.dir, "tls.pem", pemOf(leaf))
	waitFor(t, func() bool { _, err := i.Scope(); return err == nil && i.NotAfter().After(before) })
	if _, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(b), "hi") {
		t.Errorf("got %q, %v", b, err)
	}
}

// TestRefusals: one row a rule.
func TestRefusals(t *testing.T) {
	h := newHost(t, "token")
	other := testca.New(t)
	for name, x := range map[string]struct {
		rule   scope.Rule
		change func(*testing.T)
		host   string
		port   int
		roots  *x509.CertPool
	}{
		"another port":           {rule: scope.RuleDestinations, port: h.port + 1},
		"another name":           {rule: scope.RuleDestinations, host: "localhost"},
		"a server of another CA": {rule: wire.RuleTLS, roots: other.Roots},
		"no roots":               {rule: wire.RuleTLS, roots: x509.NewCertPool()},
		"another server name": {rule: wire.RuleTLS, change: func(t *testing.T) {
			h.write(t, fmt.Sprintf(strings.Replace(hostScope, `"port":%d`, `"port":%d,"server_name":"other.example.org"`, 1), h.port))
		}},
		"TLS 1.2 alone": {rule: wire.RuleTLS, change: func(t *testing.T) {
			h.serve(t, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })
			h.write(t, fmt.Sprintf(hostScope, h.port))
		}},
		"nobody listens": {rule: wire.RuleUnreachable, change: func(*testing.T) { h.server.Close() }},
		"a certificate that ended": {rule: wire.RuleNoCertificate, change: func(t *testing.T) {
			a := h.ca.Agent(t, "a", fmt.Appendf(nil, hostScope, h.port), nil)
			testca.WriteFile(t, h.dir, "tls.pem", pemOf(h.ca.TLS(t, a.ID, h.key, nil, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = c.NotBefore.Add(-time.Hour), c.NotBefore })))
		}},
		"an action certificate that ended": {rule: wire.RuleNoCertificate, change: func(t *testing.T) {
			a := h.ca.Agent(t, "a", fmt.Appendf(nil, hostScope, h.port), func(c *x509.Certificate) { c.NotBefore, c.NotAfter = c.NotBefore.Add(-time.Hour), c.NotBefore })
			testca.WriteFile(t, h.dir, "action.pem", pemOf(a.Chain[0]))
		}},
		"a scope without destinations": {rule: scope.RuleDestinations, change: func(t *testing.T) {
			h.write(t, `{"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"version":1}`)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			h.serve(t, nil)
			h.write(t, fmt.Sprintf(hostScope, h.port))
			port := h.port
			if x.port != 0 {
				port = x.port
			}
			if x.change != nil {
				x.change(t)
				port = h.port
			}
			roots, at := h.ca.Roots, "127.0.0.1"
			if x.roots != nil {
				roots = x.roots
			}
			if x.host != "" {
				at = x.host
			}
			i := open(t, h.options)
			_, err := i.Dialer(roots).Dial(t.Context(), at, uint16(port), "")
			if !errors.Is(err, &scope.Refusal{Rule: x.rule}) {
				t.Errorf("got %v, want %s", err, x.rule)
			}
			_, err = post(i.Client(roots), fmt.Sprintf("https://%s:%d/", at, port), "x")
			if !errors.Is(err, &scope.Refusal{Rule: x.rule}) {
				t.Errorf("HTTP: got %v, want %s", err, x.rule)
			}
		})
	}
}

// TestDevice: the device is gone, or the host is in another state.
func TestDevice(t *testing.T) {
	h := newHost(t, "token")
	i := open(t, h.options)
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := i.Dialer(h.ca.Roots).Dial(t.Context(), "127.0.0.1", uint16(h.port), "")
	if r, ok := errors.AsType[*scope.Refusal](err); !ok || r.Rule != wire.RuleDevice || r.Cause == nil || strings.Contains(r.Error(), r.Cause.Error()) {
		t.Errorf("got %v", err)
	}
}

// TestServerRefuses: the server does not take the agent's certificate, which TLS 1.3
// says after the handshake.
func TestServerRefuses(t *testing.T) {
	h := newHost(t, "token")
	h.serve(t, func(c *tls.Config) { c.ClientCAs = testca.New(t).Roots })
	h.write(t, fmt.Sprintf(hostScope, h.port))
	i := open(t, h.options)
	if _, err := post(i.Client(h.ca.Roots), h.server.URL, "x"); !errors.Is(err, &scope.Refusal{Rule: wire.RuleTLS}) {
		t.Errorf("got %v", err)
	}
	if _, err := post(i.Client(h.ca.Roots), strings.Replace(h.server.URL, "https", "http", 1), "x"); err == nil {
		t.Error("http was spoken")
	}
}

// TestBadState: what does not fit together is not opened.
func TestBadState(t *testing.T) {
	for name, change := range map[string]func(*testing.T, *host){
		"no certificate": func(t *testing.T, h *host) { remove(t, h.dir, "tls.pem") },
		"of another agent": func(t *testing.T, h *host) {
			testca.WriteFile(t, h.dir, "tls.pem", pemOf(h.ca.TLS(t, "spiffe://example.org/agent/b", h.key, nil, nil)))
		},
		"for another key": func(t *testing.T, h *host) {
			testca.WriteFile(t, h.dir, "tls.pem", pemOf(h.ca.TLS(t, "spiffe://example.org/agent/a", h.ca.Key.Public(), nil, nil)))
		},
		"of another CA":               func(t *testing.T, h *host) { h.options.Roots = testca.New(t).Roots },
		"the action's in its":         func(t *testing.T, h *host) { copyFile(t, h.dir, "action.pem", "tls.pem") },
		"the TLS one as the action's": func(t *testing.T, h *host) { copyFile(t, h.dir, "tls.pem", "action.pem") },
		"no device":                   func(t *testing.T, h *host) { h.options.Key, h.options.TPM = "", "" },
		"no roots":                    func(t *testing.T, h *host) { h.options.Roots = nil },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "token")
			change(t, h)
			if i, err := wire.Open(h.options); err == nil {
				t.Errorf("it was opened: %s", i.Agent())
			}
		})
	}
}

func TestHostPort(t *testing.T) {
	for in, want := range map[string]string{"a": "a 443", "a:1": "a 1", "[::1]:2": "::1 2", "[::1]": "::1 443", "[0:0::1]:2": "::1 2"} {
		if h, p, err := wire.HostPort(in); err != nil || fmt.Sprint(h, " ", p) != want {
			t.Errorf("%s: %s %d %v", in, h, p, err)
		}
	}
	for _, in := range []string{"", ":1", "a:0", "a:65536", "a:01", "a:x", "a:", "::1", "a:1:2"} {
		if h, p, err := wire.HostPort(in); err == nil {
			t.Errorf("%s: %s %d", in, h, p)
		}
	}
}

func TestCancelledDial(t *testing.T) {
	h := newHost(t, "token")
	i := open(t, h.options)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := i.Dialer(h.ca.Roots).Dial(ctx, "127.0.0.1", uint16(h.port), ""); err == nil {
		t.Error("it was dialled")
	}
}
