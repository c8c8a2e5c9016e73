package attest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// EpochIndex is the NV index of a host's epoch counter, in the range that the
// TCG's registry leaves to owners.
const EpochIndex = 0x018e9c01

// MaxEpoch bounds epochs.
const MaxEpoch = math.MaxInt64

// epochSize is the size of a TPM's counter, in bytes.
const epochSize = 8

// EpochDemand is what the issuer asks of a host's epoch counter.
type EpochDemand struct {
	AtLeast uint64 `json:"at_least"`
}

// EpochPublic is the definition of the epoch counter: the owner increments it,
// anybody reads it, and a TPM lets no counter go back, not even one that was
// undefined and made again (Part 1, section 37.2.4). With written, it is that
// after the first increment, whose Name stands in policies.
func EpochPublic(written bool) *tpm2.TPMSNVPublic {
	return &tpm2.TPMSNVPublic{
		NVIndex: EpochIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: epochSize,
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTCounter, Written: written},
	}
}

// EpochName is the Name of the epoch counter after its first increment. It is
// the same on every host, since nothing of the definition differs.
func EpochName() []byte {
	n, err := tpm2.NVName(EpochPublic(true))
	if err != nil {
		panic(err) // a constant
	}
	return n.Buffer
}

// EpochOperand is the epoch as TPM2_PolicyNV compares it with the counter.
func EpochOperand(epoch uint64) []byte { return binary.BigEndian.AppendUint64(nil, epoch) }

// EpochPolicyRef is the policyRef of approvals that end with an epoch. It
// differs from that of approvals without one, so that none of those, which
// would never end, serves for a key that asks for epochs.
func EpochPolicyRef(policyRef []byte) []byte {
	sum := sha256.Sum256(append([]byte("inkan epoch policy v1\x00"), policyRef...))
	return sum[:]
}

// EpochKeyPolicy is [KeyPolicy] for keys that work under approvals with an epoch alone.
func EpochKeyPolicy(mode string, policyKey, policyRef []byte) ([]byte, error) {
	if !slices.Contains(Modes, mode) {
		return KeyPolicy(mode, policyKey, policyRef) // says what would be right
	}
	return AuthPolicy(policyKey, EpochPolicyRef(modeRef(mode, policyRef)))
}

// epochStep extends a policy digest with TPM2_PolicyNV: the counter is at most
// epoch (Part 3, section 23.9).
func epochStep(digest []byte, epoch uint64) []byte {
	args := sha256.Sum256(bytes.Join([][]byte{EpochOperand(epoch), {0, 0}, binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMEOUnsignedLE))}, nil))
	return extend(digest, binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMCCPolicyNV)), args[:], EpochName())
}

// EpochQualifyingData is what TPM2_NV_Certify of the epoch counter must carry:
// the exchange and the TLS channel.
func EpochQualifyingData(session, nonce, binding []byte) [32]byte {
	return sha256.Sum256(bytes.Join([][]byte{[]byte("inkan-epoch"), session, nonce, binding}, nil))
}

// epoch applies N1 to N3 and returns the counter's value; 0 if none was asked for.
func (a *appraisal) epoch(ev *Evidence) (uint64, error) {
	c := a.x.Challenge
	if (c.Epoch != nil) != (ev.Epoch != nil) {
		return 0, refuse("N1", "the epoch counter's certification is there: %v, asked for: %v", ev.Epoch != nil, c.Epoch != nil)
	}
	if c.Epoch == nil {
		return 0, nil
	}
	s, err := a.attested("N1", *ev.Epoch)
	if err != nil {
		return 0, err
	}
	if s.Type != tpm2.TPMSTAttestNV {
		return 0, refuse("N1", "the structure's type is %#x, a certification of an NV index is expected", uint16(s.Type))
	}
	info, err := s.Attested.NV()
	if err != nil || info == nil {
		return 0, refuse("N1", "the structure has no NV index in it")
	}
	want := EpochQualifyingData(c.Session, c.Nonce, a.x.Binding)
	if !bytes.Equal(s.ExtraData.Buffer, want[:]) || !bytes.Equal(s.QualifiedSigner.Buffer, a.signer) {
		return 0, refuse("N1", "the epoch counter's certification does not carry this exchange and TLS channel, or is not the AK's")
	}
	if !bytes.Equal(info.IndexName.Buffer, EpochName()) {
		return 0, refuse("N2", "the epoch counter has the Name %x, %x is expected: a counter of the one definition", info.IndexName.Buffer, EpochName())
	}
	if info.Offset != 0 || len(info.NVContents.Buffer) != epochSize {
		return 0, refuse("N2", "the epoch counter's certification is of %d bytes at %d, 8 at 0 are expected", len(info.NVContents.Buffer), info.Offset)
	}
	n := binary.BigEndian.Uint64(info.NVContents.Buffer)
	switch {
	case n > MaxEpoch:
		return 0, refuse("N3", "the epoch is %d, at most %d is allowed", n, int64(MaxEpoch))
	case n < c.Epoch.AtLeast:
		return 0, refuse("N3", "the epoch is %d, at least %d is demanded", n, c.Epoch.AtLeast)
	case n < a.x.Epoch:
		return 0, refuse("N3", "the epoch went back from %d to %d", a.x.Epoch, n)
	}
	return n, nil
}

// UsableWith returns the approvals that serve for keys of a mode: with epochs,
// those that have not ended at this epoch, else those without one.
func UsableWith(list []ApprovedPolicy, mode string, epochs bool, epoch uint64) []ApprovedPolicy {
	var out []ApprovedPolicy
	for _, p := range OfMode(list, mode) {
		if epochs && p.Epoch >= max(epoch, 1) || !epochs && p.Epoch == 0 {
			out = append(out, p)
		}
	}
	return out
}

func validEpoch(epoch uint64) error {
	if epoch > MaxEpoch {
		return fmt.Errorf("epoch %d: at most %d is allowed", epoch, int64(MaxEpoch))
	}
	return nil
}
