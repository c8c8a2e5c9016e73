package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// Journal keeps what the TPM was asked to sign, in the order in which it was
// asked: with it the TPM's own testimony about its signatures can be recomputed.
type Journal interface {
	// Begin is called before each TPM2_Sign, and done after it, with the
	// TPMT_SIGNATURE or with why there is none. message is what was hashed, nil
	// where that is not known. An error of either ends the signature.
	Begin(keyName []byte, digest [32]byte, message []byte) (done func(signature []byte, failed error) error, err error)
	// Testify keeps the testimony that take asks the TPM for. Nobody asks for a
	// signature meanwhile.
	Testify(ak []byte, take func() (attest.Attested, error)) (attest.Attested, error)
}

// ErrNoAudit: the TPM has no command audit. Many discrete TPMs have none.
var ErrNoAudit = errors.New("the TPM has no command audit (TPM2_SetCommandCodeAuditStatus, TPM2_GetCommandAuditDigest)")

// StartAudit has the TPM audit TPM2_Sign, if it does not yet, and hands
// signatures to the journal from now on. It fails with ErrNoAudit where the
// TPM cannot; then nothing has changed.
func (d *Device) StartAudit(j Journal) error {
	err := d.do("starting the command audit", func() error {
		audited, err := d.audited()
		if err != nil {
			return err
		}
		if !slices.Contains(audited, tpm2.TPMCCSign) {
			// The hash first: the TPM takes one change at a time.
			for _, c := range []struct {
				hash tpm2.TPMAlgID
				on   []tpm2.TPMCC
			}{{tpm2.TPMAlgSHA256, nil}, {tpm2.TPMAlgNull, []tpm2.TPMCC{tpm2.TPMCCSign}}} {
				if err := d.setAudit(c.hash, c.on); err != nil {
					return explainHierarchy("starting the command audit", err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.journal = j
	d.mu.Unlock()
	return nil
}

// audited lists the commands that the TPM audits.
func (d *Device) audited() (list []tpm2.TPMCC, err error) {
	commands := make(map[tpm2.TPMCC]bool)
	if err := d.capability(tpm2.TPMCapCommands, 0, func(u *tpm2.TPMUCapabilities) (next uint32, err error) {
		l, err := u.Command()
		if err != nil {
			return 0, err
		}
		for _, c := range l.CommandAttributes {
			commands[tpm2.TPMCC(c.CommandIndex)], next = true, uint32(c.CommandIndex)+1
		}
		return next, nil
	}); err != nil {
		return nil, err
	}
	if !commands[tpm2.TPMCCSetCommandCodeAuditStatus] || !commands[tpm2.TPMCCGetCommandAuditDigest] {
		return nil, answered{ErrNoAudit}
	}
	err = d.capability(tpm2.TPMCapAuditCommands, 0, func(u *tpm2.TPMUCapabilities) (next uint32, err error) {
		l, err := u.AuditCommands()
		if err != nil {
			return 0, err
		}
		for _, c := range l.CommandCodes {
			list, next = append(list, c), uint32(c)+1
		}
		return next, nil
	})
	return list, err
}

// Auditing says whether the TPM audits TPM2_Sign now, for whomever.
func (d *Device) Auditing() (on bool, err error) {
	err = d.do("asking what the TPM audits", func() error {
		list, err := d.audited()
		on = slices.Contains(list, tpm2.TPMCCSign)
		return err
	})
	if errors.Is(err, ErrNoAudit) {
		return false, nil
	}
	return on, err
}

// Audited says whether signatures go to a journal.
func (d *Device) Audited() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.journal != nil
}

// Testify has the AK sign the chain over the TPM2_Sign commands since the last
// time, together with qualifying data, and begins a new one. It goes to the journal too.
func (d *Device) Testify(qualifying []byte) (out attest.Attested, err error) {
	err = d.do("asking the TPM for the digest of its signatures", func() error {
		if d.journal == nil {
			return answered{ErrNoAudit}
		}
		return d.withAK(func(ak tpm2.NamedHandle, public []byte) error {
			out, err = d.journal.Testify(public, func() (attest.Attested, error) { return d.auditDigest(ak.Handle, qualifying) })
			return explainHierarchy("asking the TPM for the digest of its signatures", err)
		})
	})
	return out, err
}

// journaled is TPM2_Sign with the journal's two entries around it.
func (k *Key) journaled(digest, message []byte, sign func() (*tpm2.TPMTSignature, error)) (*tpm2.TPMTSignature, error) {
	j := k.device.journal
	if j == nil {
		return sign()
	}
	done, err := j.Begin(k.name, [32]byte(digest), message)
	if err != nil {
		return nil, answered{fmt.Errorf("the journal of signatures: %w", err)}
	}
	sig, err := sign()
	var rc tpm2.TPMRC
	switch {
	case err == nil:
		if err := done(tpm2.Marshal(*sig), nil); err != nil {
			return nil, answered{fmt.Errorf("the journal of signatures: %w", err)}
		}
	case errors.As(err, &rc): // it answered, so it did not sign
		if again := done(nil, err); again != nil {
			return nil, answered{fmt.Errorf("the journal of signatures: %w", again)}
		}
	default: // nobody knows
		if again := done(nil, nil); again != nil {
			return nil, answered{fmt.Errorf("the journal of signatures: %w", again)}
		}
	}
	return sig, err
}

// The two commands that go-tpm does not have, by hand: a header, handles, a
// password session for each authorization, parameters (Part 1, section 18).

// passwordSession is an authorization by a value (Part 2, section 10.13.2).
func passwordSession(value []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRSPW))
	b = append(b, 0, 0, 0) // no nonce, no attributes
	b = binary.BigEndian.AppendUint16(b, uint16(len(value)))
	return append(b, value...)
}

// command sends one with password sessions and returns the parameters of its answer.
func (d *Device) command(code tpm2.TPMCC, handles []tpm2.TPMHandle, auths [][]byte, parameters []byte) ([]byte, error) {
	b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTSessions))
	b = binary.BigEndian.AppendUint32(b, 0) // the size, below
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	for _, h := range handles {
		b = binary.BigEndian.AppendUint32(b, uint32(h))
	}
	var area []byte
	for _, a := range auths {
		area = append(area, passwordSession(a)...)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(area)))
	b = append(append(b, area...), parameters...)
	binary.BigEndian.PutUint32(b[2:], uint32(len(b)))
	rsp, err := d.link.Send(b)
	if err != nil {
		return nil, err
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:])); rc != tpm2.TPMRCSuccess {
		return nil, rc
	}
	if len(rsp) < 14 {
		return nil, errors.New("the TPM's answer is cut short")
	}
	size := binary.BigEndian.Uint32(rsp[10:])
	if uint64(size) > uint64(len(rsp)-14) {
		return nil, errors.New("the TPM's answer is cut short")
	}
	return rsp[14 : 14+size], nil
}

// setAudit is TPM2_SetCommandCodeAuditStatus (Part 3, section 21.2).
func (d *Device) setAudit(hash tpm2.TPMAlgID, on []tpm2.TPMCC) error {
	p := binary.BigEndian.AppendUint16(nil, uint16(hash))
	p = binary.BigEndian.AppendUint32(p, uint32(len(on)))
	for _, c := range on {
		p = binary.BigEndian.AppendUint32(p, uint32(c))
	}
	p = binary.BigEndian.AppendUint32(p, 0) // nothing is switched off
	_, err := d.command(tpm2.TPMCCSetCommandCodeAuditStatus, []tpm2.TPMHandle{tpm2.TPMRHOwner}, [][]byte{d.options.OwnerAuth}, p)
	return err
}

// auditDigest is TPM2_GetCommandAuditDigest (Part 3, section 18.6).
func (d *Device) auditDigest(ak tpm2.TPMHandle, qualifying []byte) (out attest.Attested, err error) {
	p := binary.BigEndian.AppendUint16(nil, uint16(len(qualifying)))
	p = append(p, qualifying...)
	p = binary.BigEndian.AppendUint16(p, uint16(tpm2.TPMAlgNull)) // the AK has its own scheme
	rsp, err := d.command(tpm2.TPMCCGetCommandAuditDigest, []tpm2.TPMHandle{tpm2.TPMRHEndorsement, ak}, [][]byte{d.options.EndorsementAuth, nil}, p)
	if err != nil {
		return out, err
	}
	if len(rsp) < 2 || len(rsp)-2 < int(binary.BigEndian.Uint16(rsp)) {
		return out, errors.New("the TPM's answer is cut short")
	}
	n := int(binary.BigEndian.Uint16(rsp))
	out.Attest, out.Signature = rsp[2:2+n], rsp[2+n:]
	return out, nil
}
