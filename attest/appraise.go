package attest

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/internal/strictjson"
)

// maxCSR bounds a certificate request in DER, in bytes.
const maxCSR = 4 << 10

// Clock is a TPM's clock as it states it in a quote.
type Clock struct {
	Milliseconds uint64 `json:"ms"` // since it was last cleared, while powered
	Resets       uint32 `json:"resets"`
	Restarts     uint32 `json:"restarts"`
}

// Expectation is what the issuer challenged a host with and has on record of it.
type Expectation struct {
	Challenge    *Challenge // as it was sent
	Binding      []byte     // exporter of the TLS channel that the evidence came over
	Secret       []byte     // inside the credential; nil: the AK is on record
	Endorsement  *Endorsement
	SRK          []byte            // TPMT_PUBLIC from the Hello, on record after the first time
	AK           []byte            // likewise
	AuthPolicies map[string][]byte // of keys, by their mode
	Clock        *Clock            // of the last accepted evidence; nil at first
	Epoch        uint64            // likewise, of its epoch counter; 0 at first
	Audit        *uint64           // likewise, of its audit counter; nil: it gave no testimony yet
	UnsafeClock  bool              // the device's record allows a clock that is not safe
	MinFirmware  uint64            // the firmware must not be older; 0: any
	VendorRoots  *x509.CertPool    // for what an HSM's maker says of a key
	AppraisalNow time.Time
}

// CertifiedKey is a key that Appraise found in the device.
type CertifiedKey struct {
	Purpose    string
	Protection string // ProtectionHSM, or empty: in the TPM
	Vendor     string // of a key in an HSM: the format of the evidence that proved it; empty: its host says so
	Mode       string // of a key in the TPM
	PublicKey  crypto.PublicKey
	CSR        *x509.CertificateRequest // nil for a key that approvers stand before
	Name       []byte                   // of a key in the TPM
	AuthPolicy []byte                   // likewise
}

// Result shows that Appraise accepted evidence. Only Appraise makes one; the
// zero value is none.
type Result struct {
	keys        []CertifiedKey
	policy      string
	evidence    [32]byte
	clock       Clock
	firmware    uint64
	epoch       uint64
	testimony   *Testimony
	endorsement string
	at          time.Time
}

// Valid says whether Appraise made r.
func (r *Result) Valid() bool { return r != nil && len(r.keys) > 0 }

// Keys returns the keys in the order of the challenge.
func (r *Result) Keys() []CertifiedKey { return r.keys }

// Policy names the approved policy that the PCRs matched.
func (r *Result) Policy() string { return r.policy }

// EvidenceDigest is the SHA-256 of the evidence as canonical JSON.
func (r *Result) EvidenceDigest() [32]byte { return r.evidence }

// Clock is the TPM's clock in the quote.
func (r *Result) Clock() Clock { return r.clock }

// Firmware is the TPM's firmware version in the quote.
func (r *Result) Firmware() uint64 { return r.firmware }

// Epoch is the value of the epoch counter, 0 where none was asked for.
func (r *Result) Epoch() uint64 { return r.epoch }

// Testimony is what the TPM said of its signatures, nil where it said nothing.
func (r *Result) Testimony() *Testimony { return r.testimony }

// Endorsement is Certified or Pinned.
func (r *Result) Endorsement() string { return r.endorsement }

// Time of the appraisal.
func (r *Result) Time() time.Time { return r.at }

// EvidenceDigest returns the SHA-256 of ev as canonical JSON.
func EvidenceDigest(ev *Evidence) ([32]byte, error) {
	b, err := strictjson.Marshal(ev)
	return sha256.Sum256(b), err
}

// CheckAK applies A1 to an attestation key and returns its Name (A2). Its error is a *Refusal.
func CheckAK(public []byte) (name []byte, err error) {
	p, err := decode[tpm2.TPMTPublic]("AK", public)
	if err != nil {
		return nil, refuse("A1", "%v", err)
	}
	if !sameButUnique(p, AKTemplate()) {
		return nil, refuse("A1", "the AK does not have the template of a restricted signing key")
	}
	if _, _, err := publicKey(p); err != nil {
		return nil, refuse("A1", "%v", err)
	}
	if name, err = nameOf(p); err != nil {
		return nil, refuse("A2", "%v", err)
	}
	return name, nil
}

// Appraise applies the A, K, Q and P checks. Its error is a *Refusal that
// names the first that failed.
func Appraise(x *Expectation, ev *Evidence) (*Result, error) {
	c := x.Challenge
	switch {
	case c == nil || len(c.Session) != SessionSize || len(c.Nonce) != NonceSize || len(x.Binding) != BindingSize || len(c.Keys) == 0 || x.Endorsement == nil || x.Endorsement.kind == "":
		return nil, refuse("G1", "the expectation is not complete")
	case !bytes.Equal(ev.Session, c.Session):
		return nil, refuse("Q3", "the evidence is for another session")
	}
	if err := checkSecret(x, ev); err != nil {
		return nil, err
	}
	a, err := newAppraisal(x)
	if err != nil {
		return nil, err
	}
	r := &Result{endorsement: x.Endorsement.kind, at: x.AppraisalNow}
	if len(ev.Keys) != len(c.Keys) {
		return nil, refuse("K2", "%d keys were asked for, %d are there", len(c.Keys), len(ev.Keys))
	}
	for i, want := range c.Keys {
		k, err := a.key(want, &ev.Keys[i])
		if err != nil {
			return nil, err
		}
		for _, other := range r.keys {
			if same(other.PublicKey, k.PublicKey) {
				return nil, refuse("K2", "one key for two purposes")
			}
		}
		r.keys = append(r.keys, *k)
	}
	if err := a.quote(ev, r); err != nil {
		return nil, err
	}
	if r.epoch, err = a.epoch(ev); err != nil {
		return nil, err
	}
	if r.testimony, err = a.testimony(ev); err != nil {
		return nil, err
	}
	if r.policy, err = matchPolicy(c, ev.PCRs, r.epoch); err != nil {
		return nil, err
	}
	if r.evidence, err = EvidenceDigest(ev); err != nil {
		return nil, refuse("G1", "%v", err)
	}
	return r, nil
}

func checkSecret(x *Expectation, ev *Evidence) error {
	switch {
	case x.Secret == nil && len(ev.Secret) == 0:
		return nil
	case x.Secret == nil:
		return refuse("A3", "a secret that was not asked for")
	case len(x.Secret) != SecretSize || subtle.ConstantTimeCompare(x.Secret, ev.Secret) != 1:
		return refuse("A3", "the secret was not the one that only the endorsed TPM could open")
	}
	return nil
}

// appraisal holds what all structures of one exchange are checked against.
type appraisal struct {
	x      *Expectation
	ak     any
	signer []byte // Qualified Name of the AK
	srk    []byte // Name of the SRK
}

func newAppraisal(x *Expectation) (*appraisal, error) {
	name, err := CheckAK(x.AK)
	if err != nil {
		return nil, err
	}
	ak, err := PublicKey(x.AK)
	if err != nil {
		return nil, refuse("A1", "%v", err)
	}
	srk, err := decode[tpm2.TPMTPublic]("SRK", x.SRK)
	if err != nil {
		return nil, refuse("K7", "%v", err)
	}
	if !sameButUnique(srk, SRKTemplate()) {
		return nil, refuse("K7", "the SRK does not have the template of an ECC storage root key")
	}
	srkName, err := nameOf(srk)
	if err != nil {
		return nil, refuse("K7", "%v", err)
	}
	return &appraisal{x: x, ak: ak, signer: qualifiedName(endorsementHandle, name), srk: srkName}, nil
}

// attested verifies the AK's signature, then decodes (G4).
func (a *appraisal) attested(check string, in Attested) (*tpm2.TPMSAttest, error) {
	if len(in.Attest) > MaxStructure {
		return nil, refuse(check, "%d bytes, at most %d are expected", len(in.Attest), MaxStructure)
	}
	if err := verifyECDSA(a.ak, sha256.Sum256(in.Attest), in.Signature); err != nil {
		return nil, refuse(check, "%v", err)
	}
	// The magic comes first: an unrestricted key could sign anything else.
	if !bytes.HasPrefix(in.Attest, []byte{0xff, 'T', 'C', 'G'}) {
		return nil, refuse(check, "the signed structure was not made by a TPM")
	}
	s, err := decode[tpm2.TPMSAttest]("attestation", in.Attest)
	if err != nil {
		return nil, refuse(check, "%v", err)
	}
	return s, nil
}

func (a *appraisal) key(want KeyRequest, ev *KeyEvidence) (*CertifiedKey, error) {
	if ev.Purpose != want.Purpose {
		return nil, refuse("K2", "a key for %q was asked for, one for %.16q is there", want.Purpose, ev.Purpose)
	}
	if want.Protection == ProtectionHSM {
		return a.hsmKey(want, ev)
	}
	if len(ev.SPKI) != 0 || ev.Certify == nil {
		return nil, refuse("K1", "a key in the TPM was asked for, and the TPM does not certify this one")
	}
	public, err := decode[tpm2.TPMTPublic]("key", ev.Public)
	if err != nil {
		return nil, refuse("K3", "%v", err)
	}
	if err := a.template(public, want); err != nil {
		return nil, err
	}
	pub, _, err := publicKey(public)
	if err != nil {
		return nil, refuse("K3", "%v", err)
	}
	name, err := nameOf(public)
	if err != nil {
		return nil, refuse("K2", "%v", err)
	}
	if err := a.certified(ev, name); err != nil {
		return nil, err
	}
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return nil, refuse("K3", "the key is not an ECDSA key")
	}
	k := &CertifiedKey{Purpose: want.Purpose, Mode: cmp.Or(want.Mode, ModeLocal), PublicKey: key, Name: name, AuthPolicy: public.AuthPolicy.Buffer}
	if k.Mode != ModeLocal {
		// It signs nothing but statements, not even a request: that the TPM certified
		// it for this exchange shows who holds it.
		if len(ev.CSR) != 0 {
			return nil, refuse("K2", "a certificate request for a key in %.16s mode, which signs none", k.Mode)
		}
		return k, nil
	}
	if k.CSR, err = checkCSR(ev.CSR, key); err != nil {
		return nil, err
	}
	return k, nil
}

// template holds the key's public area against the one asked for, and names
// what differs.
func (a *appraisal) template(p *tpm2.TPMTPublic, want KeyRequest) error {
	t := p.ObjectAttributes
	for _, bit := range []struct {
		name      string
		set, want bool
	}{
		{"fixedTPM", t.FixedTPM, true}, {"fixedParent", t.FixedParent, true}, {"sensitiveDataOrigin", t.SensitiveDataOrigin, true},
		{"sign", t.SignEncrypt, true}, {"restricted", t.Restricted, false}, {"decrypt", t.Decrypt, false}, {"userWithAuth", t.UserWithAuth, false},
	} {
		if bit.set != bit.want {
			return refuse("K3", "%s of the %s key is %v, %v is expected", bit.name, want.Purpose, bit.set, bit.want)
		}
	}
	expected := a.x.AuthPolicies[cmp.Or(want.Mode, ModeLocal)]
	if len(expected) == 0 || !bytes.Equal(p.AuthPolicy.Buffer, expected) {
		return refuse("K3", "the authPolicy of the %s key is %x, %x is expected", want.Purpose, p.AuthPolicy.Buffer, expected)
	}
	if !sameButUnique(p, want.Template) {
		return refuse("K3", "the %s key does not have the template that was asked for", want.Purpose)
	}
	return nil
}

func (a *appraisal) certified(ev *KeyEvidence, name []byte) error {
	s, err := a.attested("K1", *ev.Certify)
	if err != nil {
		return err
	}
	if s.Type != tpm2.TPMSTAttestCertify {
		return refuse("K1", "the structure's type is %#x, a certification is expected", uint16(s.Type))
	}
	info, err := s.Attested.Certify()
	if err != nil || info == nil {
		return refuse("K1", "the structure has no certification in it")
	}
	if !bytes.Equal(info.Name.Buffer, name) {
		return refuse("K2", "another key was certified")
	}
	want := KeyQualifyingData(a.x.Challenge.Session, a.x.Challenge.Nonce, a.x.Binding, ev.CSR)
	if !bytes.Equal(s.ExtraData.Buffer, want[:]) {
		return refuse("K4", "the certification does not carry this exchange, TLS channel and certificate request")
	}
	if !bytes.Equal(s.QualifiedSigner.Buffer, a.signer) {
		return refuse("K5", "the certification was signed by a key that does not stand where the AK stands")
	}
	if !bytes.Equal(info.QualifiedName.Buffer, qualifiedName(ownerHandle, a.srk, name)) {
		return refuse("K7", "the key does not stand below the storage root key")
	}
	return nil
}

// hsmKey is a key in an HSM of the host. That it is in the HSM is what the
// host declares, unless the HSM's maker says so (H1 to H9); that this host asks
// for it, in this state, the quote shows (K2, Q3, G8).
func (a *appraisal) hsmKey(want KeyRequest, ev *KeyEvidence) (*CertifiedKey, error) {
	if len(ev.Public) != 0 || ev.Certify != nil {
		return nil, refuse("K2", "a key in an HSM was asked for, one in the TPM is there")
	}
	if len(ev.SPKI) > MaxStructure {
		return nil, refuse("K2", "the key has %d bytes, at most %d are expected", len(ev.SPKI), MaxStructure)
	}
	key, err := x509.ParsePKIXPublicKey(ev.SPKI)
	if err != nil {
		return nil, refuse("K2", "the key is malformed: %v", err)
	}
	if again, err := x509.MarshalPKIXPublicKey(key); err != nil || !bytes.Equal(again, ev.SPKI) {
		return nil, refuse("K2", "the key is not in its one spelling")
	}
	if err := checkHSMKind(key); err != nil {
		return nil, err
	}
	csr, err := checkCSR(ev.CSR, key)
	if err != nil {
		return nil, err
	}
	if want.Vendor != "" {
		if err := VerifyVendor(want.Vendor, ev.Vendor, ev.SPKI, a.x.VendorRoots, a.x.AppraisalNow); err != nil {
			return nil, err
		}
	} else if len(ev.Vendor) > 0 {
		return nil, refuse("H1", "a vendor's evidence is there, and none was asked for: the inventory says how such a key is attested")
	}
	return &CertifiedKey{Purpose: want.Purpose, Protection: ProtectionHSM, Vendor: want.Vendor, PublicKey: key, CSR: csr}, nil
}

// checkHSMKind applies K3 to a key in an HSM.
func checkHSMKind(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return refuse("K3", "the key is on %s, P-256 or P-384 is expected", k.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 || k.E != 65537 {
			return refuse("K3", "the key is RSA with %d bits and the exponent %d, 2048 to 4096 and 65537 are expected", n, k.E)
		}
	case ed25519.PublicKey:
	default:
		return refuse("K3", "the key is of a kind that is not known")
	}
	return nil
}

// same compares keys of any kind.
func same(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

func checkCSR(der []byte, key crypto.PublicKey) (*x509.CertificateRequest, error) {
	if len(der) > maxCSR {
		return nil, refuse("K2", "the certificate request has %d bytes, at most %d are expected", len(der), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, refuse("K2", "the certificate request is malformed: %v", err)
	}
	if !same(key, csr.PublicKey) {
		return nil, refuse("K2", "the certificate request is for another key")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, refuse("K2", "the certificate request is not signed by its key: %v", err)
	}
	return csr, nil
}

func (a *appraisal) quote(ev *Evidence, r *Result) error {
	s, err := a.attested("Q1", ev.Quote)
	if err != nil {
		return err
	}
	if s.Type != tpm2.TPMSTAttestQuote {
		return refuse("Q2", "the structure's type is %#x, a quote is expected", uint16(s.Type))
	}
	info, err := s.Attested.Quote()
	if err != nil || info == nil {
		return refuse("Q2", "the structure has no quote in it")
	}
	c := a.x.Challenge
	want, err := QuoteQualifyingData(c.Session, c.Nonce, a.x.Binding, ev.Keys)
	if err != nil {
		return refuse("Q3", "%v", err)
	}
	if !bytes.Equal(s.ExtraData.Buffer, want[:]) {
		return refuse("Q3", "the quote does not carry this exchange, TLS channel, keys and certificate requests")
	}
	if !bytes.Equal(s.QualifiedSigner.Buffer, a.signer) {
		return refuse("Q1", "the quote was signed by a key that does not stand where the AK stands")
	}
	if err := checkPCRs(c.PCRs, info, ev.PCRs); err != nil {
		return err
	}
	return a.clock(s, r)
}

func checkPCRs(asked []PCRSelection, info *tpm2.TPMSQuoteInfo, values []PCRValue) error {
	sel, err := Selection(asked)
	if err != nil {
		return refuse("Q5", "%v", err)
	}
	if len(info.PCRSelect.PCRSelections) > len(sel.PCRSelections) {
		return refuse("Q8", "banks are quoted that were not asked for")
	}
	if !bytes.Equal(tpm2.Marshal(info.PCRSelect), tpm2.Marshal(*sel)) {
		return refuse("Q4", "the quoted PCRs are not those asked for")
	}
	got, err := SelectionOf(values)
	if err != nil {
		return refuse("Q4", "%v", err)
	}
	gotSel, err := Selection(got)
	if err != nil || !bytes.Equal(tpm2.Marshal(*gotSel), tpm2.Marshal(*sel)) {
		return refuse("Q4", "the values sent are not of the PCRs asked for")
	}
	if !bytes.Equal(info.PCRDigest.Buffer, PCRDigest(values)) {
		return refuse("Q4", "the quoted digest is not that of the values sent")
	}
	return nil
}

func (a *appraisal) clock(s *tpm2.TPMSAttest, r *Result) error {
	ci := s.ClockInfo
	r.clock = Clock{Milliseconds: ci.Clock, Resets: ci.ResetCount, Restarts: ci.RestartCount}
	r.firmware = s.FirmwareVersion
	if !ci.Safe && !a.x.UnsafeClock {
		return refuse("Q6", "the TPM's clock is not safe: it lost power without an orderly shutdown; it is safe again after at most 70 minutes")
	}
	if old := a.x.Clock; old != nil {
		switch {
		case r.clock.Resets < old.Resets:
			return refuse("Q6", "the TPM counts %d resets, it had %d", r.clock.Resets, old.Resets)
		case r.clock.Resets == old.Resets && r.clock.Restarts < old.Restarts:
			return refuse("Q6", "the TPM counts %d restarts, it had %d", r.clock.Restarts, old.Restarts)
		case bool(ci.Safe) && r.clock.Milliseconds < old.Milliseconds:
			return refuse("Q6", "the TPM's clock went back from %d to %d ms", old.Milliseconds, r.clock.Milliseconds)
		}
	}
	if s.FirmwareVersion < a.x.MinFirmware {
		return refuse("Q7", "the TPM's firmware is %#x, at least %#x is demanded", s.FirmwareVersion, a.x.MinFirmware)
	}
	return nil
}

// matchPolicy returns the first approved policy that the values satisfy, of
// those that the first key asked for works under.
func matchPolicy(c *Challenge, values []PCRValue, epoch uint64) (string, error) {
	mode := cmp.Or(c.Keys[0].Mode, ModeLocal)
	list := UsableWith(c.Policies, mode, c.Epoch != nil, epoch)
	for i := range list {
		p := &list[i]
		if err := VerifyPolicy(c.PolicyKey, c.PolicyRef, p); err != nil {
			return "", refuse("P1", "%v", err)
		}
		if Matches(*p, values) {
			return p.Name, nil
		}
	}
	if len(list) == 0 {
		if c.Epoch != nil {
			return "", refuse("P1", "no policy is approved for this device, keys in %s mode and epoch %d", mode, epoch)
		}
		return "", refuse("P1", "no policy is approved for this device and keys in %s mode", mode)
	}
	return "", refuse("P1", "the PCRs match none of %d approved policies: %s", len(list), Differences(list[0], values))
}
