package attest

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"time"

	"inkan/internal/certext"
)

// Declaration asks for a certificate for a key in an HSM, on a host that has no
// TPM: nothing is proven of the host. An operator must have said in the inventory
// that this may be, and for which key.
type Declaration struct {
	Agent string `json:"agent"`
	CSR   []byte `json:"csr"` // DER PKCS#10, signed by the key, with certext.OIDChannel
}

// Declared shows that a declaration was accepted. Only Accept makes one.
type Declared struct {
	key  crypto.PublicKey
	at   time.Time
	made bool
}

// Valid says whether Accept made d.
func (d *Declared) Valid() bool { return d != nil && d.made }

// Key is the key to certify.
func (d *Declared) Key() crypto.PublicKey { return d.key }

// Time is when the declaration was accepted.
func (d *Declared) Time() time.Time { return d.at }

// Accept holds a declaration against the SHA-256 of the SubjectPublicKeyInfo
// that an operator pinned, and the TLS channel that it came over. Its error is a *[Refusal].
func Accept(x *Declaration, pin, binding []byte, now time.Time) (*Declared, error) {
	if len(pin) != sha256.Size || len(binding) != BindingSize {
		return nil, refuse("U1", "no key is pinned, or the channel is not known")
	}
	if len(x.CSR) > maxCSR {
		return nil, refuse("U2", "the certificate request has %d bytes, at most %d are expected", len(x.CSR), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(x.CSR)
	if err != nil {
		return nil, refuse("U2", "the certificate request is malformed: %v", err)
	}
	if sum := sha256.Sum256(csr.RawSubjectPublicKeyInfo); !bytes.Equal(sum[:], pin) {
		return nil, refuse("U1", "the key has the SHA-256 %x, the inventory pins %x", sum, pin)
	}
	if err := checkHSMKind(csr.PublicKey); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, refuse("U2", "the certificate request is not signed by its key: %v", err)
	}
	for _, e := range csr.Extensions {
		if e.Id.Equal(certext.OIDChannel) && bytes.Equal(e.Value, binding) {
			return &Declared{key: csr.PublicKey, at: now, made: true}, nil
		}
	}
	return nil, refuse("U2", "the certificate request was made for another TLS channel")
}
