package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"

	"github.com/google/go-tpm/tpm2"
)

// Testimony is what a TPM says of the commands that it audits (Part 1, section
// 37): here every TPM2_Sign, by whatever key, and every change of what is audited.
type Testimony struct {
	// Counter grows with the first command after each testimony, reset of the
	// TPM, or change of the audit's hash, and never goes back.
	Counter uint64
	// Digest is the chain over the commands since then ([AuditLink]); empty if there was none.
	Digest []byte
	Clock  Clock
	Extra  []byte // qualifying data
}

// TestimonyQualifyingData is what a testimony in an exchange with the issuer
// must carry: the exchange and the TLS channel.
func TestimonyQualifyingData(session, nonce, binding []byte) [32]byte {
	return sha256.Sum256(bytes.Join([][]byte{[]byte("inkan-audit"), session, nonce, binding}, nil))
}

// ReadTestimony verifies a testimony by the AK with this public area. Its
// error is a *Refusal: C1, or C2 if not exactly TPM2_Sign is audited, with SHA-256.
func ReadTestimony(ak []byte, in Attested) (*Testimony, error) {
	name, err := CheckAK(ak)
	if err != nil {
		return nil, err
	}
	key, err := PublicKey(ak)
	if err != nil {
		return nil, refuse("C1", "%v", err)
	}
	a := &appraisal{ak: key, signer: qualifiedName(endorsementHandle, name)}
	s, err := a.attested("C1", in)
	if err != nil {
		return nil, err
	}
	if s.Type != tpm2.TPMSTAttestCommandAudit {
		return nil, refuse("C1", "the structure's type is %#x, a command audit is expected", uint16(s.Type))
	}
	info, err := s.Attested.CommandAudit()
	if err != nil || info == nil {
		return nil, refuse("C1", "the structure has no command audit in it")
	}
	if !bytes.Equal(s.QualifiedSigner.Buffer, a.signer) {
		return nil, refuse("C1", "it was signed by a key that does not stand where the AK stands")
	}
	if want := auditedCommands(); info.DigestAlg != tpm2.TPMAlgSHA256 || !bytes.Equal(info.CommandDigest.Buffer, want[:]) {
		return nil, refuse("C2", "the TPM does not audit TPM2_Sign alone with SHA-256: the audit was switched off, or changed")
	}
	if n := len(info.AuditDigest.Buffer); n != 0 && n != sha256.Size {
		return nil, refuse("C1", "its digest has %d bytes", n)
	}
	return &Testimony{Counter: info.AuditCounter, Digest: info.AuditDigest.Buffer, Extra: s.ExtraData.Buffer,
		Clock: Clock{Milliseconds: s.ClockInfo.Clock, Resets: s.ClockInfo.ResetCount, Restarts: s.ClockInfo.RestartCount}}, nil
}

// auditedCommands is commandDigest where TPM2_Sign is audited. The TPM audits
// TPM2_SetCommandCodeAuditStatus always (Part 3, section 21.2).
func auditedCommands() [32]byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMCCSetCommandCodeAuditStatus))
	return sha256.Sum256(binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMCCSign)))
}

// AuditLink extends the chain with a TPM2_Sign: a SHA-256 digest, signed with
// ECDSA by the key of a Name, and the TPMT_SIGNATURE that the TPM answered with
// (Part 1, sections 16.7, 16.8 and 37). The chain begins with zeros.
func AuditLink(chain [32]byte, keyName []byte, digest [32]byte, signature []byte) [32]byte {
	cp := SignCommandHash(keyName, digest)
	b := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRCSuccess))
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMCCSign))
	rp := sha256.Sum256(append(b, signature...))
	return sha256.Sum256(bytes.Join([][]byte{chain[:], cp[:], rp[:]}, nil))
}

// testimony applies C1 and C2 to what is in the evidence, if it is there.
func (a *appraisal) testimony(ev *Evidence) (*Testimony, error) {
	switch {
	case ev.Audit == nil && a.x.Audit != nil:
		return nil, refuse("C1", "the TPM's testimony about its signatures is missing, and this device gave one before: if its command audit is to be off, an operator says so with inkan issuer device reset-audit")
	case ev.Audit == nil:
		return nil, nil
	}
	t, err := ReadTestimony(a.x.AK, *ev.Audit)
	if err != nil {
		return nil, err
	}
	c := a.x.Challenge
	if want := TestimonyQualifyingData(c.Session, c.Nonce, a.x.Binding); !bytes.Equal(t.Extra, want[:]) {
		return nil, refuse("C1", "the TPM's testimony does not carry this exchange and TLS channel")
	}
	if a.x.Audit != nil && t.Counter < *a.x.Audit {
		return nil, refuse("C2", "the TPM's audit counter went back from %d to %d", *a.x.Audit, t.Counter)
	}
	return t, nil
}
