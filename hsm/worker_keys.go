//go:build cgo

package hsm

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"
)

// Ed25519 in PKCS#11 v3.0, sections 2.3.5 and 2.3.14; the Go module has v2.40's names.
const (
	ckkECEdwards       = 0x40
	ckmEdwardsKeyPair  = 0x1055
	ckmEdDSA           = 0x1057
	maxObjects         = maxKeys + 1
	edwards25519Params = "\x13\x0cedwards25519" // PrintableString curveName
)

func (w *worker) objects(s pkcs11.SessionHandle, classOf uint, id []byte) ([]pkcs11.ObjectHandle, error) {
	t := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, classOf)}
	if id != nil {
		t = append(t, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	if err := w.p11.FindObjectsInit(s, t); err != nil {
		return nil, err
	}
	list, _, err := w.p11.FindObjects(s, maxObjects)
	if end := w.p11.FindObjectsFinal(s); err == nil {
		err = end
	}
	return list, err
}

// find looks for the one key pair with this CKA_ID. Duplicates are refused:
// which of two keys would sign is then the token's whim.
func (w *worker) find(s pkcs11.SessionHandle, id []byte) ([]Attributes, error) {
	priv, err := w.objects(s, pkcs11.CKO_PRIVATE_KEY, id)
	if err != nil {
		return nil, err
	}
	if len(priv) != 1 {
		return nil, fmt.Errorf("%w: %d private keys have CKA_ID %x, exactly one must", errMissing, len(priv), id)
	}
	a, kind, err := w.read(s, priv[0])
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.found[string(id)] = found{priv[0], kind}
	w.mu.Unlock()
	return []Attributes{*a}, nil
}

func (w *worker) list(s pkcs11.SessionHandle) ([]Attributes, error) {
	priv, err := w.objects(s, pkcs11.CKO_PRIVATE_KEY, nil)
	if err != nil {
		return nil, err
	}
	if len(priv) > maxKeys {
		return nil, fmt.Errorf("the token has more than %d private keys", maxKeys)
	}
	var out []Attributes
	same := make(map[string]int)
	for _, h := range priv {
		a, _, err := w.read(s, h)
		if _, ok := errors.AsType[pkcs11.Error](err); ok {
			return nil, err
		}
		if a == nil {
			continue
		}
		if err != nil {
			a.Unusable = err.Error()
		}
		same[string(a.ID)]++
		out = append(out, *a)
	}
	for i := range out {
		if n := same[string(out[i].ID)]; n > 1 {
			out[i].Unusable = fmt.Sprintf("%d private keys have this CKA_ID, exactly one must", n)
		}
	}
	return out, nil
}

// read returns what the token says of a private key, with the public key that
// has the same CKA_ID. Where that is not to be had the rest is there, and an error.
func (w *worker) read(s pkcs11.SessionHandle, h pkcs11.ObjectHandle) (*Attributes, uint, error) {
	got, err := w.p11.GetAttributeValue(s, h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_ID, nil), pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, nil),
	})
	if err != nil {
		return nil, 0, err
	}
	if len(got[0].Value) > maxID || len(got[1].Value) > 256 {
		return nil, 0, errors.New("a key's CKA_ID or CKA_LABEL is too long")
	}
	kind := number(got[2].Value)
	a := &Attributes{ID: got[0].Value, Label: fmt.Sprintf("%+q", got[1].Value)}
	a.Label = a.Label[1 : len(a.Label)-1]
	for attr, field := range map[uint]**bool{
		pkcs11.CKA_SENSITIVE: &a.Sensitive, pkcs11.CKA_EXTRACTABLE: &a.Extractable, pkcs11.CKA_ALWAYS_SENSITIVE: &a.AlwaysSensitive,
		pkcs11.CKA_NEVER_EXTRACTABLE: &a.NeverExtractable, pkcs11.CKA_LOCAL: &a.Local,
	} {
		// One by one: a token that does not know one of them fails the whole call.
		v, err := w.p11.GetAttributeValue(s, h, []*pkcs11.Attribute{pkcs11.NewAttribute(attr, nil)})
		if code, ok := errors.AsType[pkcs11.Error](err); ok && code != pkcs11.CKR_ATTRIBUTE_TYPE_INVALID {
			return nil, 0, err
		}
		if err == nil && len(v) == 1 && len(v[0].Value) == 1 {
			b := v[0].Value[0] != 0
			*field = &b
		}
	}
	a.SPKI, err = w.public(s, a.ID, kind)
	return a, kind, err
}

func (w *worker) public(s pkcs11.SessionHandle, id []byte, kind uint) ([]byte, error) {
	pubs, err := w.objects(s, pkcs11.CKO_PUBLIC_KEY, id)
	if err != nil {
		return nil, err
	}
	if len(pubs) != 1 {
		return nil, fmt.Errorf("%w: %d public keys have CKA_ID %x, exactly one must", errMissing, len(pubs), id)
	}
	two := []uint{pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT}
	if kind == pkcs11.CKK_RSA {
		two = []uint{pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT}
	}
	v, err := w.p11.GetAttributeValue(s, pubs[0], []*pkcs11.Attribute{pkcs11.NewAttribute(two[0], nil), pkcs11.NewAttribute(two[1], nil)})
	if err != nil {
		return nil, err
	}
	if kind == pkcs11.CKK_RSA {
		e := new(big.Int).SetBytes(v[1].Value)
		if !e.IsInt64() || e.Int64() > 1<<31-1 || len(v[0].Value) > 1024 {
			return nil, errors.New("RSA key with an exponent or modulus that is too large")
		}
		return x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(v[0].Value), E: int(e.Int64())})
	}
	var point []byte // a DER OCTET STRING around the point (PKCS#11 v2.40 mechanisms, section 2.3.3)
	if rest, err := asn1.Unmarshal(v[1].Value, &point); err != nil || len(rest) > 0 {
		point = v[1].Value // some tokens give it bare
	}
	if kind == ckkECEdwards {
		if len(point) != ed25519.PublicKeySize {
			return nil, errors.New("not Ed25519, though an Edwards key")
		}
		return x509.MarshalPKIXPublicKey(ed25519.PublicKey(point))
	}
	var curve elliptic.Curve
	switch string(v[0].Value) {
	case oidP256:
		curve = elliptic.P256()
	case oidP384:
		curve = elliptic.P384()
	default:
		return nil, errors.New("key of a kind that is not supported")
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(pub)
}

// Curve OIDs in DER.
const (
	oidP256 = "\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07"
	oidP384 = "\x06\x05\x2b\x81\x04\x00\x22"
)

// generate makes a key pair and returns it as read back from the token.
func (w *worker) generate(s pkcs11.SessionHandle, q *request) ([]Attributes, error) {
	if len(q.Key) == 0 || len(q.Key) > maxID || len(q.Label) > 256 {
		return nil, errors.New("a key needs a CKA_ID of 1 to 255 bytes and a label of at most 256")
	}
	if old, err := w.objects(s, pkcs11.CKO_PRIVATE_KEY, q.Key); err != nil {
		return nil, err
	} else if len(old) > 0 {
		return nil, fmt.Errorf("the token has a key with CKA_ID %x already", q.Key)
	}
	lib, err := w.p11.GetInfo()
	if err != nil {
		return nil, err
	}
	attempts := turnedOff
	if lib.LibraryDescription == leaksObjects {
		attempts = turnedOff[len(turnedOff)-1:]
	}
	for i, off := range attempts {
		if err = w.generateWith(s, q, off); err == nil {
			return w.find(s, q.Key)
		}
		if i == len(attempts)-1 || !refusesTemplate(err) {
			break
		}
		if made, err := w.objects(s, pkcs11.CKO_PRIVATE_KEY, q.Key); err != nil {
			return nil, err
		} else if len(made) > 0 {
			return nil, fmt.Errorf("the token made a key with CKA_ID %x and said that it failed: delete it", q.Key)
		}
	}
	return nil, err
}

// turnedOff are attributes that tokens turn on unless told otherwise. Where a
// token refuses to be told of all of them, fewer are tried: docs/hsm.md says which do.
var turnedOff = [][]uint{
	{pkcs11.CKA_DECRYPT, pkcs11.CKA_UNWRAP, pkcs11.CKA_MODIFIABLE, pkcs11.CKA_COPYABLE},
	{pkcs11.CKA_DECRYPT, pkcs11.CKA_UNWRAP, pkcs11.CKA_MODIFIABLE},
	{},
}

// leaksObjects is what tpm2-pkcs11 calls itself. It refuses them all, and each
// time leaves an object in the TPM, which has room for three.
const leaksObjects = "TPM2.0 Cryptoki"

// refusesTemplate: the codes with which tokens answer attributes that they do
// not take. CKR_GENERAL_ERROR is NSS's.
func refusesTemplate(err error) bool {
	code, ok := errors.AsType[pkcs11.Error](err)
	switch code {
	case pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_GENERAL_ERROR:
		return ok
	}
	return false
}

// generateWith makes a key pair whose private part has these attributes off.
func (w *worker) generateWith(s pkcs11.SessionHandle, q *request, off []uint) error {
	pub, err := crypto11.NewAttributeSetWithIDAndLabel(q.Key, []byte(q.Label))
	if err != nil {
		return err
	}
	priv := pub.Copy()
	private := map[uint]bool{pkcs11.CKA_TOKEN: true, pkcs11.CKA_PRIVATE: true, pkcs11.CKA_SENSITIVE: true, pkcs11.CKA_EXTRACTABLE: false, pkcs11.CKA_SIGN: true}
	for _, attr := range off {
		private[attr] = false
	}
	for attr, v := range private {
		if err := priv.Set(attr, v); err != nil {
			return err
		}
	}
	switch q.Algorithm {
	case P256, P384:
		curve := elliptic.P256()
		if q.Algorithm == P384 {
			curve = elliptic.P384()
		}
		_, err = w.c11.GenerateECDSAKeyPairWithAttributes(pub, priv, curve)
	case RSA2048, RSA3072, RSA4096:
		bits := map[Algorithm]int{RSA2048: 2048, RSA3072: 3072, RSA4096: 4096}[q.Algorithm]
		_, err = w.c11.GenerateRSAKeyPairWithAttributes(pub, priv, bits)
	case Ed25519: // crypto11 has none
		if err = errors.Join(pub.Set(pkcs11.CKA_EC_PARAMS, []byte(edwards25519Params)), pub.Set(pkcs11.CKA_TOKEN, true), pub.Set(pkcs11.CKA_VERIFY, true)); err == nil {
			_, _, err = w.p11.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdwardsKeyPair, nil)}, pub.ToSlice(), priv.ToSlice())
		}
	default:
		return fmt.Errorf("unknown algorithm %.16q", string(q.Algorithm))
	}
	return err
}

// info reads what the module and the token say of themselves.
func (w *worker) info() (*Info, error) {
	lib, err := w.p11.GetInfo()
	if err != nil {
		return nil, err
	}
	token, err := w.p11.GetTokenInfo(w.slot)
	if err != nil {
		return nil, err
	}
	slot, err := w.p11.GetSlotInfo(w.slot)
	if err != nil {
		return nil, err
	}
	list, err := w.p11.GetMechanismList(w.slot)
	if err != nil {
		return nil, err
	}
	clip := func(s string) string { // a vendor's text is not trusted to be text
		s = fmt.Sprintf("%+q", s[:min(len(s), 64)])
		return s[1 : len(s)-1]
	}
	version := func(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }
	has := func(f uint) bool { return token.Flags&f != 0 }
	out := &Info{
		Library: clip(lib.LibraryDescription) + " " + version(lib.LibraryVersion), Cryptoki: version(lib.CryptokiVersion),
		Label: clip(token.Label), Manufacturer: clip(token.ManufacturerID), Model: clip(token.Model), Serial: clip(token.SerialNumber), Firmware: version(token.FirmwareVersion),
		PINCountLow: has(pkcs11.CKF_USER_PIN_COUNT_LOW), PINFinalTry: has(pkcs11.CKF_USER_PIN_FINAL_TRY), PINLocked: has(pkcs11.CKF_USER_PIN_LOCKED),
		HardwareSlot: slot.Flags&pkcs11.CKF_HW_SLOT != 0, Signs: []string{}, Generates: []string{}, MechanismsTotal: len(list),
	}
	if n := token.MaxRwSessionCount; n != pkcs11.CK_EFFECTIVELY_INFINITE && n != pkcs11.CK_UNAVAILABLE_INFORMATION {
		out.SessionsMax = n
	}
	if has(pkcs11.CKF_CLOCK_ON_TOKEN) && len(token.UTCTime) >= 14 {
		out.ClockUTC = clip(token.UTCTime[:14])
	}
	mechanisms := make(map[uint]bool)
	for _, m := range list {
		mechanisms[m.Mechanism] = true
	}
	for _, m := range []struct {
		id   uint
		name string
		to   *[]string
	}{
		{pkcs11.CKM_ECDSA, "CKM_ECDSA", &out.Signs}, {pkcs11.CKM_RSA_PKCS, "CKM_RSA_PKCS", &out.Signs}, {pkcs11.CKM_RSA_PKCS_PSS, "CKM_RSA_PKCS_PSS", &out.Signs}, {ckmEdDSA, "CKM_EDDSA", &out.Signs},
		{pkcs11.CKM_EC_KEY_PAIR_GEN, "EC", &out.Generates}, {pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, "RSA", &out.Generates}, {ckmEdwardsKeyPair, "Ed25519", &out.Generates},
	} {
		if mechanisms[m.id] {
			*m.to = append(*m.to, m.name)
		}
	}
	return out, nil
}

// number reads a CK_ULONG, which has the host's byte order and size.
func number(b []byte) uint {
	var n uint
	for i := len(b) - 1; i >= 0; i-- {
		n = n<<8 | uint(b[i])
	}
	return n
}

// sign signs the input with a key that find has found in this process.
func (w *worker) sign(s pkcs11.SessionHandle, q *request) ([]byte, error) {
	w.mu.Lock()
	k, ok := w.found[string(q.Key)]
	w.mu.Unlock()
	if !ok {
		return nil, pkcs11.Error(ckrKeyHandleInvalid) // looked up anew by the caller
	}
	var m *pkcs11.Mechanism
	switch {
	case q.Scheme == schemeECDSA && k.kind == pkcs11.CKK_EC:
		m = pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)
	case q.Scheme == schemePKCS1 && k.kind == pkcs11.CKK_RSA:
		m = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)
	case q.Scheme == schemePSS && k.kind == pkcs11.CKK_RSA:
		var p []byte
		switch q.Hash { // salt as long as the digest
		case "SHA-256":
			p = pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 32)
		case "SHA-384":
			p = pkcs11.NewPSSParams(pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384, 48)
		case "SHA-512":
			p = pkcs11.NewPSSParams(pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512, 64)
		default:
			return nil, fmt.Errorf("unknown hash %.16q", q.Hash)
		}
		m = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, p)
	case q.Scheme == schemeEdDSA && k.kind == ckkECEdwards:
		m = pkcs11.NewMechanism(ckmEdDSA, nil)
	default:
		return nil, fmt.Errorf("a key of type %#x does not sign by %.16q", k.kind, q.Scheme)
	}
	if err := w.p11.SignInit(s, []*pkcs11.Mechanism{m}, k.handle); err != nil {
		return nil, err
	}
	sig, err := w.p11.Sign(s, q.Input)
	if err != nil || q.Scheme != schemeECDSA {
		return sig, err
	}
	if len(sig) == 0 || len(sig)%2 != 0 {
		return nil, errors.New("the token returned a malformed ECDSA signature")
	}
	n := len(sig) / 2 // r || s (PKCS#11 v2.40 mechanisms, section 2.3.1); the rest of the world uses DER
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])})
}
