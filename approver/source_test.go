package approver_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/approver"
	"inkan/internal/problem"
	"inkan/scope"
)

// TestSource asks from several addresses, for an agent whose scope says where
// it may call from.
func TestSource(t *testing.T) {
	feed := filepath.Join(t.TempDir(), "feed.csv")
	if err := os.WriteFile(feed, []byte("192.0.2.0/24,FR,,,\n198.51.100.0/24,US,,,\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		members, more, from string
		rule                scope.Rule
	}{
		{`"source_networks":["192.0.2.0/24"]`, "", "192.0.2.7", ""},
		{`"source_networks":["192.0.2.0/24"]`, "", "::ffff:192.0.2.7", ""},
		{`"source_networks":["192.0.2.0/24"]`, "", "198.51.100.7", scope.RuleSourceNetwork},
		{`"source_networks":["192.0.2.0/24"]`, "", "", scope.RuleSourceNetwork},
		{`"source_regions":["FR"]`, "", "192.0.2.7", scope.RuleSourceRegion},
		{`"source_regions":["FR"]`, "regions: " + feed + "\n", "192.0.2.7", ""},
		{`"source_regions":["FR"]`, "regions: " + feed + "\n", "198.51.100.7", scope.RuleSourceRegion},
	} {
		d := newDesk(t)
		d.limits = strings.Replace(scopeJSON, `"version"`, c.members+`,"version"`, 1)
		d.agent = d.certify(t, nil)
		d.approver = d.newApprover(t, config(t, c.more), d.record)
		r := d.request(d.next(t, "1", nil))
		if c.from != "" {
			r.From = netip.MustParseAddr(c.from)
		}
		if err := d.decide(r); c.rule != "" {
			refused(t, c.members+" from "+c.from, c.rule, err)
		} else if err != nil {
			t.Errorf("%s from %s: %v", c.members, c.from, err)
		}
		if _, err := approver.ParseRequest([]byte(`{"chain":["AA=="],"entries":["AA=="],"from":"192.0.2.7"}`), false); err == nil {
			t.Error("a request says itself where it comes from")
		}
	}
	if _, err := approver.ParseConfig([]byte("listen: l\ntrust_domain: d\nkey: k\ncertificate: c\ncertificate_key: k\nca: ca\ncrl_url: u\nrecord: r\nregions: missing.csv\nagents: [{name: a}]\n"), t.TempDir()); err == nil || !strings.Contains(err.Error(), "regions") {
		t.Errorf("region data that are missing: %v", err)
	}
}

// TestSourceOverTLS: over the network it is the peer's address that counts.
func TestSourceOverTLS(t *testing.T) {
	d := newDesk(t)
	d.limits = strings.Replace(scopeJSON, `"version"`, `"source_networks":["127.0.0.2/32"],"version"`, 1)
	d.agent = d.certify(t, nil)
	dir := t.TempDir()
	pair := func(name string, usage x509.ExtKeyUsage) tls.Certificate {
		a := d.ca.Agent(t, "mm-07", []byte(scopeJSON), func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage, c.ExtraExtensions = nil, []x509.ExtKeyUsage{usage}, []pkix.Extension{}
			c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		})
		key, err := x509.MarshalPKCS8PrivateKey(a.Key)
		if err != nil {
			t.Fatal(err)
		}
		for file, b := range map[string][]byte{name + ".pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Chain[0].Raw}), name + ".key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})} {
			if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return tls.Certificate{Certificate: [][]byte{a.Chain[0].Raw}, PrivateKey: a.Key}
	}
	pair("server", x509.ExtKeyUsageServerAuth)
	client := pair("client", x509.ExtKeyUsageClientAuth)
	c, err := approver.ParseConfig([]byte("listen: 127.0.0.1:0\ntrust_domain: example.org\nkey: file:k\ncertificate: server.pem\ncertificate_key: server.key\nca: ca\ncrl_url: http://x/crl\nrecord: r.db\nagents:\n  - name: mm-07\n"), dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ready, ended := make(chan approver.Addresses, 1), make(chan error, 1)
	go func() { ended <- d.newApprover(t, c, d.record).Serve(ctx, func(a approver.Addresses) { ready <- a }) }()
	var at approver.Addresses
	select {
	case at = <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	for from, rule := range map[string]string{"127.0.0.2": "", "127.0.0.3": "source_network"} {
		body, err := json.Marshal(d.request(d.next(t, "1", nil)))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(body), "From") {
			t.Fatalf("the request says where it comes from: %s", body)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+at.Signers+"/v1/authorizations", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Forwarded-For", "127.0.0.2")
		h := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: d.ca.Roots, Certificates: []tls.Certificate{client}}, DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext}}
		res, err := h.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if p := problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b); rule == "" && res.StatusCode != http.StatusOK || rule != "" && p.Rule != rule {
			t.Errorf("from %s: %d %s, want %q", from, res.StatusCode, b, rule)
		}
	}
	stop()
	if err := <-ended; err != nil && !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}
