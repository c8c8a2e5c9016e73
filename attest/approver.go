package attest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// Modes of a key in the TPM, as they stand in messages and certificates.
const (
	ModeLocal    = "local"    // it signs while the host is in an approved state
	ModeApprover = "approver" // besides, for each signature, the TPM demands approvers' authorizations
	ModeReserve  = "reserve"  // besides, the TPM demands an approver's consent of not long ago, which is for any signature
)

// Modes are all of them.
var Modes = []string{ModeLocal, ModeApprover, ModeReserve}

// AuthorizationSeconds is the expiration in every authorization of an approver,
// in seconds from the start of the TPM's session. One without end would let a
// host keep authorizations in store.
const AuthorizationSeconds = 60

// MaxApprovers bounds how many approvers one policy may demand.
const MaxApprovers = 4

// NonceTPMSize is the size of the nonces of policy sessions here, in bytes.
const NonceTPMSize = 32

// PolicyRef is the policyRef of all approvals in a trust domain: it keeps
// approvals of one from serving in another that has the same policy key.
func PolicyRef(trustDomain string) []byte {
	sum := sha256.Sum256([]byte("inkan policy v1\x00" + trustDomain))
	return sum[:]
}

// ApproverPolicyRef is the policyRef of approvals for keys in approver mode. It
// differs from that of local mode, so that no approval without approvers serves for such a key.
func ApproverPolicyRef(policyRef []byte) []byte {
	sum := sha256.Sum256(append([]byte("inkan approver policy v1\x00"), policyRef...))
	return sum[:]
}

// ReservePolicyRef is the policyRef of approvals for keys in reserve mode.
func ReservePolicyRef(policyRef []byte) []byte {
	sum := sha256.Sum256(append([]byte("inkan reserve policy v1\x00"), policyRef...))
	return sum[:]
}

// modeRef is the policyRef of approvals for keys of a mode.
func modeRef(mode string, policyRef []byte) []byte {
	switch mode {
	case ModeApprover:
		return ApproverPolicyRef(policyRef)
	case ModeReserve:
		return ReservePolicyRef(policyRef)
	}
	return policyRef
}

// ReserveRef is the policyRef inside approvers' consents for keys in reserve
// mode. It differs from that of authorizations, so that no consent serves a key in approver mode.
func ReserveRef(policyRef []byte) []byte {
	sum := sha256.Sum256(append([]byte("inkan reserve v1\x00"), policyRef...))
	return sum[:]
}

// AuthorizationRef is the policyRef inside approvers' authorizations: an
// approver's key serves one trust domain.
func AuthorizationRef(policyRef []byte) []byte {
	sum := sha256.Sum256(append([]byte("inkan authorization v1\x00"), policyRef...))
	return sum[:]
}

// PolicyRef is the policyRef that an approval is signed for: that of the mode
// of the keys it is for, and of approvals that end with an epoch if it does.
func (p *ApprovedPolicy) PolicyRef(policyRef []byte) []byte {
	policyRef = modeRef(p.Mode(), policyRef)
	if p.Epoch > 0 {
		policyRef = EpochPolicyRef(policyRef)
	}
	return policyRef
}

// Mode is the mode of the keys that the approval is for.
func (p *ApprovedPolicy) Mode() string {
	switch {
	case p.Reserve:
		return ModeReserve
	case len(p.Approvers) > 0:
		return ModeApprover
	}
	return ModeLocal
}

// OfMode returns the approvals that are for keys of a mode.
func OfMode(list []ApprovedPolicy, mode string) []ApprovedPolicy {
	var out []ApprovedPolicy
	for _, p := range list {
		if p.Mode() == mode {
			out = append(out, p)
		}
	}
	return out
}

// KeyPolicy returns the SHA-256 authPolicy of a key of a mode: TPM2_PolicyAuthorize
// for what the policy key approves for keys of that mode.
func KeyPolicy(mode string, policyKey, policyRef []byte) ([]byte, error) {
	if !slices.Contains(Modes, mode) {
		return nil, fmt.Errorf("key mode %.16q: one of %q is expected", mode, Modes)
	}
	return AuthPolicy(policyKey, modeRef(mode, policyRef))
}

// PolicyDigest returns the SHA-256 digest of what p approves: TPM2_PolicyPCR over
// its values, TPM2_PolicyNV if it ends with an epoch, then TPM2_PolicySigned for
// each of its approvers (Part 3, sections 23.7, 23.9 and 23.3).
func PolicyDigest(p *ApprovedPolicy, policyRef []byte) ([]byte, error) {
	digest, err := PCRPolicy(p.PCRs)
	if err != nil {
		return nil, err
	}
	if len(p.Approvers) > MaxApprovers {
		return nil, fmt.Errorf("%d approvers, at most %d are allowed", len(p.Approvers), MaxApprovers)
	}
	if err := validEpoch(p.Epoch); err != nil {
		return nil, err
	}
	if p.Epoch > 0 {
		digest = epochStep(digest, p.Epoch)
	}
	ref := AuthorizationRef(policyRef)
	if p.Reserve {
		if ref = ReserveRef(policyRef); len(p.Approvers) != 1 {
			return nil, fmt.Errorf("%d approvers for keys in reserve mode, 1 is expected: give each an approval of its own", len(p.Approvers))
		}
	}
	for i, area := range p.Approvers {
		name, err := approverName(area)
		if err != nil {
			return nil, fmt.Errorf("approver %d: %w", i+1, err)
		}
		for _, other := range p.Approvers[:i] {
			if bytes.Equal(other, area) {
				return nil, errors.New("an approver stands twice: two authorizations of one key are one")
			}
		}
		digest = extend(extend(digest, binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMCCPolicySigned)), name), ref)
	}
	return digest, nil
}

// extend is PolicyUpdate's hash (Part 3, section 23.2.3).
func extend(digest []byte, parts ...[]byte) []byte {
	sum := sha256.Sum256(append(bytes.Clone(digest), bytes.Join(parts, nil)...))
	return sum[:]
}

// approverName returns the Name of an approver's TPMT_PUBLIC, which must be the
// one that TPMs load such a key under.
func approverName(area []byte) ([]byte, error) {
	key, err := PublicKey(area)
	if err != nil {
		return nil, err
	}
	k, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("a P-256 key is expected")
	}
	again, err := PolicyKeyPublic(k)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, area) {
		return nil, errors.New("its public area is not the one that such keys are loaded with")
	}
	return KeyName(area)
}

// ApproverID is how an approver's key is named in messages: the hex of its TPM Name.
func ApproverID(key *ecdsa.PublicKey) (string, error) {
	area, err := PolicyKeyPublic(key)
	if err != nil {
		return "", err
	}
	name, err := KeyName(area)
	return hex.EncodeToString(name), err
}

// ApproverIDs returns the names of the approvers that p demands, in order.
func (p *ApprovedPolicy) ApproverIDs() ([]string, error) {
	var out []string
	for _, area := range p.Approvers {
		name, err := approverName(area)
		if err != nil {
			return nil, err
		}
		out = append(out, hex.EncodeToString(name))
	}
	return out, nil
}

// ActionKeyName returns the TPM Name of an action key from its public key and
// its authPolicy. All else in its public area is fixed by [KeyTemplate], so whoever knows
// the certificate knows the Name, and need not be told it.
func ActionKeyName(key *ecdsa.PublicKey, authPolicy []byte) ([]byte, error) {
	if key.Curve != elliptic.P256() {
		return nil, errors.New("a key on P-256 is expected")
	}
	point, err := key.Bytes()
	if err != nil {
		return nil, err
	}
	t, err := tpm2.Unmarshal[tpm2.TPMTPublic](KeyTemplate(authPolicy))
	if err != nil {
		return nil, err
	}
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
	})
	return nameOf(t)
}

// signParameters follow the digest in TPM2_Sign with ECDSA over SHA-256: inScheme,
// and a TPMT_TK_HASHCHECK that is empty, for the null hierarchy.
var signParameters = []byte{0x00, 0x18, 0x00, 0x0b, 0x80, 0x24, 0x40, 0x00, 0x00, 0x07, 0x00, 0x00}

// SignCommandHash returns cpHash of the TPM2_Sign that signs a SHA-256 digest
// with ECDSA by the key of a Name (Part 1, section 16.7): of that command and no other.
func SignCommandHash(keyName []byte, digest [32]byte) [32]byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMCCSign))
	b = append(b, keyName...)
	b = append(b, 0, 32)
	b = append(b, digest[:]...)
	return sha256.Sum256(append(b, signParameters...))
}

// Authorization is an approver's consent to one TPM2_Sign in one session.
type Authorization struct {
	Approver   string `json:"approver"`   // its key, see ApproverID
	Expiration int32  `json:"expiration"` // AuthorizationSeconds; of a consent that of its session, negative
	Signature  []byte `json:"signature"`  // TPMT_SIGNATURE over aHash
}

// authorizationHash is aHash of TPM2_PolicySigned (Part 3, section 23.3). The TPM
// would take an empty cpHash (any command), an empty nonce (any session) and a
// negative expiration (a ticket that replays it); here none of them can be spelled.
func authorizationHash(nonceTPM []byte, cpHash [32]byte, policyRef []byte) ([32]byte, error) {
	if len(nonceTPM) != NonceTPMSize {
		return [32]byte{}, fmt.Errorf("nonceTPM has %d bytes, %d are expected", len(nonceTPM), NonceTPMSize)
	}
	b := binary.BigEndian.AppendUint32(bytes.Clone(nonceTPM), AuthorizationSeconds)
	b = append(b, cpHash[:]...)
	return sha256.Sum256(append(b, AuthorizationRef(policyRef)...)), nil
}

// ApproverKey is an approver's P-256 key. It has two uses: [ApproverKey.Authorize] and [ApproverKey.Consent].
type ApproverKey struct {
	key crypto.Signer
	pub *ecdsa.PublicKey
	id  string
}

// NewApproverKey refuses a key that is not on P-256.
func NewApproverKey(key crypto.Signer) (*ApproverKey, error) {
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("approver key: a P-256 key is expected")
	}
	id, err := ApproverID(pub)
	if err != nil {
		return nil, fmt.Errorf("approver key: %w", err)
	}
	return &ApproverKey{key, pub, id}, nil
}

// Authorize is [ApproverKey.Authorize] for one use of a key.
func Authorize(key crypto.Signer, nonceTPM []byte, cpHash [32]byte, policyRef []byte) (*Authorization, error) {
	k, err := NewApproverKey(key)
	if err != nil {
		return nil, err
	}
	return k.Authorize(nonceTPM, cpHash, policyRef)
}

// Authorize signs an authorization. The caller has decided on the action;
// cpHash is from [SignCommandHash].
func (k *ApproverKey) Authorize(nonceTPM []byte, cpHash [32]byte, policyRef []byte) (*Authorization, error) {
	hash, err := authorizationHash(nonceTPM, cpHash, policyRef)
	if err != nil {
		return nil, err
	}
	return k.sign(hash, AuthorizationSeconds)
}

func (k *ApproverKey) sign(hash [32]byte, expiration int32) (*Authorization, error) {
	der, err := k.key.Sign(rand.Reader, hash[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing with the approver key: %w", err)
	}
	if !ecdsa.VerifyASN1(k.pub, hash[:], der) {
		return nil, errors.New("signing with the approver key: its signature does not verify")
	}
	sig, err := ecdsaSignature(der)
	if err != nil {
		return nil, fmt.Errorf("approver key: %w", err)
	}
	return &Authorization{Approver: k.id, Expiration: expiration, Signature: sig}, nil
}

// VerifyAuthorization returns nil if the approver with this TPMT_PUBLIC gave the
// authorization, for this session's nonce and this command.
func VerifyAuthorization(approver []byte, a *Authorization, nonceTPM []byte, cpHash [32]byte, policyRef []byte) error {
	key, err := PublicKey(approver)
	if err != nil {
		return err
	}
	return VerifyAuthorizationBy(key, a, nonceTPM, cpHash, policyRef)
}

// VerifyAuthorizationBy is [VerifyAuthorization] for a key from [PublicKey].
func VerifyAuthorizationBy(key any, a *Authorization, nonceTPM []byte, cpHash [32]byte, policyRef []byte) error {
	if a.Expiration != AuthorizationSeconds {
		return fmt.Errorf("its expiration is %d s, %d is expected", a.Expiration, AuthorizationSeconds)
	}
	hash, err := authorizationHash(nonceTPM, cpHash, policyRef)
	if err != nil {
		return err
	}
	return verifyECDSA(key, hash, a.Signature)
}

// MaxReserve bounds how long a consent serves, in seconds from the start of the
// session that it was given in.
const MaxReserve = 900

// reserveHash is aHash of the TPM2_PolicySigned that makes a consent: with an
// empty cpHash (any command) and a negative expiration, on which the TPM gives a ticket
// (TPM2_PolicyTicket) that serves until then, and not after a reset.
func reserveHash(nonceTPM []byte, expiration int32, policyRef []byte) ([32]byte, error) {
	if len(nonceTPM) != NonceTPMSize {
		return [32]byte{}, fmt.Errorf("nonceTPM has %d bytes, %d are expected", len(nonceTPM), NonceTPMSize)
	}
	if expiration >= 0 || expiration < -MaxReserve {
		return [32]byte{}, fmt.Errorf("the consent's expiration is %d s, -%d to -1 is expected", expiration, MaxReserve)
	}
	b := binary.BigEndian.AppendUint32(bytes.Clone(nonceTPM), uint32(expiration))
	return sha256.Sum256(append(b, ReserveRef(policyRef)...)), nil
}

// Consent signs a consent to what keys in reserve mode sign in so many
// seconds. The caller has decided that the agent may have it.
func (k *ApproverKey) Consent(nonceTPM []byte, seconds int, policyRef []byte) (*Authorization, error) {
	expiration := -int32(max(0, min(seconds, MaxReserve+1)))
	hash, err := reserveHash(nonceTPM, expiration, policyRef)
	if err != nil {
		return nil, err
	}
	return k.sign(hash, expiration)
}

// VerifyConsent returns nil if the approver with this key, from [PublicKey],
// consented in the session with this nonce.
func VerifyConsent(key any, a *Authorization, nonceTPM, policyRef []byte) error {
	hash, err := reserveHash(nonceTPM, a.Expiration, policyRef)
	if err != nil {
		return err
	}
	return verifyECDSA(key, hash, a.Signature)
}
