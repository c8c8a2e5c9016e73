package tpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// policySession is a session of the TPM that the policies of keys are
// satisfied in. The TPM resets it at each use, so one serves all keys.
type policySession struct{ tpm2.Session }

// authority is an approval of the policy key that this TPM has verified. The
// ticket outlives a reset of the TPM.
type authority struct {
	name   tpm2.TPM2BName // of the policy key
	ticket tpm2.TPMTTKVerified
}

func (d *Device) policySession() (*policySession, error) {
	if d.session != nil {
		return d.session, nil
	}
	s, _, err := tpm2.PolicySession(d.link, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		return nil, err
	}
	d.session = &policySession{s}
	return d.session, nil
}

// dropSession flushes a session whose policy was begun and not used.
func (d *Device) dropSession() {
	if d.session != nil {
		h := d.session.Handle()
		d.session = nil
		d.flush(h)
	}
}

// satisfy brings the session into the state that the key's authPolicy demands:
// PolicyPCR with an approved policy's values, PolicyNV if it ends with an epoch, then PolicyAuthorize. The policy
// that was right last time is tried first, so PCRs are read only after a change.
func (k *Key) satisfy(u *use) (tpm2.Session, error) {
	d, p := k.device, u.policies
	if len(u.local) == 0 {
		return nil, fmt.Errorf("%w: enrol the host, or ask the operator of the issuer to approve its state", ErrNoPolicy)
	}
	approved := find(u.local, k.last)
	for read := approved == nil; ; read = true {
		if read {
			now, err := d.state(u.local)
			if err != nil {
				return nil, err
			}
			if approved = matching(u.local, &now); approved == nil {
				return nil, now.none(u.local)
			}
		}
		s, err := d.authorize(p, approved)
		if err == nil {
			k.last = approved.Name
			return s, nil
		}
		d.dropSession()
		if read || !errors.Is(err, tpm2.TPMRCValue) && !errors.Is(err, tpm2.TPMRCPCRChanged) && !errors.Is(err, tpm2.TPMRCPolicy) {
			return nil, err
		}
	}
}

func find(list []attest.ApprovedPolicy, name string) *attest.ApprovedPolicy {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

func matching(list []attest.ApprovedPolicy, now *current) *attest.ApprovedPolicy {
	for i := range list {
		if now.fits(&list[i]) {
			return &list[i]
		}
	}
	return nil
}

// prepared is what does not change between uses of an approved policy.
type prepared struct {
	digest    []byte
	ref       []byte // policyRef of the approval
	pcrDigest []byte
	selection tpm2.TPMLPCRSelection
	authority *authority

	// The commands for a session, as they go to the TPM: they are the same
	// for each signature, and making them takes as long as sending them.
	session  tpm2.TPMHandle
	commands [][]byte
}

// recorder keeps what is sent through it.
type recorder struct {
	*link
	sent [][]byte
}

func (r *recorder) Send(command []byte) ([]byte, error) {
	r.sent = append(r.sent, bytes.Clone(command))
	return r.link.Send(command)
}

// replay sends a command that was recorded; only its response code counts.
func (l *link) replay(command []byte) error {
	res, err := l.Send(command)
	if err != nil {
		return err
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(res[6:])); rc != tpm2.TPMRCSuccess {
		return rc
	}
	return nil
}

// prepare computes it once, and has the TPM verify the approval.
func (d *Device) prepare(p *Policies, approved *attest.ApprovedPolicy) (*prepared, error) {
	cache := approved.Name + "\x00" + string(approved.Signature) + string(p.PolicyKey) + string(p.Ref)
	if x := d.prepared[cache]; x != nil {
		return x, nil
	}
	digest, err := attest.PolicyDigest(approved, p.Ref)
	if err != nil {
		return nil, err
	}
	selected, err := attest.SelectionOf(approved.PCRs)
	if err != nil {
		return nil, err
	}
	selection, err := attest.Selection(selected)
	if err != nil {
		return nil, err
	}
	authority, err := d.verified(p, approved, digest)
	if err != nil {
		return nil, err
	}
	if len(d.prepared) > 64 {
		clear(d.prepared)
	}
	x := &prepared{digest: digest, ref: approved.PolicyRef(p.Ref), pcrDigest: attest.PCRDigest(approved.PCRs), selection: *selection, authority: authority}
	d.prepared[cache] = x
	return x, nil
}

func (d *Device) authorize(p *Policies, approved *attest.ApprovedPolicy) (tpm2.Session, error) {
	x, err := d.prepare(p, approved)
	if err != nil {
		return nil, err
	}
	s, err := d.policySession()
	if err != nil {
		return nil, err
	}
	if x.commands != nil && x.session == s.Handle() {
		for _, c := range x.commands {
			if err := d.link.replay(c); err != nil {
				if approved.Epoch > 0 {
					err = epochGone(err)
				}
				return nil, err
			}
		}
		return s.Session, nil
	}
	to := &recorder{link: d.link}
	if _, err := (tpm2.PolicyPCR{
		PolicySession: s.Handle(),
		PcrDigest:     tpm2.TPM2BDigest{Buffer: x.pcrDigest},
		Pcrs:          x.selection,
	}).Execute(to); err != nil {
		return nil, err
	}
	if approved.Epoch > 0 {
		if err := policyEpoch(to, approved.Epoch, s.Handle()); err != nil {
			return nil, err
		}
	}
	if _, err := (tpm2.PolicyAuthorize{
		PolicySession:  s.Handle(),
		ApprovedPolicy: tpm2.TPM2BDigest{Buffer: x.digest},
		PolicyRef:      tpm2.TPM2BDigest{Buffer: x.ref},
		KeySign:        x.authority.name,
		CheckTicket:    x.authority.ticket,
	}).Execute(to); err != nil {
		return nil, err
	}
	x.session, x.commands = s.Handle(), to.sent
	return s.Session, nil
}

// verified has the TPM verify the policy key's signature.
func (d *Device) verified(p *Policies, approved *attest.ApprovedPolicy, digest []byte) (*authority, error) {
	if err := attest.VerifyPolicy(p.PolicyKey, p.Ref, approved); err != nil {
		return nil, err
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](p.PolicyKey)
	if err != nil {
		return nil, err
	}
	signature, err := tpm2.Unmarshal[tpm2.TPMTSignature](approved.Signature)
	if err != nil {
		return nil, err
	}
	if err := d.makeRoom(maxLoaded); err != nil {
		return nil, err
	}
	// In the owner hierarchy, since PolicyAuthorize refuses a ticket of the null hierarchy.
	key, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*public), Hierarchy: tpm2.TPMRHOwner}.Execute(d.link)
	if err != nil {
		return nil, err
	}
	defer d.flush(key.ObjectHandle)
	approval := attest.Approval(digest, approved.PolicyRef(p.Ref))
	rsp, err := tpm2.VerifySignature{
		KeyHandle: tpm2.NamedHandle{Handle: key.ObjectHandle, Name: key.Name},
		Digest:    tpm2.TPM2BDigest{Buffer: approval[:]},
		Signature: *signature,
	}.Execute(d.link)
	if err != nil {
		return nil, err
	}
	return &authority{name: key.Name, ticket: rsp.Validation}, nil
}
