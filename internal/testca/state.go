package testca

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// TLS certifies a TLS key: for the agent with this SPIFFE ID, or for a server
// at names if id is empty.
func (ca *CA) TLS(tb TB, id string, key crypto.PublicKey, names []string, change func(*x509.Certificate)) *x509.Certificate {
	tb.Helper()
	serial := make([]byte, 8)
	if _, err := rand.Read(serial); err != nil {
		tb.Fatal(err)
	}
	serial[0] = serial[0]&0x7f | 0x40
	t := &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			tb.Fatal(err)
		}
		t.URIs, t.ExtKeyUsage = []*url.URL{u}, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	if change != nil {
		change(t)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.Certificate, key, ca.Key)
	if err != nil {
		tb.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// State writes what a signer keeps of an agent and package wire reads: both certificates
// and policies, in JSON. The action key is a software key, which is returned.
func (ca *CA) State(tb TB, dir, name string, scope []byte, tlsKey crypto.PublicKey, policies []byte) *Agent {
	tb.Helper()
	a := ca.Agent(tb, name, scope, nil)
	t := ca.TLS(tb, a.ID, tlsKey, nil, nil)
	WriteFile(tb, dir, "action.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Chain[0].Raw}))
	WriteFile(tb, dir, "tls.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: t.Raw}))
	WriteFile(tb, dir, "policies.json", policies)
	return a
}

// WriteFile replaces a file at once, as a signer does.
func WriteFile(tb TB, dir, name string, b []byte) string {
	tb.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		tb.Fatal(err)
	}
	return path
}
