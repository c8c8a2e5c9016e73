package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// Bounds on what a host sends about its EK (G7).
const (
	maxCertificate = 8 << 10 // bytes
	maxChain       = 8       // certificates
	maxChainBytes  = 32 << 10
)

// TCG object identifiers (TCG EK Credential Profile, sections 3.1 and 3.2).
var (
	oidSAN             = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidTPMManufacturer = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidTPMModel        = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidTPMVersion      = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
	oidEKCertificate   = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
)

// EKOptions say how an endorsement key is trusted.
type EKOptions struct {
	Roots         *x509.CertPool         // vendors' roots for this device
	Intermediates []*x509.Certificate    // the operator's bundle
	Pin           []byte                 // SHA-256 of the EK's SPKI; nil: a certificate is needed (E10)
	AllowExpired  bool                   // the device's record allows an expired certificate (E5)
	CRLs          []*x509.RevocationList // of the vendor; their signatures are verified
	RequireCRL    bool                   // refuse unless a CRL of the EK certificate's issuer is there and current
	Now           time.Time
}

// Endorsement shows that VerifyEK accepted an endorsement key. Only VerifyEK
// makes one.
type Endorsement struct {
	public []byte
	kind   string
	spki   [32]byte
}

// Kind is certified (by a vendor's certificate) or pinned (by an operator).
func (e *Endorsement) Kind() string { return e.kind }

// SPKIDigest is the SHA-256 of the EK's SubjectPublicKeyInfo.
func (e *Endorsement) SPKIDigest() [32]byte { return e.spki }

// Endorsement kinds.
const (
	Certified = "certified"
	Pinned    = "pinned"
)

// VerifyEK applies the E checks to the endorsement key in a Hello. Its error
// is a *Refusal.
func VerifyEK(h *Hello, o EKOptions) (*Endorsement, error) {
	public, err := decode[tpm2.TPMTPublic]("EK", h.EKPublic)
	if err != nil {
		return nil, refuse("E7", "%v", err)
	}
	if err := checkEKTemplate(public); err != nil {
		return nil, err
	}
	key, spki, err := publicKey(public)
	if err != nil {
		return nil, refuse("E8", "%v", err)
	}
	if err := checkEKStrength(key); err != nil {
		return nil, err
	}
	e := &Endorsement{public: bytes.Clone(h.EKPublic), spki: sha256.Sum256(spki)}
	if o.Pin != nil {
		if !bytes.Equal(o.Pin, e.spki[:]) {
			return nil, refuse("E10", "the EK is not the pinned one: its SHA-256 is %x", e.spki)
		}
		e.kind = Pinned
		return e, nil
	}
	if len(h.EKCertificate) == 0 {
		return nil, refuse("E11", "there is no EK certificate: pin the EK by its SHA-256 %x if the device has none", e.spki)
	}
	cert, err := CutCertificate(h.EKCertificate)
	if err != nil {
		return nil, err
	}
	if CertificateSPKIDigest(cert) != e.spki {
		return nil, refuse("E6", "the EK certificate is for another key")
	}
	if err := checkEKCertificate(cert, key); err != nil {
		return nil, err
	}
	if err := checkEKChain(cert, h.EKChain, o); err != nil {
		return nil, err
	}
	e.kind = Certified
	return e, nil
}

// CutCertificate takes the certificate at the start of an NV index, whose end
// may be padding of 0x00 or 0xff (E1).
func CutCertificate(nv []byte) (*x509.Certificate, error) {
	if len(nv) > maxCertificate {
		return nil, refuse("E1", "the EK certificate has %d bytes, at most %d are expected", len(nv), maxCertificate)
	}
	var raw asn1.RawValue
	rest, err := asn1.Unmarshal(nv, &raw)
	if err != nil || raw.Tag != asn1.TagSequence || raw.Class != asn1.ClassUniversal {
		return nil, refuse("E1", "NV does not begin with a certificate in DER")
	}
	if bytes.Count(rest, []byte{0x00}) != len(rest) && bytes.Count(rest, []byte{0xff}) != len(rest) {
		return nil, refuse("E1", "%d bytes follow the EK certificate that are not padding", len(rest))
	}
	cert, err := x509.ParseCertificate(raw.FullBytes)
	if err != nil {
		return nil, refuse("E1", "the EK certificate is malformed: %v", err)
	}
	return cert, nil
}

// CertificateSPKIDigest returns the SHA-256 of a certificate's key, as
// SPKIDigest does of a public area's. Certificates may spell the key's
// algorithm in another way, so it is spelled anew.
func CertificateSPKIDigest(c *x509.Certificate) [32]byte {
	spki, err := x509.MarshalPKIXPublicKey(c.PublicKey)
	if err != nil {
		spki = c.RawSubjectPublicKeyInfo
	}
	return sha256.Sum256(spki)
}

// policies of the TCG templates (TCG EK Credential Profile, annex B): policy A,
// PolicySecret of the endorsement hierarchy, for the low range; policy B for the high range.
var (
	policyA = unhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
	policyB = map[tpm2.TPMAlgID][]byte{
		tpm2.TPMAlgSHA256: unhex("ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0"),
		tpm2.TPMAlgSHA384: unhex("b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419cacb47ba09699646150f9fc000f3f80e12"),
		tpm2.TPMAlgSHA512: unhex("b8221ca69e8550a4914de3faa6a18c072cc01208073a928d5d66d59ef79e49a429c41a6b269571d57edb25fbdb1838425608b413cd616a5f6db5b6071af99bea"),
	}
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err) // a constant of this file
	}
	return b
}

func checkEKTemplate(p *tpm2.TPMTPublic) error {
	a := p.ObjectAttributes
	low := tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, AdminWithPolicy: true, Restricted: true, Decrypt: true}
	high := low
	high.UserWithAuth = true
	if a != low && a != high {
		return refuse("E7", "the EK's attributes are not those of a TCG template: a restricted decryption key, made in the TPM and bound to it, that cannot sign")
	}
	isLow := a == low && p.NameAlg == tpm2.TPMAlgSHA256 && bytes.Equal(p.AuthPolicy.Buffer, policyA)
	isHigh := a == high && policyB[p.NameAlg] != nil && bytes.Equal(p.AuthPolicy.Buffer, policyB[p.NameAlg])
	if !isLow && !isHigh {
		return refuse("E7", "the EK's authPolicy or nameAlg is not that of a TCG template")
	}
	var symmetric tpm2.TPMTSymDefObject
	switch p.Type {
	case tpm2.TPMAlgRSA:
		parms, err := p.Parameters.RSADetail()
		if err != nil || parms == nil || parms.Scheme.Scheme != tpm2.TPMAlgNull {
			return refuse("E7", "the EK has a scheme of its own")
		}
		if parms.Exponent != 0 && parms.Exponent != 65537 {
			return refuse("E7", "the EK's exponent is %d, 65537 is expected", parms.Exponent)
		}
		symmetric = parms.Symmetric
	case tpm2.TPMAlgECC:
		parms, err := p.Parameters.ECCDetail()
		if err != nil || parms == nil || parms.Scheme.Scheme != tpm2.TPMAlgNull {
			return refuse("E7", "the EK has a scheme of its own")
		}
		symmetric = parms.Symmetric
	default:
		return refuse("E7", "the EK is neither RSA nor ECC")
	}
	mode, err := symmetric.Mode.AES()
	if symmetric.Algorithm != tpm2.TPMAlgAES || err != nil || mode == nil || *mode != tpm2.TPMAlgCFB {
		return refuse("E7", "the EK does not protect with AES in CFB mode")
	}
	return nil
}

func checkEKStrength(key any) error {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 {
			return refuse("E8", "the EK is RSA with %d bits, 2048 to 4096 are expected", n)
		}
		if rocaWeak(k.N) {
			return refuse("E8", "the EK has the ROCA weakness (CVE-2017-15361)")
		}
	case *ecdsa.PublicKey:
		if n := k.Curve.Params().BitSize; n < 256 {
			return refuse("E8", "the EK is on a curve of %d bits, at least 256 are expected", n)
		}
	default:
		return refuse("E8", "the EK is neither RSA nor on a NIST curve")
	}
	return nil
}

// rocaWeak tells moduli whose primes are k*M + (65537^a mod M): for each small
// prime p of M, such a modulus is a power of 65537 modulo p.
func rocaWeak(n *big.Int) bool {
	var rest, prime big.Int
	for _, p := range []int64{11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157} {
		r := rest.Mod(n, prime.SetInt64(p)).Int64()
		power, found := int64(1), false
		for range p {
			if power == r {
				found = true
				break
			}
			power = power * 65537 % p
		}
		if !found {
			return false
		}
	}
	return true
}

func checkEKCertificate(c *x509.Certificate, key any) error {
	var unhandled []asn1.ObjectIdentifier
	for _, id := range c.UnhandledCriticalExtensions {
		if !id.Equal(oidSAN) {
			unhandled = append(unhandled, id)
		}
	}
	if len(unhandled) > 0 {
		return refuse("E3", "the EK certificate has the unknown critical extension %v", unhandled[0])
	}
	for _, e := range c.Extensions {
		if e.Id.Equal(oidSAN) && e.Critical && !namesTPM(e.Value) {
			return refuse("E3", "the EK certificate's subject alternative name does not name TPM manufacturer, model and version")
		}
	}
	if c.IsCA {
		return refuse("E4", "the EK certificate is a CA's")
	}
	if !slices.ContainsFunc(c.UnknownExtKeyUsage, oidEKCertificate.Equal) {
		return refuse("E4", "the EK certificate has no extended key usage 2.23.133.8.1")
	}
	want := x509.KeyUsageKeyAgreement
	if _, ok := key.(*rsa.PublicKey); ok {
		want = x509.KeyUsageKeyEncipherment
	}
	if c.KeyUsage&want == 0 {
		return refuse("E4", "the EK certificate's key usage does not fit its key")
	}
	return nil
}

// namesTPM says whether a subject alternative name has a directory name with
// the three TPM attributes.
func namesTPM(san []byte) bool {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(san, &names); err != nil || len(rest) != 0 {
		return false
	}
	for _, n := range names {
		if n.Class != asn1.ClassContextSpecific || n.Tag != 4 {
			continue
		}
		var rdn pkix.RDNSequence
		if rest, err := asn1.Unmarshal(n.Bytes, &rdn); err != nil || len(rest) != 0 {
			return false
		}
		found := 0
		for _, set := range rdn {
			for _, attr := range set {
				if s, ok := attr.Value.(string); ok && s != "" &&
					(attr.Type.Equal(oidTPMManufacturer) || attr.Type.Equal(oidTPMModel) || attr.Type.Equal(oidTPMVersion)) {
					found++
				}
			}
		}
		if found == 3 {
			return true
		}
	}
	return false
}

func checkEKChain(c *x509.Certificate, fromNV [][]byte, o EKOptions) error {
	if o.Roots == nil {
		return refuse("E2", "the device's record has no roots")
	}
	if len(fromNV) > maxChain {
		return refuse("E2", "intermediate certificates from %d NV indexes, at most %d are expected", len(fromNV), maxChain)
	}
	pool := x509.NewCertPool()
	for _, i := range o.Intermediates {
		pool.AddCert(i)
	}
	chain, err := chainCertificates(bytes.Join(fromNV, nil))
	if err != nil {
		return err
	}
	for _, i := range chain {
		pool.AddCert(i)
	}
	leaf := *c // the subject alternative name was judged by checkEKCertificate
	leaf.UnhandledCriticalExtensions = nil
	when := o.Now
	if when.Before(c.NotBefore) {
		return refuse("E5", "the EK certificate is valid from %s on", c.NotBefore.UTC().Format(time.RFC3339))
	}
	expired := o.Now.After(c.NotAfter)
	if expired && !o.AllowExpired {
		return refuse("E5", "the EK certificate expired at %s, and the device's record does not allow that", c.NotAfter.UTC().Format(time.RFC3339))
	}
	if expired {
		when = c.NotAfter
	}
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: o.Roots, Intermediates: pool, CurrentTime: when, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		return refuse("E2", "the EK certificate does not chain to a pinned root: %v", err)
	}
	return checkEKRevocation(chains[0], o)
}

// chainCertificates reads what the NV indexes of the maker's CAs hold: certificates
// one after the other, perhaps with padding behind each. Some TPMs have one in each index,
// Intel's firmware TPM has all in one.
func chainCertificates(nv []byte) ([]*x509.Certificate, error) {
	if len(nv) > maxChainBytes {
		return nil, refuse("E2", "the intermediate certificates have %d bytes, at most %d are expected", len(nv), maxChainBytes)
	}
	var out []*x509.Certificate
	for {
		for len(nv) > 0 && (nv[0] == 0x00 || nv[0] == 0xff) {
			nv = nv[1:]
		}
		if len(nv) == 0 {
			return out, nil
		}
		var raw asn1.RawValue
		rest, err := asn1.Unmarshal(nv, &raw)
		if err != nil || len(out) == maxChain {
			return nil, refuse("E2", "what follows %d intermediate certificates is none, or one too many: at most %d are expected", len(out), maxChain)
		}
		c, err := x509.ParseCertificate(raw.FullBytes)
		if err != nil {
			return nil, refuse("E2", "intermediate certificate %d is malformed: %v", len(out)+1, err)
		}
		out, nv = append(out, c), rest
	}
}

func checkEKRevocation(chain []*x509.Certificate, o EKOptions) error {
	for i, c := range chain[:len(chain)-1] {
		issuer, known := chain[i+1], false
		for _, crl := range o.CRLs {
			if !bytes.Equal(crl.RawIssuer, issuer.RawSubject) || crl.CheckSignatureFrom(issuer) != nil || wholeList(crl) != nil {
				continue
			}
			if o.Now.Before(crl.ThisUpdate) || !o.Now.Before(crl.NextUpdate) {
				continue
			}
			known = true
			for _, e := range crl.RevokedCertificateEntries {
				if e.SerialNumber.Cmp(c.SerialNumber) == 0 {
					return refuse("E5", "the vendor revoked the certificate with the serial number %x", c.SerialNumber)
				}
			}
		}
		if o.RequireCRL && !known {
			return refuse("E5", "there is no current CRL of %s, and the device's record demands one", issuer.Subject)
		}
	}
	return nil
}

// MakeCredential wraps secret so that only the TPM with the endorsed EK can
// open it, and only if it holds the object with this Name (TPM2_MakeCredential, Part 1, section 24).
func MakeCredential(e *Endorsement, name, secret []byte, random io.Reader) (*Credential, error) {
	if e == nil || e.kind == "" {
		return nil, refuse("E11", "there is no verified endorsement key")
	}
	public, err := decode[tpm2.TPMTPublic]("EK", e.public)
	if err != nil {
		return nil, refuse("E7", "%v", err)
	}
	key, err := tpm2.ImportEncapsulationKey(public)
	if err != nil {
		return nil, refuse("E7", "%v", err)
	}
	id, enc, err := tpm2.CreateCredential(random, key, name, secret)
	if err != nil {
		return nil, refuse("A3", "making the credential: %v", err)
	}
	return &Credential{IDObject: id, EncryptedSecret: enc}, nil
}

// Bounds on what an operator gives about a vendor.
const (
	maxCRLs         = 16
	maxCertificates = 256
)

// blocks returns the contents of all blocks in a PEM text, which must be of one
// kind. Text around them is passed over, since vendors put names there, but no block
// is: package pem skips what it cannot read, and a missing one would not be noticed.
func blocks(text []byte, kind string, most int) ([][]byte, error) {
	var out [][]byte
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != kind || len(out) == most {
			return nil, fmt.Errorf("1 to %d blocks %s in PEM are expected, and none of another kind", most, kind)
		}
		out = append(out, block.Bytes)
	}
	if n := bytes.Count(text, []byte("-----BEGIN ")); n != len(out) || n == 0 {
		return nil, fmt.Errorf("%d blocks %s in PEM can be read, and %d begin: does each stand on lines of its own?", len(out), kind, n)
	}
	return out, nil
}

// ParseCRLs reads revocation lists in PEM; a block that is anything else, or a
// list that is not whole, is an error.
func ParseCRLs(text []byte) ([]*x509.RevocationList, error) {
	list, err := blocks(text, "X509 CRL", maxCRLs)
	if err != nil {
		return nil, err
	}
	var out []*x509.RevocationList
	for _, der := range list {
		l, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, err
		}
		if err := wholeList(l); err != nil {
			return nil, err
		}
		out = append(out, l)
	}
	return out, nil
}

// wholeList refuses a list with a critical extension, since all that there are say
// that it is not the whole list of its CA's certificates alone: a delta, a part, or one
// with those of other CAs (RFC 5280, sections 5.2 and 5.3).
func wholeList(l *x509.RevocationList) error {
	refuse := func(where string, list []pkix.Extension) error {
		for _, e := range list {
			if e.Critical {
				return fmt.Errorf("the revocation list of %s has the critical extension %v%s: one that is whole is expected", l.Issuer, e.Id, where)
			}
		}
		return nil
	}
	err := refuse("", l.Extensions)
	for i := 0; err == nil && i < len(l.RevokedCertificateEntries); i++ {
		err = refuse(" in an entry", l.RevokedCertificateEntries[i].Extensions)
	}
	return err
}

// ParseCertificates reads certificates in PEM; a block that is anything else is
// an error.
func ParseCertificates(text []byte) ([]*x509.Certificate, error) {
	list, err := blocks(text, "CERTIFICATE", maxCertificates)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for _, der := range list {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}
