package issuer

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"

	"inkan/internal/certext"
)

// Profiles of certificates.
const (
	profileAction = "action" // an agent's action key
	profileTLS    = "tls"    // an agent's TLS key
	profileServer = "server" // this issuer's TLS servers
	profileAdmin  = "admin"  // an administrator of this issuer
	profileOCSP   = "ocsp"   // this issuer's OCSP responder
)

// backdate allows for clocks that are behind the issuer's.
const backdate = 30 * time.Second

// order is what issue makes a certificate of.
type order struct {
	profile     string
	key         crypto.PublicKey
	agent       *Agent               // action, tls: as the inventory had it when this was decided
	scope       []byte               // action: canonical JSON
	attestation *certext.Attestation // action
	names       []string             // server: DNS names and IP addresses
	common      string               // server, admin, ocsp: CN
	lifetime    time.Duration
}

var oidNoCheck = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 5} // RFC 6960, section 4.2.2.2.1

// issue makes a certificate and keeps it. It is the only function that does
// (G10). For agents it is reached through grant alone, with an *attest.Result.
func (i *Issuer) issue(ctx context.Context, o order) (*x509.Certificate, error) {
	now := i.now()
	serial := make([]byte, 16)
	if _, err := rand.Read(serial); err != nil {
		return nil, err
	}
	serial[0] = serial[0]&0x7f | 0x40 // positive, and always of the same length
	ski, err := keyID(o.key)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial),
		NotBefore:    now.Add(-backdate).Truncate(time.Second),
		NotAfter:     now.Add(o.lifetime - backdate).Truncate(time.Second),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		SubjectKeyId: ski, AuthorityKeyId: i.ca.SubjectKeyId,
		BasicConstraintsValid: true,
		CRLDistributionPoints: []string{i.config.PublicURL + "/crl"},
		OCSPServer:            []string{i.config.PublicURL + "/ocsp"},
		IssuingCertificateURL: []string{i.config.PublicURL + "/ca.cer"},
		Subject:               pkix.Name{CommonName: o.common},
	}
	if !now.Before(i.ca.NotAfter) {
		return nil, fmt.Errorf("the CA certificate ended at %s: a new issuer is needed", i.ca.NotAfter.Format(time.RFC3339))
	}
	if t.NotAfter.After(i.ca.NotAfter) {
		t.NotAfter = i.ca.NotAfter
	}
	if err := o.fill(t, i.config.TrustDomain); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, t, i.ca, o.key, i.key)
	if err != nil {
		return nil, fmt.Errorf("signing with the CA key: %w", err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if o.profile == profileAction {
		if _, err := certext.ParseAction(c); err != nil {
			return nil, fmt.Errorf("the certificate just made: %w", err)
		}
	}
	err = i.store.inTx(ctx, func(tx *sql.Tx) error {
		var name string
		if o.agent != nil {
			// Suspending revokes what is in the inventory: nothing may come into it afterwards.
			name = o.agent.Name
			if err := o.agent.still(ctx, tx); err != nil {
				return err
			}
			if err := uncompromised(ctx, tx, o.key); err != nil {
				return err
			}
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO certificate(serial, profile, agent, der, issued, not_after) VALUES(?, ?, ?, ?, ?, ?)",
			hex.EncodeToString(serial), o.profile, name, der, now.Unix(), t.NotAfter.Unix()); err != nil {
			return err
		}
		return event(ctx, tx, Event{Time: now, Kind: "issued", Agent: name, Detail: fmt.Sprintf("%s certificate %x for %s until %s", o.profile, serial, cmp.Or(name, o.common), t.NotAfter.Format(time.RFC3339))})
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// fill adds what the profile has.
func (o *order) fill(t *x509.Certificate, domain string) error {
	agent := o.profile == profileAction || o.profile == profileTLS
	if agent {
		if o.agent == nil {
			return errors.New("an agent's certificate needs the agent")
		}
		if o.lifetime > certext.MaxLifetime {
			return fmt.Errorf("a lifetime of %s, at most %s is allowed", o.lifetime, certext.MaxLifetime)
		}
		t.Subject.CommonName = o.agent.Name
		t.URIs = []*url.URL{{Scheme: "spiffe", Host: domain, Path: "/agent/" + o.agent.Name}}
	}
	switch o.profile {
	case profileAction:
		if len(o.scope) == 0 || o.attestation == nil {
			return errors.New("an action certificate needs a scope and an attestation")
		}
		t.UnknownExtKeyUsage = []asn1.ObjectIdentifier{certext.OIDAgentAction}
		scope, err := certext.ScopeExtension(o.scope)
		if err != nil {
			return err
		}
		att, err := certext.AttestationExtension(*o.attestation)
		if err != nil {
			return err
		}
		t.ExtraExtensions = []pkix.Extension{scope, att}
	case profileTLS:
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	case profileServer:
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		for _, n := range o.names {
			if ip := net.ParseIP(n); ip != nil {
				t.IPAddresses = append(t.IPAddresses, ip)
			} else {
				t.DNSNames = append(t.DNSNames, n)
			}
		}
	case profileAdmin:
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		t.UnknownExtKeyUsage = []asn1.ObjectIdentifier{certext.OIDAdministrator}
	case profileOCSP:
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning}
		t.ExtraExtensions = []pkix.Extension{{Id: oidNoCheck, Value: asn1.NullBytes}}
	default:
		return fmt.Errorf("no profile %q", o.profile)
	}
	return nil
}

// keyID is the SHA-256 of the key's bits, cut to 20 bytes (RFC 7093, section 2, method 1).
func keyID(key crypto.PublicKey) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Bits      asn1.BitString
	}
	if _, err := asn1.Unmarshal(spki, &info); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(info.Bits.Bytes)
	return sum[:20], nil
}
