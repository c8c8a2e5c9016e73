package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// MaxStructure bounds a TPM structure in a message, in bytes; the largest is a
// TPMT_PUBLIC or a TPMS_ATTEST.
const MaxStructure = 4 << 10

// Handles of hierarchies (TPM 2.0 Library, Part 2, section 7.4).
const (
	ownerHandle       = 0x40000001
	endorsementHandle = 0x4000000b
)

// decode reads one TPM structure that b must spell exactly. A structure that
// go-tpm cannot take is an error, never a panic (G2).
func decode[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](what string, b []byte) (v *T, err error) {
	defer func() {
		if p := recover(); p != nil {
			v, err = nil, fmt.Errorf("%s: malformed TPM structure", what)
		}
	}()
	if len(b) == 0 || len(b) > MaxStructure {
		return nil, fmt.Errorf("%s: %d bytes, 1 to %d are expected", what, len(b), MaxStructure)
	}
	if v, err = tpm2.Unmarshal[T, P](b); err != nil {
		return nil, fmt.Errorf("%s: malformed TPM structure: %w", what, err)
	}
	if !bytes.Equal(tpm2.Marshal(*v), b) {
		return nil, fmt.Errorf("%s: not the one spelling of the TPM structure", what)
	}
	return v, nil
}

func p256(attributes tpm2.TPMAObject, policy []byte, symmetric tpm2.TPMTSymDefObject, scheme tpm2.TPMTECCScheme) *tpm2.TPMTPublic {
	return &tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgECC,
		NameAlg:          tpm2.TPMAlgSHA256,
		ObjectAttributes: attributes,
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: symmetric,
			Scheme:    scheme,
			CurveID:   tpm2.TPMECCNistP256,
			KDF:       tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{}),
	}
}

var (
	noSymmetric = tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}
	aes128      = tpm2.TPMTSymDefObject{
		Algorithm: tpm2.TPMAlgAES,
		KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(128)),
		Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
	}
	noScheme    = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
	ecdsaSHA256 = tpm2.TPMTECCScheme{
		Scheme:  tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
	}
)

// AKTemplate is the TPMT_PUBLIC of the attestation key: a restricted P-256
// signing key. It is a primary key of the endorsement hierarchy, so that clock
// and firmware in what it signs are plain, not obfuscated (Part 2, section 10.12.12).
func AKTemplate() []byte {
	return tpm2.Marshal(*p256(tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
	}, nil, noSymmetric, ecdsaSHA256))
}

// SRKTemplate is the TPMT_PUBLIC of the ECC storage root key (TCG TPM v2.0
// Provisioning Guidance, section 7.5.1), a primary key of the owner hierarchy.
func SRKTemplate() []byte {
	return tpm2.Marshal(*p256(tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, Decrypt: true,
	}, nil, aes128, noScheme))
}

// KeyTemplate is the TPMT_PUBLIC of an action or TLS key with an authPolicy.
// userWithAuth is clear: no password uses it. adminWithPolicy is clear: the
// empty authorization value certifies it; docs/design.md says why.
func KeyTemplate(authPolicy []byte) []byte {
	return tpm2.Marshal(*p256(tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, NoDA: true, SignEncrypt: true,
	}, authPolicy, noSymmetric, noScheme))
}

// sameButUnique says whether public differs from template in unique alone.
func sameButUnique(public *tpm2.TPMTPublic, template []byte) bool {
	c := *public
	if c.Type != tpm2.TPMAlgECC {
		return false
	}
	c.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return bytes.Equal(tpm2.Marshal(c), template)
}

// KeyName returns the Name of a TPMT_PUBLIC: its nameAlg and its digest
// (Part 1, section 16).
func KeyName(public []byte) ([]byte, error) {
	p, err := decode[tpm2.TPMTPublic]("public area", public)
	if err != nil {
		return nil, err
	}
	return nameOf(p)
}

func nameOf(p *tpm2.TPMTPublic) ([]byte, error) {
	n, err := tpm2.ObjectName(p)
	if err != nil {
		return nil, fmt.Errorf("public area: %w", err)
	}
	return n.Buffer, nil
}

// qualifiedName returns the Qualified Name of a SHA-256 object from its Name
// and the Qualified Names above it; a hierarchy's is its handle (Part 1, section 16).
func qualifiedName(hierarchy uint32, names ...[]byte) []byte {
	qn := []byte{byte(hierarchy >> 24), byte(hierarchy >> 16), byte(hierarchy >> 8), byte(hierarchy)}
	for _, name := range names {
		sum := sha256.Sum256(append(bytes.Clone(qn), name...))
		qn = append([]byte{0x00, 0x0b}, sum[:]...) // TPM_ALG_SHA256
	}
	return qn
}

// publicKey returns the key of a public area and its SPKI in DER.
func publicKey(p *tpm2.TPMTPublic) (key any, spki []byte, err error) {
	defer func() {
		if recover() != nil {
			key, spki, err = nil, nil, fmt.Errorf("public area: malformed key")
		}
	}()
	if key, err = tpm2.Pub(*p); err != nil {
		return nil, nil, fmt.Errorf("public area: %w", err)
	}
	if e, ok := key.(*ecdsa.PublicKey); ok {
		if _, err := e.ECDH(); err != nil { // refuses points off the curve
			return nil, nil, fmt.Errorf("public area: %w", err)
		}
	}
	if spki, err = x509.MarshalPKIXPublicKey(key); err != nil {
		return nil, nil, fmt.Errorf("public area: %w", err)
	}
	return key, spki, nil
}

// PublicKey returns the key of a TPMT_PUBLIC, an *ecdsa.PublicKey or an *rsa.PublicKey.
func PublicKey(public []byte) (any, error) {
	p, err := decode[tpm2.TPMTPublic]("public area", public)
	if err != nil {
		return nil, err
	}
	key, _, err := publicKey(p)
	return key, err
}

// SPKIDigest returns the SHA-256 of the SubjectPublicKeyInfo of a TPMT_PUBLIC:
// the name by which the inventory knows an endorsement key.
func SPKIDigest(public []byte) ([32]byte, error) {
	p, err := decode[tpm2.TPMTPublic]("public area", public)
	if err != nil {
		return [32]byte{}, err
	}
	_, spki, err := publicKey(p)
	return sha256.Sum256(spki), err
}

// HasTemplate says whether a TPMT_PUBLIC differs from a template in unique alone.
func HasTemplate(public, template []byte) bool {
	p, err := decode[tpm2.TPMTPublic]("public area", public)
	return err == nil && sameButUnique(p, template)
}
