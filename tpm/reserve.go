package tpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// ErrNoConsent: a key in reserve mode was to sign, and no approver's consent is in force.
var ErrNoConsent = errors.New("no approver's consent to the reserve is in force")

// consent is what the TPM gave for an approver's consent: a ticket, which it
// takes in place of the approver's signature until it expires or the TPM is reset.
type consent struct {
	policy    *attest.ApprovedPolicy // that demands it
	authority []byte                 // the Name of the approver's key
	timeout   []byte
	ticket    []byte // TPMT_TK_AUTH
	until     time.Time
}

// Reserve asks approvers for a consent to what the key, which is in reserve
// mode, signs from now on, and returns until when it serves. a is called with the nonce of a
// session, as for a signature; what it hands to accept are consents.
func (k *Key) Reserve(a Authorizer) (until time.Time, err error) {
	u := k.use.Load()
	switch {
	case u.mode != attest.ModeReserve:
		return until, fmt.Errorf("the key is in %s mode, and takes no consent", u.mode)
	case len(u.candidates) == 0:
		return until, fmt.Errorf("%w for keys in reserve mode: ask the operator of the issuer for one (inkan issuer policy approve --reserve)", ErrNoPolicy)
	}
	p, err := k.device.borrow()
	if err != nil {
		return until, err
	}
	defer k.device.giveBack(p)
	p.spoiled = true // it is used for this alone
	nonce := p.session.NonceTPM().Buffer
	var from candidate
	var given *attest.Authorization
	err = a.Authorize(bytes.Clone(nonce), func(approver string, expiration int32, signature []byte) (bool, error) {
		i := slices.IndexFunc(u.candidates, func(c candidate) bool { return c.ids[0] == approver })
		if i < 0 {
			return false, fmt.Errorf("approver %.80q is not one that the policy key approved for the reserve", approver)
		}
		x := &attest.Authorization{Approver: approver, Expiration: expiration, Signature: signature}
		if err := attest.VerifyConsent(u.candidates[i].keys[0], x, nonce, u.policies.Ref); err != nil {
			return false, fmt.Errorf("consent of approver %s: %w", approver, err)
		}
		from, given = u.candidates[i], x
		return true, nil
	})
	if err != nil {
		return until, err
	}
	if given == nil {
		return until, fmt.Errorf("taking a consent: %w", ErrNotAuthorized)
	}
	err = k.device.do("taking a consent", func() error {
		if p.epoch != k.device.epoch {
			return errStale
		}
		c, err := k.device.take(p, u, from.policy, given)
		if err == nil {
			k.consent, until = c, c.until
		}
		return err
	})
	return until, err
}

// take has the TPM verify a consent and give its ticket.
func (d *Device) take(p *parked, u *use, policy *attest.ApprovedPolicy, given *attest.Authorization) (*consent, error) {
	signature, err := tpm2.Unmarshal[tpm2.TPMTSignature](given.Signature)
	if err != nil {
		return nil, answered{err}
	}
	approver, err := d.external(policy.Approvers[0])
	if err != nil {
		return nil, err
	}
	rsp, err := tpm2.PolicySigned{
		AuthObject: *approver, PolicySession: p.session.Handle(), NonceTPM: p.session.NonceTPM(),
		PolicyRef: tpm2.TPM2BNonce{Buffer: attest.ReserveRef(u.policies.Ref)}, Expiration: given.Expiration, Auth: *signature,
	}.Execute(d.link)
	if err != nil {
		return nil, answer(err)
	}
	if rsp.PolicyTicket.Tag != tpm2.TPMSTAuthSigned || len(rsp.Timeout.Buffer) == 0 {
		return nil, answered{errors.New("the TPM gave no ticket for the consent")}
	}
	return &consent{policy: policy, authority: approver.Name.Buffer, timeout: rsp.Timeout.Buffer, ticket: tpm2.Marshal(rsp.PolicyTicket),
		until: p.begun.Add(time.Duration(-given.Expiration)*time.Second - slack)}, nil
}

// Reserved is until when the key's consent serves; the zero time: there is none.
// The TPM has the last word: its clock counts, and a reset ends it.
func (k *Key) Reserved() (until time.Time) {
	k.device.mu.Lock()
	defer k.device.mu.Unlock()
	if k.consent != nil {
		until = k.consent.until
	}
	return until
}

// signReserved satisfies the policy with the ticket and signs: PolicyPCR,
// [PolicyNV,] PolicyTicket, PolicyAuthorize, Sign.
func (k *Key) signReserved(digest, message []byte) (*tpm2.TPMSSignatureECC, error) {
	d, c, u := k.device, k.consent, k.use.Load()
	if c == nil || !time.Now().Before(c.until) {
		return nil, answered{ErrNoConsent}
	}
	now, err := d.state([]attest.ApprovedPolicy{*c.policy})
	if err != nil {
		return nil, err
	}
	if !now.fits(c.policy) {
		return nil, now.none([]attest.ApprovedPolicy{*c.policy})
	}
	x, err := d.prepare(u.policies, c.policy)
	if err != nil {
		return nil, err
	}
	if err := k.load(); err != nil {
		return nil, err
	}
	sig, err := unchanged(func() (*tpm2.TPMSSignatureECC, error) {
		s, err := d.policySession()
		if err != nil {
			return nil, err
		}
		return k.reservedIn(s, x, c, u, digest, message)
	}, d.dropSession)
	if err != nil {
		d.dropSession() // its policy was begun
		if ended(err) {
			k.consent, err = nil, answered{ErrNoConsent}
		}
		return nil, answer(err)
	}
	return sig, nil
}

func (k *Key) reservedIn(s *policySession, x *prepared, c *consent, u *use, digest, message []byte) (*tpm2.TPMSSignatureECC, error) {
	to := k.device.link
	if _, err := (tpm2.PolicyPCR{PolicySession: s.Handle(), PcrDigest: tpm2.TPM2BDigest{Buffer: x.pcrDigest}, Pcrs: x.selection}).Execute(to); err != nil {
		return nil, err
	}
	if c.policy.Epoch > 0 {
		if err := policyEpoch(to, c.policy.Epoch, s.Handle()); err != nil {
			return nil, err
		}
	}
	if err := to.replay(policyTicket(s.Handle(), c, attest.ReserveRef(u.policies.Ref))); err != nil {
		return nil, err
	}
	if _, err := (tpm2.PolicyAuthorize{
		PolicySession: s.Handle(), ApprovedPolicy: tpm2.TPM2BDigest{Buffer: x.digest}, PolicyRef: tpm2.TPM2BDigest{Buffer: x.ref}, KeySign: x.authority.name, CheckTicket: x.authority.ticket,
	}).Execute(to); err != nil {
		return nil, err
	}
	return k.command(digest, message, s.Session)
}

// ended says whether a ticket is of no more use: it expired, or was given
// before the TPM was reset.
func ended(err error) bool {
	return errors.Is(err, tpm2.TPMRCExpired) || errors.Is(err, tpm2.TPMRCTicket)
}

// policyTicket is TPM2_PolicyTicket (Part 3, section 23.5), which go-tpm does not have.
func policyTicket(session tpm2.TPMHandle, c *consent, ref []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	b = binary.BigEndian.AppendUint32(b, 0) // the size, below
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMCCPolicyTicket))
	b = binary.BigEndian.AppendUint32(b, uint32(session))
	for _, x := range [][]byte{c.timeout, nil, ref, c.authority} { // nil: cpHash
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(x))), x...)
	}
	b = append(b, c.ticket...)
	binary.BigEndian.PutUint32(b[2:], uint32(len(b)))
	return b
}
