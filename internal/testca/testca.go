// Package testca is a CA with action certificates over software keys, for
// tests and benchmarks: [New] a CA, [CA.Agent] an agent.
package testca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"time"

	"inkan/internal/certext"
)

// TB is what is needed of a testing.TB.
type TB interface {
	Helper()
	Fatal(args ...any)
}

// CA is a certificate authority.
type CA struct {
	Key         *ecdsa.PrivateKey
	Certificate *x509.Certificate
	Roots       *x509.CertPool
}

// Agent is an agent's key and certificate chain.
type Agent struct {
	Key   crypto.Signer
	Chain []*x509.Certificate
	ID    string // SPIFFE ID
}

// New makes a CA.
func New(tb TB) *CA {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SubjectKeyId: []byte{1}}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &k.PublicKey, k)
	if err != nil {
		tb.Fatal(err)
	}
	ca := &CA{Key: k, Roots: x509.NewCertPool()}
	if ca.Certificate, err = x509.ParseCertificate(der); err != nil {
		tb.Fatal(err)
	}
	ca.Roots.AddCert(ca.Certificate)
	return ca
}

// Agent makes an agent with a P-256 key and a certificate for a scope in
// canonical JSON, attested now. change, if not nil, may change the certificate.
func (ca *CA) Agent(tb TB, name string, scope []byte, change func(*x509.Certificate)) *Agent {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return ca.AgentWithKey(tb, name, scope, k, change)
}

// AgentWithKey is Agent for a key that is there.
func (ca *CA) AgentWithKey(tb TB, name string, scope []byte, key crypto.Signer, change func(*x509.Certificate)) *Agent {
	tb.Helper()
	now := time.Now().Truncate(time.Second)
	sc, err := certext.ScopeExtension(scope)
	if err != nil {
		tb.Fatal(err)
	}
	att, err := certext.AttestationExtension(certext.Attestation{Policy: "test", EvidenceSHA256: "00", Time: now.UTC(), Protection: certext.ProtectionTPM, Mode: "local", EK: certext.EKPinned, Device: "test"})
	if err != nil {
		tb.Fatal(err)
	}
	serial := make([]byte, 8)
	if _, err := rand.Read(serial); err != nil {
		tb.Fatal(err)
	}
	serial[0] = serial[0]&0x7f | 0x40
	id := &url.URL{Scheme: "spiffe", Host: "example.org", Path: "/agent/" + name}
	t := &x509.Certificate{SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true, UnknownExtKeyUsage: []asn1.ObjectIdentifier{certext.OIDAgentAction}, URIs: []*url.URL{id}, ExtraExtensions: []pkix.Extension{sc, att}}
	if change != nil {
		change(t)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.Certificate, key.Public(), ca.Key)
	if err != nil {
		tb.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return &Agent{Key: key, Chain: []*x509.Certificate{c}, ID: id.String()}
}

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
