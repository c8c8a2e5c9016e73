package signer_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"inkan/internal/problem"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/simulator"
)

// domain is a SPIFFE trust domain with an X.509 and a JWT authority.
type domain struct {
	dir     string
	key     *ecdsa.PrivateKey
	ca      *x509.Certificate
	jwtKey  *ecdsa.PrivateKey
	address string // of the signer
}

func key(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newDomain(t *testing.T) *domain {
	t.Helper()
	d := &domain{dir: t.TempDir(), key: key(t), jwtKey: key(t)}
	td, _ := url.Parse("spiffe://example.org")
	d.ca = d.issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: "example.org"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td}}, d.key.Public(), nil)
	d.writeBundle(t, d.ca)
	server := key(t)
	cert := d.issue(t, &x509.Certificate{DNSNames: []string{"localhost"}, KeyUsage: x509.KeyUsageDigitalSignature}, server.Public(), d.ca)
	d.write(t, "server.pem", "CERTIFICATE", cert.Raw)
	d.writeKey(t, "server.key", server)
	d.write(t, "ca.pem", "CERTIFICATE", d.ca.Raw)
	return d
}

// issue signs a template with the domain's key; without a parent, for itself.
func (d *domain) issue(t *testing.T, c *x509.Certificate, pub crypto.PublicKey, parent *x509.Certificate) *x509.Certificate {
	t.Helper()
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	}
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, d.key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (d *domain) write(t *testing.T, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(d.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (d *domain) writeKey(t *testing.T, name string, k *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return d.write(t, name, "PRIVATE KEY", der)
}

// writeBundle writes the SPIFFE bundle with one X.509 authority.
func (d *domain) writeBundle(t *testing.T, ca *x509.Certificate) {
	t.Helper()
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: ca.PublicKey, Certificates: []*x509.Certificate{ca}, Use: "x509-svid"},
		{Key: d.jwtKey.Public(), KeyID: "j1", Use: "jwt-svid"},
	}}
	b, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d.dir, "bundle.json")
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// svid returns a workload's certificate; change may spoil the template.
func (d *domain) svid(t *testing.T, id string, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	k := key(t)
	c := &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{u}, BasicConstraintsValid: true}
	if change != nil {
		change(c)
	}
	return tls.Certificate{Certificate: [][]byte{d.issue(t, c, k.Public(), d.ca).Raw}, PrivateKey: k}
}

func (d *domain) token(t *testing.T, k *ecdsa.PrivateKey, id, audience string, expires time.Duration) string {
	t.Helper()
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k, KeyID: "j1"}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(s).Claims(jwt.Claims{Subject: id, Audience: jwt.Audience{audience}, Expiry: jwt.NewNumericDate(time.Now().Add(expires)), IssuedAt: jwt.NewNumericDate(time.Now())}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

const (
	remoteID  = "spiffe://example.org/agent/far"
	tokenID   = "spiffe://example.org/agent/token"
	elsewhere = "spiffe://example.org/agent/elsewhere"
)

// startRemote starts a signer with three agents on other hosts.
func startRemote(t *testing.T, more string) (*desk, *domain) {
	t.Helper()
	d := newDomain(t)
	d.address = simulator.FreePortForTest(t)
	return start(t, fmt.Sprintf(`  - {name: far, callers: [{spiffe_id: %s}]}
  - {name: token, callers: [{spiffe_id: %s, jwt: true, networks: [127.0.0.0/8]}]}
  - {name: elsewhere, callers: [{spiffe_id: %s, networks: [192.0.2.0/24]}]}
remote:
  listen: %q
  certificate: %s/server.pem
  key: %[5]s/server.key
  trust_domain: example.org
  bundle: %[5]s/bundle.json
  jwt_audience: signer-1
%s`, remoteID, tokenID, elsewhere, d.address, d.dir, more)), d
}

func (d *domain) url() string {
	return "https://localhost:" + d.address[strings.LastIndex(d.address, ":")+1:]
}

func (d *domain) config(certs ...tls.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(d.ca)
	return &tls.Config{RootCAs: roots, Certificates: certs}
}

// ask has an order signed; the answer is the agent that signed it, or the error.
func (d *domain) ask(t *testing.T, c *tls.Config, token string) error {
	t.Helper()
	var source func() (string, error)
	if token != "" {
		source = func() (string, error) { return token, nil }
	}
	to, err := client.NewRemote(d.url(), c, source)
	if err != nil {
		t.Fatal(err)
	}
	_, err = to.SignJSON(t.Context(), order(client.NewID()))
	return err
}

func TestRemoteCallers(t *testing.T) {
	desk, d := startRemote(t, "")
	if err := d.ask(t, d.config(d.svid(t, remoteID, nil)), ""); err != nil {
		t.Fatal(err)
	}
	if err := d.ask(t, d.config(), d.token(t, d.jwtKey, tokenID, "signer-1", time.Minute)); err != nil {
		t.Fatal(err)
	}
	if far, tok := desk.entries(t, "far"), desk.entries(t, "token"); far != 1 || tok != 1 {
		t.Errorf("%d and %d entries, want one each", far, tok)
	}
	other := newDomain(t)
	good := d.token(t, d.jwtKey, tokenID, "signer-1", time.Minute)
	for _, c := range []struct {
		name, token, want string
		certs             []tls.Certificate
	}{
		{"nothing shown", "", "neither an X.509-SVID nor a JWT-SVID", nil},
		{"unknown workload", "", "no agent's callers include", []tls.Certificate{d.svid(t, "spiffe://example.org/agent/nobody", nil)}},
		{"wrong address", "", "may not call from 127.0.0.1", []tls.Certificate{d.svid(t, elsewhere, nil)}},
		{"certificate of another authority", "", "tls", []tls.Certificate{other.svid(t, remoteID, nil)}},
		{"expired certificate", "", "tls", []tls.Certificate{d.svid(t, remoteID, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
		})}},
		{"certificate of another trust domain", "", "tls", []tls.Certificate{d.svid(t, "spiffe://other.org/agent/far", nil)}},
		{"certificate with two IDs", "", "tls", []tls.Certificate{d.svid(t, remoteID, func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) })}},
		{"certificate that may sign certificates", "", "tls", []tls.Certificate{d.svid(t, remoteID, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign })}},
		{"certificate of an authority", "", "tls", []tls.Certificate{d.svid(t, remoteID, func(c *x509.Certificate) { c.IsCA = true })}},
		{"token where a certificate is due", d.token(t, d.jwtKey, remoteID, "signer-1", time.Minute), "must show an X.509-SVID", nil},
		{"token for another audience", d.token(t, d.jwtKey, tokenID, "signer-2", time.Minute), "no valid JWT-SVID", nil},
		{"expired token", d.token(t, d.jwtKey, tokenID, "signer-1", -time.Minute), "no valid JWT-SVID", nil},
		{"token by another authority", d.token(t, other.jwtKey, tokenID, "signer-1", time.Minute), "no valid JWT-SVID", nil},
		{"token of another trust domain", d.token(t, d.jwtKey, "spiffe://other.org/agent/token", "signer-1", time.Minute), "no valid JWT-SVID", nil},
		{"altered token", good[:len(good)-2] + "AA", "no valid JWT-SVID", nil},
		{"unsigned token", "eyJhbGciOiJub25lIn0." + strings.Split(good, ".")[1] + ".", "no valid JWT-SVID", nil},
		{"oversized token", strings.Repeat("A", 9000), "at most 8192", nil},
		{"certificate and token", good, "one of them is expected", []tls.Certificate{d.svid(t, remoteID, nil)}},
	} {
		err := d.ask(t, d.config(c.certs...), c.token)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want something about %q", c.name, err, c.want)
		}
		if p, ok := errors.AsType[*problem.Problem](err); c.want != "tls" && (!ok || p.Rule != "caller" || strings.Contains(p.Detail, good)) {
			t.Errorf("%s: the refusal is %v", c.name, err)
		}
	}
	if far, tok, at := desk.entries(t, "far"), desk.entries(t, "token"), desk.entries(t, "elsewhere"); far != 1 || tok != 1 || at != 0 {
		t.Errorf("refused callers left entries: %d, %d, %d", far, tok, at)
	}
	to, err := client.NewRemote(d.url(), d.config(d.svid(t, remoteID, nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := to.Get(t.Context(), "/v1/status", new(signer.Status)); err == nil {
		t.Error("the operators' status was shown on another host")
	}
	down := d.config(d.svid(t, remoteID, nil))
	down.MaxVersion = tls.VersionTLS12
	if c, err := tls.Dial("tcp", d.address, down); err == nil {
		_ = c.Close()
		t.Error("TLS 1.2 was accepted")
	}
}

// A certificate that was good at the handshake is not good for ever.
func TestRemoteLongConnection(t *testing.T) {
	desk, d := startRemote(t, "")
	short := d.svid(t, remoteID, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(3*time.Second)
	})
	to, err := client.NewRemote(d.url(), d.config(short), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := to.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	// The trust bundle no longer has the authority: the open connection is refused.
	rotated, err := client.NewRemote(d.url(), d.config(d.svid(t, remoteID, nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rotated.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	d.writeBundle(t, newDomain(t).ca)
	if _, err := rotated.SignJSON(t.Context(), order(client.NewID())); err == nil || !strings.Contains(err.Error(), "no valid X.509-SVID") {
		t.Errorf("after the authority was taken out of the bundle: %v", err)
	}
	d.writeBundle(t, d.ca)
	if _, err := rotated.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Errorf("after it was put back: %v", err)
	}
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		_, err := to.SignJSON(t.Context(), order(client.NewID()))
		if err != nil && strings.Contains(err.Error(), "its certificate expired") {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("an expired certificate on an open connection: %v", err)
		}
	}
	if err := os.Remove(filepath.Join(d.dir, "bundle.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := rotated.SignJSON(t.Context(), order(client.NewID())); err == nil || strings.Contains(err.Error(), "bundle.json") {
		t.Errorf("without a bundle: %v", err)
	}
	if !strings.Contains(desk.log.String(), "bundle.json") {
		t.Errorf("the log does not say why: %s", desk.log)
	}
}

func TestRemoteLimits(t *testing.T) {
	_, d := startRemote(t, "  connections_per_host: 2\n  requests_per_second: 3\n")
	config := d.config(d.svid(t, remoteID, nil))
	to, err := client.NewRemote(d.url(), config, nil)
	if err != nil {
		t.Fatal(err)
	}
	limited := false
	for range 10 {
		_, err := to.SignJSON(t.Context(), order(client.NewID()))
		if p, ok := errors.AsType[*problem.Problem](err); ok && p.Status == http.StatusTooManyRequests {
			limited = true
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if !limited {
		t.Error("ten requests in no time passed a limit of three a second")
	}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			_ = c.Close()
		}
	}()
	refused := 0
	for range 4 {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", d.address, &tls.Config{RootCAs: config.RootCAs, ServerName: "localhost", Certificates: config.Certificates})
		if err != nil {
			refused++
			continue
		}
		open = append(open, c)
	}
	if len(open) != 1 || refused != 3 { // the client above holds the other
		t.Errorf("%d connections more, %d refused; two are allowed in all", len(open), refused)
	}
	_ = open[0].Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		if c, err := tls.Dial("tcp", d.address, &tls.Config{RootCAs: config.RootCAs, ServerName: "localhost"}); err == nil {
			_ = c.Close()
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Error("a place that was left is not given again")
}

// Who could be nobody is turned away before the handshake.
func TestRemoteNetworkBeforeHandshake(t *testing.T) {
	d := newDomain(t)
	d.address = "127.0.0.1:0"
	l, err := net.Listen("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	d.address = l.Addr().String()
	_ = l.Close()
	start(t, fmt.Sprintf("  - {name: far, callers: [{spiffe_id: %s, networks: [192.0.2.0/24]}]}\nremote: {listen: %q, certificate: %s/server.pem, key: %[3]s/server.key, trust_domain: example.org, bundle: %[3]s/ca.pem}\n", remoteID, d.address, d.dir))
	c, err := net.Dial("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes, %v: the connection should have been closed at once", n, err)
	}
}

// curl is a client that is not ours.
func TestRemoteCurl(t *testing.T) {
	_, d := startRemote(t, "")
	svid := d.svid(t, remoteID, nil)
	cert, k := d.write(t, "svid.pem", "CERTIFICATE", svid.Certificate[0]), d.writeKey(t, "svid.key", svid.PrivateKey.(*ecdsa.PrivateKey))
	out, err := exec.Command("curl", "-sS", "--fail-with-body", "--cacert", filepath.Join(d.dir, "ca.pem"), "--cert", cert, "--key", k, "-d", string(order(client.NewID())), d.url()+"/v1/actions").CombinedOutput()
	if err != nil || !strings.Contains(string(out), `"jws":"ey`) {
		t.Errorf("curl: %v: %s", err, out)
	}
}

func TestRemoteConfig(t *testing.T) {
	head := "socket: s\nstate_dir: d\ntpm: t\nissuer: {url: 'https://x', ca: c}\n"
	remote := "remote: {listen: ':1', certificate: c, key: k, trust_domain: example.org, bundle: b}\n"
	agents := func(caller string) string { return head + "agents: [{name: a, callers: [" + caller + "]}]\n" }
	if _, err := signer.ParseConfig([]byte(agents("{spiffe_id: 'spiffe://example.org/a', networks: [10.0.0.0/8]}")+remote), "/"); err != nil {
		t.Fatal(err)
	}
	for want, text := range map[string]string{
		"remote is not configured for its trust domain": agents("{spiffe_id: 'spiffe://other.org/a'}") + remote,
		"can never call":           agents("{spiffe_id: 'spiffe://example.org/a'}"),
		"an ID such as spiffe":     agents("{spiffe_id: 'https://example.org/a'}") + remote,
		"no bits set behind":       agents("{spiffe_id: 'spiffe://example.org/a', networks: [10.1.0.0/8]}") + remote,
		"is on another host":       agents("{spiffe_id: 'spiffe://example.org/a', user: '0'}") + remote,
		"networks must say":        agents("{spiffe_id: 'spiffe://example.org/a', jwt: true}") + remote,
		"jwt needs remote":         agents("{spiffe_id: 'spiffe://example.org/a', jwt: true, networks: [10.0.0.0/8]}") + remote,
		"are for a caller with":    agents("{user: '0', networks: [10.0.0.0/8]}") + remote,
		"remote.listen is missing": agents("{user: '0'}") + strings.Replace(remote, "listen: ':1', ", "", 1),
		"1 to 1000000 is expected": agents("{user: '0'}") + strings.Replace(remote, "bundle: b", "bundle: b, max_connections: -1", 1),
		"a name such as example":   agents("{user: '0'}") + strings.Replace(remote, "example.org", "EXAMPLE org", 1),
		"give each workload an ID": head + "agents: [{name: a, callers: [{spiffe_id: 'spiffe://example.org/a'}]}, {name: b, callers: [{spiffe_id: 'spiffe://example.org/a'}]}]\n" + remote,
	} {
		if _, err := signer.ParseConfig([]byte(text), "/"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want something about %q, got %v", want, err)
		}
	}
}
