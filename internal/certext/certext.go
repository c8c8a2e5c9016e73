// Package certext encodes and decodes the private certificate extensions of an
// action certificate: the scope and the statement about its attestation. Start
// with [Scope] and [ParseAttestation].
//
// Both are UTF8Strings with JSON, so that openssl x509 -text shows them and any
// language can read them.
package certext

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"inkan/internal/strictjson"
)

// Arc is the private arc below which all identifiers of this project stand.
// 1.3.6.1.4.1.32473 is the enterprise number that RFC 5612 sets aside for
// examples; it stays until a number is registered. It is the only constant to change.
var Arc = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 32473}

// Identifiers below [Arc].
var (
	// OIDScope is the critical extension with the scope's canonical JSON.
	OIDScope = below(1, 1)
	// OIDAttestation is the extension that says what was attested.
	OIDAttestation = below(1, 2)
	// OIDChannel is the extension of a certificate request that carries the TLS
	// channel which it is sent over, so that it serves on no other one (as RFC 7030, section
	// 3.5, does with a challenge password): the bytes of the channel's exporter.
	OIDChannel = below(1, 3)
	// OIDAgentAction is the extended key usage of an action certificate.
	OIDAgentAction = below(2, 1)
	// OIDAdministrator is the extended key usage of a certificate for the issuer's admin API.
	OIDAdministrator = below(2, 2)
)

// MaxSize bounds each extension's text, in bytes.
const MaxSize = 16 << 10

// ErrAbsent: the certificate has no such extension.
var ErrAbsent = errors.New("certificate extension is absent")

func below(n ...int) asn1.ObjectIdentifier { return append(slices.Clone(Arc), n...) }

// Key protection, as an action certificate states it.
const (
	ProtectionTPM         = "tpm"
	ProtectionHSMAttested = "hsm-attested"
	ProtectionHSMDeclared = "hsm-declared"
)

// Modes of a key in a TPM, as an action certificate states it.
const (
	ModeLocal    = "local"    // it signs while the host is in an approved state
	ModeApprover = "approver" // besides, the TPM demands an authorization of each signature
	ModeReserve  = "reserve"  // besides, the TPM demands a consent of not long ago
)

// How the endorsement key was tied to a vendor.
const (
	EKCertified = "certified" // a vendor's certificate chain was verified
	EKPinned    = "pinned"    // an operator pinned the key's SHA-256
	EKNone      = "none"      // no TPM took part
)

// Attestation is what the issuer states about the evidence behind a
// certificate. Byte strings are lower-case hex.
type Attestation struct {
	// Policy is the name of the approved PCR policy that the quote matched.
	Policy string `json:"policy"`
	// EvidenceSHA256 is the digest of the evidence that was appraised.
	EvidenceSHA256 string `json:"evidence_sha256"`
	// Time of the appraisal, UTC, whole seconds.
	Time time.Time `json:"time"`
	// Protection of the key: tpm, hsm-attested or hsm-declared.
	Protection string `json:"protection"`
	// Mode of the key: local, approver, or reserve.
	Mode string `json:"mode"`
	// KeyName is the TPM Name of the action key; empty for an HSM key.
	KeyName string `json:"key_name,omitempty"`
	// AuthPolicy is the authPolicy of the action key; empty for an HSM key.
	AuthPolicy string `json:"auth_policy,omitempty"`
	// AKName is the TPM Name of the attestation key that certified the host.
	AKName string `json:"ak_name,omitempty"`
	// EK says how the endorsement key was trusted: certified, pinned or none.
	EK string `json:"ek"`
	// Device is the inventory's id of the device.
	Device string `json:"device"`
}

// ScopeExtension returns the critical extension for a scope's canonical JSON.
func ScopeExtension(canonical []byte) (pkix.Extension, error) {
	return extension(OIDScope, true, canonical)
}

// AttestationExtension returns the non-critical extension for a.
func AttestationExtension(a Attestation) (pkix.Extension, error) {
	b, err := strictjson.Marshal(a)
	if err != nil {
		return pkix.Extension{}, err
	}
	return extension(OIDAttestation, false, b)
}

// Scope returns the text of the certificate's scope extension. The caller
// parses it. It fails with [ErrAbsent], or when the extension is not critical
// or is malformed.
func Scope(c *x509.Certificate) ([]byte, error) {
	b, critical, err := find(c, OIDScope)
	if err != nil {
		return nil, fmt.Errorf("scope extension: %w", err)
	}
	if !critical {
		return nil, errors.New("scope extension: is not critical")
	}
	return b, nil
}

// ParseAttestation returns the certificate's attestation extension.
func ParseAttestation(c *x509.Certificate) (*Attestation, error) {
	b, _, err := find(c, OIDAttestation)
	if err != nil {
		return nil, fmt.Errorf("attestation extension: %w", err)
	}
	var a Attestation
	if err := strictjson.Unmarshal(b, MaxSize, &a); err != nil {
		return nil, fmt.Errorf("attestation extension: %w", err)
	}
	return &a, nil
}

func extension(id asn1.ObjectIdentifier, critical bool, text []byte) (pkix.Extension, error) {
	if len(text) > MaxSize {
		return pkix.Extension{}, fmt.Errorf("extension %v: %d bytes, at most %d are allowed", id, len(text), MaxSize)
	}
	der, err := asn1.MarshalWithParams(string(text), "utf8")
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("extension %v: %w", id, err)
	}
	return pkix.Extension{Id: id, Critical: critical, Value: der}, nil
}

func find(c *x509.Certificate, id asn1.ObjectIdentifier) (text []byte, critical bool, err error) {
	for _, e := range c.Extensions {
		if !e.Id.Equal(id) {
			continue
		}
		if len(e.Value) > MaxSize+8 {
			return nil, false, errors.New("is too large")
		}
		var raw asn1.RawValue
		rest, err := asn1.Unmarshal(e.Value, &raw)
		if err != nil || len(rest) != 0 || raw.Class != asn1.ClassUniversal || raw.Tag != asn1.TagUTF8String || raw.IsCompound || !utf8.Valid(raw.Bytes) {
			return nil, false, errors.New("is not one UTF8String")
		}
		return raw.Bytes, e.Critical, nil
	}
	return nil, false, ErrAbsent
}

// ValidTrustDomain says whether s can be the trust domain of SPIFFE IDs.
func ValidTrustDomain(s string) bool {
	return s != "" && len(s) <= 255 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789.-_") == ""
}
