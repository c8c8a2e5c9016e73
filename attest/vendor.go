package attest

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"
)

// Formats of what a vendor's HSM says of a key in it.
const (
	// VendorYubiHSM2 is a chain of certificates in PEM, the key's own first:
	// the device makes it with its attestation key (Yubico's command Sign
	// Attestation Certificate).
	VendorYubiHSM2 = "yubihsm2"
	// VendorPKIX is one PEM block EVIDENCE: draft-ietf-rats-pkix-key-attestation.
	VendorPKIX = "pkix"
)

// MaxVendor bounds a vendor's evidence, in bytes.
const MaxVendor = 32 << 10

// maxVendorChain bounds the certificates in it.
const maxVendorChain = 8

// VerifyVendor checks a vendor's evidence for the key with this SPKI against
// the roots that the operator pinned for the format. It proves where the key
// is, and nothing of the host that uses it. Its error is a *Refusal.
func VerifyVendor(format string, evidence, spki []byte, roots *x509.CertPool, now time.Time) error {
	if len(evidence) == 0 {
		return refuse("H1", "the vendor's evidence is asked for, and there is none")
	}
	if len(evidence) > MaxVendor {
		return refuse("H1", "the vendor's evidence has %d bytes, at most %d are allowed", len(evidence), MaxVendor)
	}
	if roots == nil {
		return refuse("H2", "no root is pinned for the vendor's evidence")
	}
	switch format {
	case VendorYubiHSM2:
		return verifyYubiHSM2(evidence, spki, roots, now)
	case VendorPKIX:
		return verifyPKIX(evidence, spki, roots, now)
	}
	return refuse("H1", "the format %.16q is not known: %s and %s are", format, VendorYubiHSM2, VendorPKIX)
}

// vendorChain verifies a leaf that may have critical extensions of its vendor,
// which the caller has read, and none of a CA.
func vendorChain(leaf *x509.Certificate, others []*x509.Certificate, roots *x509.CertPool, now time.Time) error {
	intermediates := x509.NewCertPool()
	for _, c := range others {
		intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return refuse("H2", "the vendor's chain does not lead to a pinned root: %v", err)
	}
	return nil
}

// Extensions of a YubiHSM 2's attestation certificates (Yubico, OID product arc, YubiHSM).
var yubiArc = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 41482, 4}

const (
	yubiFirmware     = 1
	yubiSerial       = 2
	yubiOrigin       = 3
	yubiDomains      = 4
	yubiCapabilities = 5
	yubiObjectID     = 6
	yubiLabel        = 9

	yubiGenerated       = 0x01 // of the origin: in the device
	yubiExportableBit   = 16   // of the capabilities: exportable-under-wrap
	yubiCapabilityBytes = 8
)

func verifyYubiHSM2(evidence, spki []byte, roots *x509.CertPool, now time.Time) error {
	var chain []*x509.Certificate
	for rest := evidence; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			if len(bytes.TrimSpace(rest)) > 0 {
				return refuse("H1", "something that is no PEM follows the certificates")
			}
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil || block.Type != "CERTIFICATE" {
			return refuse("H1", "block %d is no certificate: %v", len(chain)+1, err)
		}
		if chain = append(chain, c); len(chain) > maxVendorChain {
			return refuse("H1", "more than %d certificates", maxVendorChain)
		}
	}
	if len(chain) < 2 {
		return refuse("H1", "the key's certificate and the device's are expected, %d certificates are there", len(chain))
	}
	// The device signs with a key whose certificate is an end entity's: the
	// first step is checked by hand, the rest is a chain as usual.
	leaf, device := chain[0], chain[1]
	if leaf.IsCA {
		return refuse("H2", "the key's certificate is that of a CA")
	}
	if err := device.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature); err != nil {
		return refuse("H2", "the key's certificate is not signed by the device's attestation key: %v", err)
	}
	if !bytes.Equal(leaf.RawIssuer, device.RawSubject) {
		return refuse("H2", "the key's certificate names another issuer than the device's attestation key")
	}
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return refuse("H2", "the key's certificate is not valid now")
	}
	own, err := yubiExtensions(leaf)
	if err != nil {
		return err
	}
	theirs, err := yubiExtensions(device)
	if err != nil {
		return err
	}
	if err := vendorChain(device, chain[2:], roots, now); err != nil {
		return err
	}
	if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, spki) {
		return refuse("H3", "the evidence is for another key")
	}
	return yubiClaims(own, theirs)
}

// yubiExtensions returns the vendor's extensions by their last number, each at most once.
func yubiExtensions(c *x509.Certificate) (map[int][]byte, error) {
	out := make(map[int][]byte)
	for _, e := range c.Extensions {
		if len(e.Id) != len(yubiArc)+1 || !e.Id[:len(yubiArc)].Equal(yubiArc) {
			continue
		}
		n := e.Id[len(yubiArc)]
		if out[n] != nil {
			return nil, refuse("H1", "extension %d stands twice", n)
		}
		out[n] = e.Value
	}
	c.UnhandledCriticalExtensions = slices.DeleteFunc(c.UnhandledCriticalExtensions, func(id asn1.ObjectIdentifier) bool {
		return len(id) == len(yubiArc)+1 && id[:len(yubiArc)].Equal(yubiArc)
	})
	if len(c.UnhandledCriticalExtensions) > 0 {
		return nil, refuse("H2", "the certificate has the critical extension %v, which is not known", c.UnhandledCriticalExtensions[0])
	}
	return out, nil
}

// yubiClaims checks what the device says of the key. Origin and capabilities
// decide; the rest must be there and well formed.
func yubiClaims(own, device map[int][]byte) error {
	var serial, deviceSerial, object int
	var firmware []byte
	var label string
	var origin, domains, capabilities asn1.BitString
	for _, x := range []struct {
		n    int
		name string
		to   any
	}{
		{yubiFirmware, "firmware version", &firmware}, {yubiSerial, "serial number", &serial}, {yubiOrigin, "origin", &origin}, {yubiDomains, "domains", &domains},
		{yubiCapabilities, "capabilities", &capabilities}, {yubiObjectID, "object id", &object}, {yubiLabel, "label", &label},
	} {
		b, ok := own[x.n]
		if !ok {
			return refuse("H7", "the claim %s is missing", x.name)
		}
		if rest, err := asn1.Unmarshal(b, x.to); err != nil || len(rest) > 0 {
			return refuse("H7", "the claim %s is malformed", x.name)
		}
	}
	if b, ok := device[yubiSerial]; !ok {
		return refuse("H8", "the device's certificate has no serial number")
	} else if rest, err := asn1.Unmarshal(b, &deviceSerial); err != nil || len(rest) > 0 || deviceSerial != serial {
		return refuse("H8", "the key is in the device %d, the attestation key in another", serial)
	}
	if len(firmware) != 3 {
		return refuse("H7", "the claim firmware version is malformed")
	}
	if len(origin.Bytes) != 1 || origin.Bytes[0] != yubiGenerated {
		return refuse("H4", "the key's origin is %#x: it was not generated in the device, or was outside of it", origin.Bytes)
	}
	if len(capabilities.Bytes) != yubiCapabilityBytes {
		return refuse("H7", "the claim capabilities is malformed")
	}
	if capabilities.Bytes[yubiCapabilityBytes-1-yubiExportableBit/8]&(1<<(yubiExportableBit%8)) != 0 {
		return refuse("H5", "the key has the capability exportable-under-wrap: it can leave the device")
	}
	return nil
}

// Identifiers of draft-ietf-rats-pkix-key-attestation. The draft's arc is a
// placeholder until numbers are assigned.
var (
	pkixArc            = asn1.ObjectIdentifier{1, 2, 3, 999}
	pkixKeyEntity      = pkixID(0, 2)
	pkixPlatformEntity = pkixID(0, 1)
	pkixTransaction    = pkixID(0, 0)
	pkixAKSPKI         = pkixID(1, 0, 2)
	pkixDebug          = pkixID(1, 1, 7)
	pkixKeyIdentifier  = pkixID(1, 2, 0)
	pkixKeySPKI        = pkixID(1, 2, 1)
	pkixExtractable    = pkixID(1, 2, 2)
	pkixSensitive      = pkixID(1, 2, 3)
	pkixNeverExtract   = pkixID(1, 2, 4)
	pkixLocal          = pkixID(1, 2, 5)
	pkixExpiry         = pkixID(1, 2, 6)
)

func pkixID(n ...int) asn1.ObjectIdentifier { return append(slices.Clone(pkixArc), n...) }

// Structures of the draft's ASN.1 module.
type (
	pkixEvidence struct {
		TBS           asn1.RawValue
		Signatures    []pkixSignature
		Intermediates []asn1.RawValue `asn1:"optional,tag:0"`
	}
	pkixTBS struct {
		Version  int
		Entities []pkixEntity
	}
	pkixEntity struct {
		Type   asn1.ObjectIdentifier
		Claims []pkixClaim
	}
	pkixClaim struct {
		Type  asn1.ObjectIdentifier
		Value asn1.RawValue `asn1:"optional"`
	}
	pkixSignature struct {
		Signer    pkixSigner
		Algorithm struct {
			ID         asn1.ObjectIdentifier
			Parameters asn1.RawValue `asn1:"optional"`
		}
		Value []byte
	}
	pkixSigner struct {
		KeyID       []byte        `asn1:"optional,explicit,tag:0"`
		SPKI        asn1.RawValue `asn1:"optional,explicit,tag:1"`
		Certificate asn1.RawValue `asn1:"optional,explicit,tag:2"`
	}
)

// Tags of a ClaimValue.
const (
	claimBytes = 0
	claimText  = 1
	claimBool  = 2
	claimTime  = 3
	claimInt   = 4
)

// pkixAlgorithms are those of signatures that are taken.
var pkixAlgorithms = map[string]x509.SignatureAlgorithm{
	"1.2.840.10045.4.3.2":   x509.ECDSAWithSHA256,
	"1.2.840.10045.4.3.3":   x509.ECDSAWithSHA384,
	"1.2.840.10045.4.3.4":   x509.ECDSAWithSHA512,
	"1.2.840.113549.1.1.11": x509.SHA256WithRSA,
	"1.2.840.113549.1.1.12": x509.SHA384WithRSA,
	"1.2.840.113549.1.1.13": x509.SHA512WithRSA,
}

func verifyPKIX(evidence, spki []byte, roots *x509.CertPool, now time.Time) error {
	block, rest := pem.Decode(evidence)
	if block == nil || block.Type != "EVIDENCE" || len(bytes.TrimSpace(rest)) > 0 {
		return refuse("H1", "one PEM block EVIDENCE is expected")
	}
	var e pkixEvidence
	if err := whole(block.Bytes, &e); err != nil {
		return refuse("H1", "the evidence is malformed: %v", err)
	}
	if len(e.Signatures) > maxVendorChain || len(e.Intermediates) > maxVendorChain {
		return refuse("H1", "more than %d signatures or certificates", maxVendorChain)
	}
	if len(e.Signatures) == 0 {
		return refuse("H2", "the evidence is not signed")
	}
	var intermediates []*x509.Certificate
	for _, raw := range e.Intermediates {
		c, err := x509.ParseCertificate(raw.FullBytes)
		if err != nil {
			return refuse("H1", "an intermediate certificate is malformed: %v", err)
		}
		intermediates = append(intermediates, c)
	}
	// Every signature must hold: one that cannot be judged is none to rely on.
	var signers [][]byte
	for _, s := range e.Signatures {
		crt, err := s.verify(e.TBS.FullBytes)
		if err != nil {
			return err
		}
		if err := vendorChain(crt, intermediates, roots, now); err != nil {
			return err
		}
		signers = append(signers, crt.RawSubjectPublicKeyInfo)
	}
	var tbs pkixTBS
	if err := whole(e.TBS.FullBytes, &tbs); err != nil {
		return refuse("H1", "the signed part is malformed: %v", err)
	}
	if tbs.Version != 1 {
		return refuse("H1", "the evidence has version %d, 1 is known", tbs.Version)
	}
	return tbs.claims(spki, signers, now)
}

// whole decodes DER and refuses anything behind it.
func whole(b []byte, to any) error {
	rest, err := asn1.Unmarshal(b, to)
	if err == nil && len(rest) > 0 {
		err = errors.New("bytes follow it")
	}
	return err
}

func (s *pkixSignature) verify(signed []byte) (*x509.Certificate, error) {
	if len(s.Signer.Certificate.Bytes) == 0 {
		return nil, refuse("H2", "a signature names no certificate")
	}
	crt, err := x509.ParseCertificate(s.Signer.Certificate.Bytes)
	if err != nil {
		return nil, refuse("H1", "a signer's certificate is malformed: %v", err)
	}
	if crt.IsCA {
		return nil, refuse("H2", "the evidence is signed by a CA, not by a device")
	}
	algorithm, ok := pkixAlgorithms[s.Algorithm.ID.String()]
	if !ok {
		return nil, refuse("H2", "the signature's algorithm %v is not taken", s.Algorithm.ID)
	}
	if err := crt.CheckSignature(algorithm, signed, s.Value); err != nil {
		return nil, refuse("H2", "the evidence's signature does not verify: %v", err)
	}
	return crt, nil
}

// claims checks what the signed part says of the key.
func (t *pkixTBS) claims(spki []byte, signers [][]byte, now time.Time) error {
	var key *pkixEntity
	seen := make(map[string]bool)
	for i := range t.Entities {
		e := &t.Entities[i]
		switch {
		case e.Type.Equal(pkixKeyEntity):
			b, err := e.find(pkixKeySPKI, claimBytes)
			if err != nil {
				return err
			}
			if !bytes.Equal(b, spki) {
				continue // of other keys
			}
			if key != nil {
				return refuse("H1", "the key is described twice")
			}
			key = e
		case e.Type.Equal(pkixPlatformEntity), e.Type.Equal(pkixTransaction):
			if seen[e.Type.String()] {
				return refuse("H1", "the entity %v stands twice", e.Type)
			}
			seen[e.Type.String()] = true
			if err := e.circumstances(signers); err != nil {
				return err
			}
		}
	}
	if key == nil {
		return refuse("H3", "the evidence does not have this key")
	}
	if b, err := key.first(pkixKeyIdentifier, claimText); err != nil || !utf8.Valid(b) {
		return refuse("H7", "the claim identifier is missing or malformed")
	}
	for _, c := range []struct {
		id    asn1.ObjectIdentifier
		name  string
		want  bool
		check string
		why   string
	}{
		{pkixLocal, "local", true, "H4", "it was not made in the HSM"},
		{pkixExtractable, "extractable", false, "H5", "it can leave the HSM"},
		{pkixNeverExtract, "never-extractable", true, "H5", "it could leave the HSM at some time"},
		{pkixSensitive, "sensitive", true, "H5", "its value can be read"},
	} {
		b, err := key.find(c.id, claimBool)
		if err != nil {
			return err
		}
		if b == nil {
			return refuse("H7", "the claim %s is missing", c.name)
		}
		if len(b) != 1 || b[0] != 0 && b[0] != 0xff {
			return refuse("H7", "the claim %s is malformed", c.name)
		}
		if (b[0] != 0) != c.want {
			return refuse(c.check, "the claim %s is %v: %s", c.name, b[0] != 0, c.why)
		}
	}
	if b, err := key.find(pkixExpiry, claimTime); err != nil {
		return err
	} else if b != nil {
		var end time.Time
		if err := whole(append([]byte{asn1.TagGeneralizedTime, byte(len(b))}, b...), &end); err != nil || len(b) > 64 {
			return refuse("H7", "the claim expiry is malformed")
		}
		if now.After(end) {
			return refuse("H9", "the key expired at %s", end.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// circumstances: the device is no debugging one, and signed with a key that it names.
func (e *pkixEntity) circumstances(signers [][]byte) error {
	for _, c := range e.Claims {
		switch {
		case c.Type.Equal(pkixDebug):
			b, err := c.value(claimInt)
			if err != nil {
				return err
			}
			if len(b) != 1 || b[0] < 1 || b[0] > 4 { // RFC 9711, section 4.2.9: 0 is enabled, 1 to 4 are ways of being disabled
				return refuse("H8", "the HSM's debug facilities are enabled, or in a state that is not known")
			}
		case c.Type.Equal(pkixAKSPKI):
			b, err := c.value(claimBytes)
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(signers, func(s []byte) bool { return bytes.Equal(s, b) }) {
				return refuse("H2", "the evidence names another attestation key than those that signed it")
			}
		}
	}
	return nil
}

// value returns the contents of a claim of one kind.
func (c *pkixClaim) value(tag int) ([]byte, error) {
	if c.Value.Class != asn1.ClassContextSpecific || c.Value.Tag != tag || c.Value.IsCompound {
		return nil, refuse("H7", "the claim %v has a value of another kind", c.Type)
	}
	return c.Value.Bytes, nil
}

// find returns the contents of a claim that may stand once; nil: it is not there.
func (e *pkixEntity) find(id asn1.ObjectIdentifier, tag int) (b []byte, err error) {
	found := false
	for _, c := range e.Claims {
		if !c.Type.Equal(id) {
			continue
		}
		if found {
			return nil, refuse("H1", "the claim %v stands twice", id)
		}
		found = true
		if b, err = c.value(tag); err != nil {
			return nil, err
		}
		if b == nil {
			b = []byte{}
		}
	}
	return b, nil
}

// first returns the contents of a claim that may stand more often.
func (e *pkixEntity) first(id asn1.ObjectIdentifier, tag int) ([]byte, error) {
	for _, c := range e.Claims {
		if c.Type.Equal(id) {
			return c.value(tag)
		}
	}
	return nil, fmt.Errorf("no claim %v", id)
}
