package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// MaxPCR is the highest PCR index that a policy may name: 17 to 22 belong to a
// dynamic launch, and 16 and 23 can be reset by anyone (Q5).
const MaxPCR = 15

type bank struct {
	alg  tpm2.TPMAlgID
	size int
}

var banks = map[string]bank{
	"sha256": {tpm2.TPMAlgSHA256, sha256.Size},
	"sha384": {tpm2.TPMAlgSHA384, sha512.Size384},
}

// Selection returns the TPML_PCR_SELECTION of a selection; banks and indexes
// must be in ascending order and without repetition.
func Selection(sel []PCRSelection) (*tpm2.TPMLPCRSelection, error) {
	if len(sel) == 0 {
		return nil, errors.New("PCR selection: is empty")
	}
	var out tpm2.TPMLPCRSelection
	for i, s := range sel {
		b, ok := banks[s.Bank]
		switch {
		case !ok:
			return nil, fmt.Errorf("PCR selection: bank %.16q: sha256 or sha384 is expected", s.Bank)
		case i > 0 && sel[i-1].Bank >= s.Bank:
			return nil, errors.New("PCR selection: banks must be in ascending order, each once")
		case len(s.Indexes) == 0:
			return nil, fmt.Errorf("PCR selection: no PCR of bank %s is named", s.Bank)
		}
		bits := make([]byte, 3)
		for j, p := range s.Indexes {
			if p < 0 || p > MaxPCR {
				return nil, fmt.Errorf("PCR selection: PCR %d: 0 to %d are allowed, since others can be reset", p, MaxPCR)
			}
			if j > 0 && s.Indexes[j-1] >= p {
				return nil, errors.New("PCR selection: indexes must be in ascending order, each once")
			}
			bits[p/8] |= 1 << (p % 8)
		}
		out.PCRSelections = append(out.PCRSelections, tpm2.TPMSPCRSelection{Hash: b.alg, PCRSelect: bits})
	}
	return &out, nil
}

// SelectionOf returns the selection that values are of. Values must be ordered
// by bank and index, each once, and have their bank's size.
func SelectionOf(values []PCRValue) ([]PCRSelection, error) {
	var sel []PCRSelection
	for _, v := range values {
		if b, ok := banks[v.Bank]; !ok || len(v.Digest) != b.size {
			return nil, fmt.Errorf("PCR %d of bank %.16q: the value does not have the bank's size", v.Index, v.Bank)
		}
		if n := len(sel); n == 0 || sel[n-1].Bank != v.Bank {
			sel = append(sel, PCRSelection{Bank: v.Bank})
		}
		sel[len(sel)-1].Indexes = append(sel[len(sel)-1].Indexes, v.Index)
	}
	if _, err := Selection(sel); err != nil {
		return nil, err
	}
	return sel, nil
}

// Union returns the selection of all PCRs that any of the policies names.
func Union(policies []ApprovedPolicy) []PCRSelection {
	named := make(map[string]map[int]bool)
	for _, p := range policies {
		for _, v := range p.PCRs {
			if named[v.Bank] == nil {
				named[v.Bank] = make(map[int]bool)
			}
			named[v.Bank][v.Index] = true
		}
	}
	var out []PCRSelection
	for bank, set := range named {
		s := PCRSelection{Bank: bank}
		for i := range set {
			s.Indexes = append(s.Indexes, i)
		}
		slices.Sort(s.Indexes)
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b PCRSelection) int { return bytes.Compare([]byte(a.Bank), []byte(b.Bank)) })
	return out
}

// PCRDigest returns the SHA-256 over the values in order, as TPM2_Quote and
// TPM2_PolicyPCR compute it.
func PCRDigest(values []PCRValue) []byte {
	h := sha256.New()
	for _, v := range values {
		h.Write(v.Digest)
	}
	return h.Sum(nil)
}

// PCRPolicy returns the SHA-256 policy digest of TPM2_PolicyPCR over values.
func PCRPolicy(values []PCRValue) ([]byte, error) {
	sel, err := SelectionOf(values)
	if err != nil {
		return nil, err
	}
	l, err := Selection(sel)
	if err != nil {
		return nil, err
	}
	c, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := (tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: PCRDigest(values)}, Pcrs: *l}).Update(c); err != nil {
		return nil, err
	}
	return c.Hash().Digest, nil
}

// PolicyKeyPublic returns the TPMT_PUBLIC under which TPMs load the policy key,
// a P-256 key. Its Name is part of every action key's authPolicy.
func PolicyKeyPublic(key *ecdsa.PublicKey) ([]byte, error) {
	if key.Curve != elliptic.P256() {
		return nil, errors.New("policy key: P-256 is expected")
	}
	point, err := key.Bytes() // 04 | X | Y
	if err != nil {
		return nil, fmt.Errorf("policy key: %w", err)
	}
	t := p256(tpm2.TPMAObject{UserWithAuth: true, NoDA: true, SignEncrypt: true}, nil, noSymmetric, noScheme)
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	return tpm2.Marshal(*t), nil
}

// AuthPolicy returns the SHA-256 authPolicy of a key that works under whatever
// policy the policy key approves for policyRef (TPM2_PolicyAuthorize, Part 3, section 23.16).
func AuthPolicy(policyKey, policyRef []byte) ([]byte, error) {
	name, err := KeyName(policyKey)
	if err != nil {
		return nil, fmt.Errorf("policy key: %w", err)
	}
	c, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := (tpm2.PolicyAuthorize{KeySign: tpm2.TPM2BName{Buffer: name}, PolicyRef: tpm2.TPM2BDigest{Buffer: policyRef}}).Update(c); err != nil {
		return nil, err
	}
	return c.Hash().Digest, nil
}

// Approval is what the policy key signs for a policy digest: aHash of
// TPM2_PolicyAuthorize (Part 3, section 23.16).
func Approval(digest, ref []byte) [32]byte {
	return sha256.Sum256(append(bytes.Clone(digest), ref...))
}

// SignPolicy approves PCR values with the policy key, a P-256 key: for keys in
// local mode, or with approvers for those in approver mode.
func SignPolicy(key crypto.Signer, name string, values []PCRValue, ref []byte, approvers ...*ecdsa.PublicKey) (*ApprovedPolicy, error) {
	return SignEpochPolicy(key, name, values, ref, 0, approvers...)
}

// SignReservePolicy is [SignEpochPolicy] for keys in reserve mode, with an approver.
func SignReservePolicy(key crypto.Signer, name string, values []PCRValue, ref []byte, epoch uint64, approver *ecdsa.PublicKey) (*ApprovedPolicy, error) {
	return signPolicy(key, &ApprovedPolicy{Name: name, PCRs: slices.Clone(values), Epoch: epoch, Reserve: true}, ref, approver)
}

// SignEpochPolicy is [SignPolicy] for an approval that ends when a host's epoch
// counter is above epoch; 0 is without one.
func SignEpochPolicy(key crypto.Signer, name string, values []PCRValue, ref []byte, epoch uint64, approvers ...*ecdsa.PublicKey) (*ApprovedPolicy, error) {
	return signPolicy(key, &ApprovedPolicy{Name: name, PCRs: slices.Clone(values), Epoch: epoch}, ref, approvers...)
}

func signPolicy(key crypto.Signer, p *ApprovedPolicy, ref []byte, approvers ...*ecdsa.PublicKey) (*ApprovedPolicy, error) {
	if !validName(p.Name) {
		return nil, fmt.Errorf("policy name %.80q: 1 to 64 letters, digits, dots, dashes and underscores are expected", p.Name)
	}
	for _, k := range approvers {
		area, err := PolicyKeyPublic(k)
		if err != nil {
			return nil, fmt.Errorf("approver: %w", err)
		}
		p.Approvers = append(p.Approvers, area)
	}
	digest, err := PolicyDigest(p, ref)
	if err != nil {
		return nil, err
	}
	a := Approval(digest, p.PolicyRef(ref))
	der, err := key.Sign(rand.Reader, a[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing with the policy key: %w", err)
	}
	if p.Signature, err = ecdsaSignature(der); err != nil {
		return nil, fmt.Errorf("policy key: %w", err)
	}
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("policy key: P-256 is expected")
	}
	area, err := PolicyKeyPublic(pub)
	if err != nil {
		return nil, err
	}
	return p, VerifyPolicy(area, ref, p)
}

func validName(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}

// VerifyPolicy returns nil if the policy key approved p for policyRef.
func VerifyPolicy(policyKey, policyRef []byte, p *ApprovedPolicy) error {
	if !validName(p.Name) {
		return fmt.Errorf("approved policy: name %.80q is not valid", p.Name)
	}
	digest, err := PolicyDigest(p, policyRef)
	if err != nil {
		return fmt.Errorf("approved policy %s: %w", p.Name, err)
	}
	area, err := decode[tpm2.TPMTPublic]("policy key", policyKey)
	if err != nil {
		return err
	}
	key, _, err := publicKey(area)
	if err != nil {
		return err
	}
	if err := verifyECDSA(key, Approval(digest, p.PolicyRef(policyRef)), p.Signature); err != nil {
		return fmt.Errorf("approved policy %s: %w", p.Name, err)
	}
	return nil
}

// ecdsaSignature converts a DER signature to a TPMT_SIGNATURE over SHA-256.
func ecdsaSignature(der []byte) ([]byte, error) {
	var rs struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &rs); err != nil || len(rest) != 0 || rs.R.Sign() <= 0 || rs.S.Sign() <= 0 || rs.R.BitLen() > 256 || rs.S.BitLen() > 256 {
		return nil, errors.New("not a P-256 signature")
	}
	return tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: rs.R.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: rs.S.FillBytes(make([]byte, 32))},
		}),
	}), nil
}

// verifyECDSA checks a TPMT_SIGNATURE. Scheme and hash are the fixed ones of
// the keys here; what the signature says of itself must agree (Q1).
func verifyECDSA(key any, digest [32]byte, signature []byte) error {
	k, ok := key.(*ecdsa.PublicKey)
	if !ok || k.Curve != elliptic.P256() {
		return errors.New("the signing key is not a P-256 key")
	}
	sig, err := decode[tpm2.TPMTSignature]("signature", signature)
	if err != nil {
		return err
	}
	if sig.SigAlg != tpm2.TPMAlgECDSA {
		return fmt.Errorf("signature: algorithm %#x, ECDSA is expected", uint16(sig.SigAlg))
	}
	e, err := sig.Signature.ECDSA()
	if err != nil || e == nil {
		return errors.New("signature: no ECDSA signature in it")
	}
	if e.Hash != tpm2.TPMAlgSHA256 || len(e.SignatureR.Buffer) > 32 || len(e.SignatureS.Buffer) > 32 {
		return errors.New("signature: ECDSA with SHA-256 on P-256 is expected")
	}
	r, s := new(big.Int).SetBytes(e.SignatureR.Buffer), new(big.Int).SetBytes(e.SignatureS.Buffer)
	if !ecdsa.Verify(k, digest[:], r, s) {
		return errors.New("signature: does not verify")
	}
	return nil
}
