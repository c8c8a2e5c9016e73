package certext

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"
)

// MaxLifetime is the longest time between NotBefore and NotAfter of an action
// certificate.
const MaxLifetime = 24 * time.Hour

// ActionCertificate is what an action certificate says, after its form was
// checked. Its chain is for the caller to verify.
type ActionCertificate struct {
	Certificate *x509.Certificate
	Agent       string // SPIFFE ID
	Scope       []byte // canonical JSON, not parsed
	Attestation *Attestation
}

// ParseAction checks that c has the form of an action certificate: the extended
// key usage, the critical scope, the key usage, one SPIFFE ID, a short life, and no
// critical extension that is not understood here.
func ParseAction(c *x509.Certificate) (*ActionCertificate, error) {
	a := &ActionCertificate{Certificate: c}
	var err error
	if a.Scope, err = Scope(c); err != nil {
		return nil, err
	}
	if a.Attestation, err = ParseAttestation(c); err != nil {
		return nil, err
	}
	for _, id := range c.UnhandledCriticalExtensions {
		if !id.Equal(OIDScope) {
			return nil, fmt.Errorf("unknown critical extension %v", id)
		}
	}
	switch {
	case c.IsCA:
		return nil, errors.New("it is a CA certificate")
	case !slices.ContainsFunc(c.UnknownExtKeyUsage, OIDAgentAction.Equal) || len(c.ExtKeyUsage) != 0 || len(c.UnknownExtKeyUsage) != 1:
		return nil, fmt.Errorf("its extended key usage is not exactly %v: it is not for agent actions", OIDAgentAction)
	case c.KeyUsage != x509.KeyUsageDigitalSignature:
		return nil, errors.New("its key usage is not exactly digitalSignature")
	case len(c.URIs) != 1 || c.URIs[0].Scheme != "spiffe" || len(c.DNSNames)+len(c.IPAddresses)+len(c.EmailAddresses) != 0:
		return nil, errors.New("its subject alternative name is not exactly one SPIFFE ID")
	case c.NotAfter.Sub(c.NotBefore) > MaxLifetime:
		return nil, fmt.Errorf("it lives for %s, at most %s is allowed", c.NotAfter.Sub(c.NotBefore), MaxLifetime)
	}
	a.Agent = c.URIs[0].String()
	return a, nil
}

// VerifyChain verifies that the certificate chains to a root at a time, and
// returns the chain.
func (a *ActionCertificate) VerifyChain(roots, intermediates *x509.CertPool, at time.Time) ([]*x509.Certificate, error) {
	leaf := *a.Certificate
	leaf.UnhandledCriticalExtensions = nil // ParseAction understood the one that may be there
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return nil, err
	}
	return chains[0], nil
}

// IsAdministrator says whether the certificate's extended key usage is that of
// an administrator.
func IsAdministrator(c *x509.Certificate) bool {
	return slices.ContainsFunc(c.UnknownExtKeyUsage, func(id asn1.ObjectIdentifier) bool { return id.Equal(OIDAdministrator) })
}
