package hsm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
)

// Algorithm names a kind of key.
type Algorithm string

// The kinds of keys. Ed25519 depends on the token.
const (
	P256    Algorithm = "P-256"
	P384    Algorithm = "P-384"
	RSA2048 Algorithm = "RSA-2048"
	RSA3072 Algorithm = "RSA-3072"
	RSA4096 Algorithm = "RSA-4096"
	Ed25519 Algorithm = "Ed25519"
)

// Attributes are what the token says of a private key (PKCS#11 v2.40, section
// 4.9). A nil field: the token did not report it.
type Attributes struct {
	ID               []byte `json:"id"`
	Label            string `json:"label"`
	SPKI             []byte `json:"spki"` // DER SubjectPublicKeyInfo; empty where it cannot be read
	Sensitive        *bool  `json:"sensitive"`
	Extractable      *bool  `json:"extractable"`
	AlwaysSensitive  *bool  `json:"always_sensitive"`
	NeverExtractable *bool  `json:"never_extractable"`
	Local            *bool  `json:"local"`              // reported or not: NSS never sets it
	Unusable         string `json:"unusable,omitempty"` // why else it is not used
}

// Check refuses a key that may have been outside of its token, or may leave
// it, by an *AttributeError, or that cannot be used. A token's word is a declaration, no proof.
func (a *Attributes) Check() error {
	if a.Unusable != "" {
		return errors.New(a.Unusable)
	}
	for _, rule := range []struct {
		name string
		got  *bool
		want bool
	}{
		{"CKA_SENSITIVE", a.Sensitive, true},
		{"CKA_EXTRACTABLE", a.Extractable, false},
		{"CKA_ALWAYS_SENSITIVE", a.AlwaysSensitive, true},
		{"CKA_NEVER_EXTRACTABLE", a.NeverExtractable, true},
	} {
		if rule.got == nil || *rule.got != rule.want {
			got := "not reported"
			if rule.got != nil {
				got = fmt.Sprint(*rule.got)
			}
			return &AttributeError{rule.name, got, fmt.Sprint(rule.want)}
		}
	}
	return nil
}

// publicKey parses the SPKI and refuses kinds that this package does not sign with.
func (a *Attributes) publicKey() (crypto.PublicKey, error) {
	pub, err := x509.ParsePKIXPublicKey(a.SPKI)
	if err != nil {
		return nil, errors.New("the token's public key is malformed")
	}
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return pub, nil
		}
		return nil, errors.New("key on another curve than P-256 and P-384")
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n >= 2048 && n <= 4096 {
			return pub, nil
		}
		return nil, fmt.Errorf("RSA key of %d bits: 2048 to 4096 are allowed", k.N.BitLen())
	case ed25519.PublicKey:
		return pub, nil
	}
	return nil, errors.New("key of a kind that is not supported")
}
