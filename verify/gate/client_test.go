package gate_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/internal/certext"
	"inkan/internal/testca"
	"inkan/verify"
	"inkan/verify/gate"
	"inkan/verify/source"
)

// TestHandshakes: the TLS layer refuses alone; no request is read.
func TestHandshakes(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	spiffe := func(ids ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, id := range ids {
				u, err := url.Parse(id)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, u)
			}
		}
	}
	for name, change := range map[string]func(*x509.Certificate){
		"expired":                    func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) },
		"before its time":            func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) },
		"a server's":                 func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
		"for any use":                func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} },
		"for any use besides":        func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageAny) },
		"without a use":              func(c *x509.Certificate) { c.ExtKeyUsage = nil },
		"an administrator's":         func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{certext.OIDAdministrator} },
		"for actions too":            func(c *x509.Certificate) { c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{certext.OIDAgentAction} },
		"a CA's":                     func(c *x509.Certificate) { c.IsCA = true },
		"that signs certificates":    func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"that does not sign":         func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement },
		"without a SPIFFE ID":        spiffe(),
		"with two SPIFFE IDs":        spiffe("spiffe://example.org/agent/a", "spiffe://example.org/agent/b"),
		"of another trust domain":    spiffe("spiffe://example.com/agent/a"),
		"of a longer trust domain":   spiffe("spiffe://example.org.evil.com/agent/a"),
		"of another scheme":          spiffe("https://example.org/agent/a"),
		"of the trust domain":        spiffe("spiffe://example.org"),
		"with an empty path":         spiffe("spiffe://example.org/"),
		"with an empty segment":      spiffe("spiffe://example.org//a"),
		"with dots":                  spiffe("spiffe://example.org/agent/../a"),
		"with an escape":             spiffe("spiffe://example.org/agent/%61"),
		"with a query":               spiffe("spiffe://example.org/agent/a?b"),
		"with a port":                spiffe("spiffe://example.org:1/agent/a"),
		"with a user":                spiffe("spiffe://u@example.org/agent/a"),
		"with a long SPIFFE ID":      spiffe("spiffe://example.org/" + strings.Repeat("a", 2048)),
		"unknown critical extension": func(c *x509.Certificate) { c.ExtraExtensions = append(c.ExtraExtensions, critical()) },
	} {
		t.Run("certificate "+name, func(t *testing.T) {
			s.refuses(t, s.client(t, certificate(t, s.ca, change)))
		})
	}
	t.Run("no certificate", func(t *testing.T) { s.refuses(t, s.client(t)) })
	t.Run("certificate of another CA", func(t *testing.T) { s.refuses(t, s.client(t, certificate(t, testca.New(t), nil))) })
	t.Run("action certificate", func(t *testing.T) {
		s.refuses(t, s.client(t, tls.Certificate{Certificate: [][]byte{s.agent.Chain[0].Raw}, PrivateKey: s.agent.Key}))
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		c := s.good(t)
		c.Transport.(*http.Transport).TLSClientConfig.MaxVersion = tls.VersionTLS12
		s.refuses(t, c)
	})
	t.Run("no TLS", func(t *testing.T) {
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("POST /orders HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 64)
		n, _ := conn.Read(b)
		if !strings.HasPrefix(string(b[:n]), "HTTP/1.0 400") {
			t.Errorf("answer %q", b[:n])
		}
		s.nothing(t)
	})
	if status, _, answer := s.send(t, s.good(t), "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 200 {
		t.Errorf("a good one afterwards: %d %s", status, answer)
	}
}

func critical() pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: asn1.NullBytes}
}

func (s *site) refuses(t *testing.T, c *http.Client) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+s.addr+"/orders", strings.NewReader(goodBody))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(verify.Header, s.sign(t, s.agent, []byte(goodBody), nil))
	if res, err := c.Do(req); err == nil {
		_ = res.Body.Close()
		t.Errorf("the handshake succeeded, status %d", res.StatusCode)
	}
	s.nothing(t)
}

// TestHandlerAlone: without the gate's TLS configuration the handler lets
// nothing through.
func TestHandlerAlone(t *testing.T) {
	s := newSite(t)
	g, err := gate.New(s.config)
	if err != nil {
		t.Fatal(err)
	}
	plain := httptest.NewServer(g)
	defer plain.Close()
	unasked := httptest.NewTLSServer(g)
	defer unasked.Close()
	for _, server := range []*httptest.Server{plain, unasked} {
		s.addr = strings.TrimPrefix(server.URL, "https://")
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+"/orders", strings.NewReader(goodBody))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(verify.Header, s.sign(t, s.agent, []byte(goodBody), nil))
		req.Header.Set("Content-Type", "application/json")
		res, err := server.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusForbidden {
			t.Errorf("%s: status %d", server.URL, res.StatusCode)
		}
	}
	s.nothing(t)
}

// TestNetwork: the address that counts is that of the TCP peer.
func TestNetwork(t *testing.T) {
	s := newSite(t)
	s.config.Agents = from("127.0.0.0/8")
	s.serve(t)
	status, _, answer := s.send(t, s.good(t), "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), func(r *http.Request) {
		r.Header.Set("X-Forwarded-For", "192.0.2.1")
	})
	if status != 200 {
		t.Fatalf("%d %s", status, answer)
	}
	if got := (<-s.got).Header.Values("X-Forwarded-For"); len(got) != 1 || got[0] != "127.0.0.1" {
		t.Errorf("X-Forwarded-For is %q", got)
	}
}

// TestSource: the scope says where its agent may call from, over connections
// from several addresses of the host; a stolen certificate and key do not help.
func TestSource(t *testing.T) {
	feed, err := source.ParseGeofeed([]byte("127.0.0.2,FR,,,\n127.0.0.3,US,,,\n"))
	if err != nil {
		t.Fatal(err)
	}
	s := newSite(t)
	s.rescope(t, `"source_networks":["127.0.0.0/30"],"source_regions":["FR"]`)
	s.config.Receiver.Regions = feed
	s.serve(t)
	stolen := certificate(t, s.ca, nil)
	for _, c := range []struct{ local, reason string }{{"127.0.0.2", ""}, {"127.0.0.3", "source_region"}, {"127.0.0.4", "source_network"}, {"127.0.0.1", "source_region"}} {
		client := s.client(t, stolen)
		client.Transport.(*http.Transport).DialContext = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(c.local)}}).DialContext
		status, reason, answer := s.send(t, client, "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), func(r *http.Request) {
			r.Header.Set("X-Forwarded-For", "127.0.0.2")
			r.Header.Set("Forwarded", "for=127.0.0.2")
		})
		if reason != c.reason || (c.reason == "") != (status == 200) {
			t.Errorf("from %s: %d %s, want %q", c.local, status, answer, c.reason)
		}
		if c.reason == "" {
			<-s.got
		}
	}
	s.nothing(t)
}

// TestResumption: a resumed session is checked like the first one.
func TestResumption(t *testing.T) {
	s := newSite(t)
	s.serve(t)
	c := s.good(t)
	tr := c.Transport.(*http.Transport)
	tr.TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	tr.DisableKeepAlives = true
	for i := range 3 {
		if status, _, answer := s.send(t, c, "POST", "/orders", s.sign(t, s.agent, []byte(goodBody), nil), []byte(goodBody), nil); status != 200 {
			t.Errorf("connection %d: %d %s", i, status, answer)
		}
		if got := (<-s.got).Header.Get(gate.HeaderAgent); got != s.agent.ID {
			t.Errorf("connection %d: the backend was told %q", i, got)
		}
	}
}

// TestCurl: a client that is not Go's works as it is.
func TestCurl(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Fatal("curl is missing: apt-get install curl")
	}
	s := newSite(t)
	s.serve(t)
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{
		"ca.pem":   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.Certificate.Raw}),
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificateWithKey(t, s.ca, k, nil).Certificate[0]}),
		"key.pem":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		"action":   []byte(verify.Header + ": " + s.sign(t, s.agent, []byte(goodBody), nil)),
		"body":     []byte(goodBody),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "curl", "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", "--cacert", "ca.pem", "--cert", "cert.pem", "--key", "key.pem",
		"--header", "@action", "--header", "Content-Type: application/json", "--data-binary", "@body", "https://"+s.addr+"/orders")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "acknowledged" {
		t.Errorf("curl: %v: %s", err, out)
	}
}
