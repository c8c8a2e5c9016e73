package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"inkan/attest"
)

// maxEpochSteps is by how much the epoch counter is incremented at a time.
// Each step wears the TPM's memory a little.
const maxEpochSteps = 64

// EpochError says that the approvals which fit the host's state have ended.
type EpochError struct {
	Current uint64 // of the host
	Last    uint64 // of the approvals
}

func (e *EpochError) Error() string {
	return fmt.Sprintf("the host's epoch is %d, and the approvals of its state ended with %d: ask the operator of the issuer to approve it for this epoch", e.Current, e.Last)
}

// Epoch brings the epoch counter to at least n, makes it if there is none, and
// returns its value. It cannot be taken back.
func (d *Device) Epoch(n uint64) (value uint64, err error) {
	err = d.do("incrementing the epoch counter", func() error {
		owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(d.options.OwnerAuth)}
		public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(attest.EpochIndex)}.Execute(d.link)
		written := false
		switch {
		case errors.Is(err, tpm2.TPMRCHandle):
			if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(*attest.EpochPublic(false))}).Execute(d.link); err != nil {
				return explainHierarchy("making the epoch counter", err)
			}
		case err != nil:
			return err
		default:
			p, err := public.NVPublic.Contents()
			if err != nil {
				return err
			}
			written = bool(p.Attributes.Written)
			if string(tpm2.Marshal(*p)) != string(tpm2.Marshal(*attest.EpochPublic(written))) {
				return answered{fmt.Errorf("the NV index %#x is there and is no epoch counter: it belongs to another program; free it (tpm2_nvundefine) or leave epochs off", uint32(attest.EpochIndex))}
			}
		}
		if written {
			if value, err = d.readEpoch(); err != nil {
				return err
			}
			if n > value && n-value > maxEpochSteps {
				return answered{fmt.Errorf("epoch %d is demanded, the counter has %d: at most %d steps at a time", n, value, maxEpochSteps)}
			}
		}
		for !written || value < n {
			name := tpm2.TPM2BName{Buffer: attest.EpochName()}
			if !written {
				first, err := tpm2.NVName(attest.EpochPublic(false))
				if err != nil {
					return err
				}
				name = *first
			}
			if _, err := (tpm2.NVIncrement{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: attest.EpochIndex, Name: name}}).Execute(d.link); err != nil {
				return explainHierarchy("incrementing the epoch counter", err)
			}
			first := !written
			if written = true; first {
				// A new counter begins where the TPM's highest ended.
				if value, err = d.readEpoch(); err != nil {
					return err
				}
				if n > value && n-value > maxEpochSteps {
					return answered{fmt.Errorf("epoch %d is demanded, the new counter has %d: at most %d steps at a time", n, value, maxEpochSteps)}
				}
				continue
			}
			value++
		}
		return nil
	})
	return value, err
}

// epochHandle is the counter with its own, empty, authorization.
func epochHandle() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: attest.EpochIndex, Name: tpm2.TPM2BName{Buffer: attest.EpochName()}, Auth: tpm2.PasswordAuth(nil)}
}

func (d *Device) readEpoch() (uint64, error) {
	h := epochHandle()
	rsp, err := tpm2.NVRead{AuthHandle: h, NVIndex: tpm2.NamedHandle{Handle: h.Handle, Name: h.Name}, Size: 8}.Execute(d.link)
	if err != nil {
		return 0, err
	}
	if len(rsp.Data.Buffer) != 8 {
		return 0, errors.New("the epoch counter does not have eight bytes")
	}
	return binary.BigEndian.Uint64(rsp.Data.Buffer), nil
}

// CertifyEpoch has the AK sign the epoch counter's value together with qualifying data.
func (d *Device) CertifyEpoch(qualifying []byte) (out attest.Attested, err error) {
	err = d.do("certifying the epoch counter", func() error {
		return d.withAK(func(ak tpm2.NamedHandle, _ []byte) error {
			h := epochHandle()
			rsp, err := tpm2.NVCertify{SignHandle: empty(ak), AuthHandle: h, NVIndex: tpm2.NamedHandle{Handle: h.Handle, Name: h.Name},
				QualifyingData: tpm2.TPM2BData{Buffer: qualifying}, InScheme: akScheme, Size: 8}.Execute(d.link)
			if err != nil {
				return err
			}
			out = attested(rsp.CertifyInfo, rsp.Signature)
			return nil
		})
	})
	return out, err
}

// ErrNoEpoch: the epoch counter that approvals name is not in the TPM.
var ErrNoEpoch = errors.New("the host's epoch counter is gone: enrol the host anew")

// policyEpoch is TPM2_PolicyNV: the counter is at most epoch, else TPM_RC_POLICY.
func policyEpoch(to transport.TPM, epoch uint64, session tpm2.TPMHandle) error {
	h := epochHandle()
	_, err := tpm2.PolicyNV{AuthHandle: h, NVIndex: tpm2.NamedHandle{Handle: h.Handle, Name: h.Name}, PolicySession: session,
		OperandB: tpm2.TPM2BOperand{Buffer: attest.EpochOperand(epoch)}, Operation: tpm2.TPMEOUnsignedLE}.Execute(to)
	return epochGone(err)
}

// epochGone tells the counter that is not there from a handle that was lost.
func epochGone(err error) error {
	if errors.Is(err, tpm2.TPMRCHandle) || errors.Is(err, tpm2.TPMRCNVUninitialized) {
		return answered{ErrNoEpoch}
	}
	return err
}

// current is the state that approvals are held against.
type current struct {
	pcrs  []attest.PCRValue
	epoch uint64
}

// state reads what the approvals, which are of one kind, depend on.
func (d *Device) state(list []attest.ApprovedPolicy) (c current, err error) {
	if c.pcrs, err = d.readPCRs(attest.Union(list)); err != nil || list[0].Epoch == 0 {
		return c, err
	}
	c.epoch, err = d.readEpoch()
	return c, epochGone(err)
}

// fits says whether an approval is for this state, and has not ended.
func (c *current) fits(p *attest.ApprovedPolicy) bool {
	return attest.Matches(*p, c.pcrs) && (p.Epoch == 0 || c.epoch <= p.Epoch)
}

// none says why no approval of the list fits.
func (c *current) none(list []attest.ApprovedPolicy) error {
	last := uint64(0)
	for i := range list {
		if attest.Matches(list[i], c.pcrs) {
			last = max(last, list[i].Epoch)
		}
	}
	if last > 0 {
		return &EpochError{c.epoch, last}
	}
	return &PCRError{Current: c.pcrs, Policies: list}
}
