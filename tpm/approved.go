package tpm

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"inkan/attest"
)

// ErrNotAuthorized: a key in approver mode was to sign without the authorizations that the TPM demands.
var ErrNotAuthorized = errors.New("the approvers' authorizations that the TPM demands are not there")

// Authorizer is what [Key.Sign] needs as options for a key in approver mode.
//
// Authorize is called without a lock held, so an approver that is slow delays
// its own signature alone. It gets approvers' authorizations for the digest that is to be signed, in
// the session with this nonce, and hands each to accept, one at a time. accept
// returns an error for one that is not what it says, which changes nothing, and true when there are enough. An error of
// Authorize ends Sign and is returned as it is.
type Authorizer interface {
	crypto.SignerOpts
	Authorize(nonceTPM []byte, accept func(approver string, expiration int32, signature []byte) (enough bool, err error)) error
}

// approvedSessions are those of keys in approver mode. Each waits for an approver
// with its nonce, so each carries one signature at a time. A TPM without a resource manager
// has room for three sessions, and Linux's resource manager gives each opened
// device three as well: two here, and one for all else.
const approvedSessions = 2

// sessionLife is how long a session is used again. Authorizations expire
// AuthorizationSeconds after the start of the session, however often it was used.
const sessionLife = attest.AuthorizationSeconds * time.Second / 2

// slack is what must be left of an authorization's life when it goes to the TPM.
const slack = 2 * time.Second

// parked is a policy session that waits for authorizations with its nonce, or
// for its next use.
type parked struct {
	session tpm2.Session
	epoch   int // of the device, when it was begun
	begun   time.Time
	spoiled bool // its policy was begun and not used

	of   *prepared         // the approval that it was used under last
	made map[string][]byte // commands for it, as they go to the TPM
}

// send sends a command that is the same for each use of the session under an
// approval: it is made once, since that takes as long as sending it.
func (p *parked) send(l *link, x *prepared, what string, first func(transport.TPM) error) error {
	if p.of != x {
		p.of, p.made = x, make(map[string][]byte)
	}
	if b := p.made[what]; b != nil {
		return l.replay(b)
	}
	to := &recorder{link: l}
	err := first(to)
	if err == nil && len(to.sent) == 1 {
		p.made[what] = to.sent[0]
	}
	return err
}

// errStale: the session or its time is gone. A second attempt asks again.
var errStale = errors.New("the TPM's session ended before the authorization arrived")

// errChanged is errStale: some PCR was extended since the state was put into the session.
var errChanged = fmt.Errorf("%w: a PCR was extended meanwhile", errStale)

// answered marks an answer of the TPM that puts nothing in doubt but the session.
type answered struct{ error }

func (a answered) Unwrap() error { return a.error }

// borrow lends a session, begun afresh if there is none that is young enough.
func (d *Device) borrow() (p *parked, err error) {
	d.approvals <- struct{}{}
	err = d.do("beginning a session", func() error {
		for len(d.free) > 0 {
			p = d.free[len(d.free)-1]
			d.free = d.free[:len(d.free)-1]
			if time.Since(p.begun) < sessionLife {
				d.waiting++
				return nil
			}
			d.flush(p.session.Handle())
		}
		begun := time.Now()
		s, _, err := tpm2.PolicySession(d.link, tpm2.TPMAlgSHA256, attest.NonceTPMSize)
		if err != nil {
			return err
		}
		p = &parked{session: s, epoch: d.epoch, begun: begun}
		d.waiting++
		return nil
	})
	if err != nil {
		<-d.approvals
	}
	return p, err
}

// dropFree flushes the sessions that wait for their next use, for the sake of
// one of another kind.
func (d *Device) dropFree() {
	for _, p := range d.free {
		d.flush(p.session.Handle())
	}
	d.free = nil
}

// giveBack takes a session back. One whose policy was begun is flushed.
func (d *Device) giveBack(p *parked) {
	d.mu.Lock()
	d.waiting--
	if p.epoch == d.epoch && !d.closed {
		if p.spoiled {
			d.flush(p.session.Handle())
		} else {
			d.free = append(d.free, p)
		}
	}
	d.idleLater()
	d.mu.Unlock()
	<-d.approvals
}

// candidate is an approved policy for keys in approver mode.
type candidate struct {
	policy *attest.ApprovedPolicy
	ids    []string // of its approvers
	keys   []any    // likewise
}

// signApproved signs in approver mode. If the TPM lost the session meanwhile,
// the authorization came too late for it, or the host is not in the state that was
// expected, it asks again and expects nothing.
func (k *Key) signApproved(digest, message []byte, a Authorizer) (*tpm2.TPMSSignatureECC, error) {
	sig, err := k.tryApproved(digest, message, a, true)
	for tries := 0; errors.Is(err, errStale) && tries < maxChanges; tries++ {
		sig, err = k.tryApproved(digest, message, a, false)
	}
	return sig, err
}

// tryApproved puts the state that the host was in last time into the session
// while the approvers are asked, if it expects that one.
func (k *Key) tryApproved(digest, message []byte, a Authorizer, expect bool) (*tpm2.TPMSSignatureECC, error) {
	u := k.use.Load()
	if len(u.candidates) == 0 {
		return nil, fmt.Errorf("signing: %w for keys in approver mode: ask the operator of the issuer for one that names the approvers", ErrNoPolicy)
	}
	p, err := k.device.borrow()
	if err != nil {
		return nil, err
	}
	defer k.device.giveBack(p)
	nonce := p.session.NonceTPM().Buffer
	cpHash := attest.SignCommandHash(k.name, [32]byte(digest))
	got := make(map[string]*attest.Authorization)
	var in *attest.ApprovedPolicy
	var entering sync.WaitGroup
	defer entering.Wait() // before the session is given back
	if expect {
		entering.Go(func() { in = k.expect(p, u) })
	}
	err = a.Authorize(bytes.Clone(nonce), func(approver string, expiration int32, signature []byte) (bool, error) {
		key := u.approverKey(approver)
		if key == nil {
			return false, fmt.Errorf("approver %.80q is not one that the policy key approved", approver)
		}
		x := &attest.Authorization{Approver: approver, Expiration: expiration, Signature: signature}
		if err := attest.VerifyAuthorizationBy(key, x, nonce, cpHash, u.policies.Ref); err != nil {
			return false, fmt.Errorf("authorization of approver %s: %w", approver, err)
		}
		got[approver] = x
		return len(u.satisfied(got)) > 0, nil
	})
	entering.Wait()
	if err != nil {
		return nil, err
	}
	satisfied := u.satisfied(got)
	if len(satisfied) == 0 {
		return nil, fmt.Errorf("signing: %w", ErrNotAuthorized)
	}
	var sig *tpm2.TPMSSignatureECC
	err = k.device.do("signing", func() (err error) {
		if p.epoch != k.device.epoch || time.Since(p.begun) > attest.AuthorizationSeconds*time.Second-slack {
			p.spoiled = true
			return errStale
		}
		sig, err = k.signIn(p, u, satisfied, in, got, cpHash, digest, message)
		return err
	})
	return sig, err
}

// approverKey is the public key of an approver, nil if it is nobody's.
func (u *use) approverKey(id string) any {
	for _, c := range u.candidates {
		for i, x := range c.ids {
			if x == id {
				return c.keys[i]
			}
		}
	}
	return nil
}

// satisfied returns the policies all of whose approvers authorized.
func (u *use) satisfied(got map[string]*attest.Authorization) []candidate {
	var out []candidate
next:
	for _, c := range u.candidates {
		for _, id := range c.ids {
			if got[id] == nil {
				continue next
			}
		}
		out = append(out, c)
	}
	return out
}

// signIn satisfies the policy in the session and signs: with everything loaded,
// that is a command for the PCRs, one for the epoch if there is one, one for each
// approver, one for the policy key and the signature. The session may have the
// state that an approval is for in it already.
func (k *Key) signIn(p *parked, u *use, satisfied []candidate, in *attest.ApprovedPolicy, got map[string]*attest.Authorization, cpHash [32]byte, digest, message []byte) (*tpm2.TPMSSignatureECC, error) {
	d := k.device
	x, c, err := k.approvedState(p, u, satisfied, in)
	if err != nil {
		return nil, err
	}
	p.spoiled = true // until the TPM has used it
	session := p.session.Handle()
	for i, id := range c.ids {
		signature, err := tpm2.Unmarshal[tpm2.TPMTSignature](got[id].Signature)
		if err != nil {
			return nil, answered{err}
		}
		approver, err := d.external(c.policy.Approvers[i])
		if err != nil {
			return nil, err
		}
		if _, err := (tpm2.PolicySigned{
			AuthObject: *approver, PolicySession: session,
			NonceTPM: p.session.NonceTPM(), CPHashA: tpm2.TPM2BDigest{Buffer: cpHash[:]},
			PolicyRef: tpm2.TPM2BNonce{Buffer: attest.AuthorizationRef(u.policies.Ref)}, Expiration: got[id].Expiration, Auth: *signature,
		}).Execute(d.link); err != nil {
			return nil, answer(err)
		}
	}
	if err := p.send(d.link, x, "authorize", func(to transport.TPM) error {
		_, err := tpm2.PolicyAuthorize{
			PolicySession: session, ApprovedPolicy: tpm2.TPM2BDigest{Buffer: x.digest}, PolicyRef: tpm2.TPM2BDigest{Buffer: x.ref},
			KeySign: x.authority.name, CheckTicket: x.authority.ticket,
		}.Execute(to)
		return err
	}); err != nil {
		return nil, answer(err)
	}
	if err := k.load(); err != nil {
		return nil, err
	}
	sig, err := k.command(digest, message, p.session)
	if errors.Is(err, tpm2.TPMRCPCRChanged) {
		return nil, errChanged
	}
	if err != nil {
		return nil, answer(err)
	}
	p.spoiled = false
	return sig, nil
}

// answer marks what the TPM answered, unless something that was thought to be
// loaded is gone: then all is begun anew.
func answer(err error) error {
	var rc tpm2.TPMRC
	if errors.As(err, &rc) && !gone(err) {
		return answered{err}
	}
	return err
}

// expect puts the state that was right last time into the session, and returns
// the approval that it belongs to: nil where there is none, or the host is not in it.
func (k *Key) expect(p *parked, u *use) (in *attest.ApprovedPolicy) {
	err := k.device.do("preparing a signature", func() error {
		if p.epoch != k.device.epoch {
			return errStale
		}
		for _, c := range u.candidates {
			if c.policy.Name == k.last {
				in = c.policy
				_, err := k.enter(p, u, c)
				return answer(err)
			}
		}
		return nil
	})
	if err != nil {
		return nil // what is wrong shows when the authorizations are there
	}
	return in
}

// enter puts the state that an approval is for into the session: PolicyPCR, and
// PolicyNV where there are epochs.
func (k *Key) enter(p *parked, u *use, c candidate) (*prepared, error) {
	d := k.device
	x, err := d.prepare(u.policies, c.policy)
	if err != nil {
		return nil, err
	}
	if err := p.send(d.link, x, "pcr", func(to transport.TPM) error {
		_, err := tpm2.PolicyPCR{PolicySession: p.session.Handle(), PcrDigest: tpm2.TPM2BDigest{Buffer: x.pcrDigest}, Pcrs: x.selection}.Execute(to)
		return err
	}); err != nil {
		return x, err
	}
	p.spoiled = true // the session has the PCRs in it
	if c.policy.Epoch == 0 {
		return x, nil
	}
	err = epochGone(p.send(d.link, x, "epoch", func(to transport.TPM) error { return policyEpoch(to, c.policy.Epoch, p.session.Handle()) }))
	if errors.Is(err, tpm2.TPMRCPolicy) {
		k.last = "" // it has ended: begin anew with what has not
		err = errStale
	}
	return x, err
}

// approvedState sees to it that the session has a state in it that a policy with
// all its authorizations is for: the one that is in it, the one that was right last
// time, or the one that the PCRs have the values of.
func (k *Key) approvedState(p *parked, u *use, satisfied []candidate, in *attest.ApprovedPolicy) (*prepared, candidate, error) {
	d := k.device
	if p.spoiled {
		for _, c := range satisfied {
			if in != nil && sameState(in, c.policy) {
				x, err := d.prepare(u.policies, c.policy)
				return x, c, err
			}
		}
		return nil, candidate{}, errStale
	}
	for _, c := range satisfied {
		if c.policy.Name != k.last {
			continue
		}
		x, err := k.enter(p, u, c)
		if err == nil {
			return x, c, nil
		}
		if !errors.Is(err, tpm2.TPMRCValue) {
			return nil, c, err
		}
	}
	var policies []attest.ApprovedPolicy
	for _, c := range satisfied {
		policies = append(policies, *c.policy)
	}
	now, err := d.state(policies)
	if err != nil {
		return nil, candidate{}, err
	}
	for _, c := range satisfied {
		if now.fits(c.policy) {
			x, err := k.enter(p, u, c)
			if err == nil {
				k.last = c.policy.Name
			}
			return x, c, err
		}
	}
	return nil, candidate{}, now.none(policies)
}

// sameState says whether two approvals are for one state of the host.
func sameState(a, b *attest.ApprovedPolicy) bool {
	return a.Epoch == b.Epoch && slices.EqualFunc(a.PCRs, b.PCRs, func(x, y attest.PCRValue) bool {
		return x.Bank == y.Bank && x.Index == y.Index && bytes.Equal(x.Digest, y.Digest)
	})
}

// external loads the public part of an approver's key, or finds it loaded.
func (d *Device) external(area []byte) (*tpm2.NamedHandle, error) {
	r := d.externals[string(area)]
	if r == nil {
		if len(d.externals) > 64 {
			return nil, errors.New("more than 64 approvers' keys were used")
		}
		r = &resident{external: true}
		d.externals[string(area)] = r
	}
	if d.touch(r) {
		return r.handle, nil
	}
	if err := d.makeRoom(maxResident - 1); err != nil {
		return nil, err
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](area)
	if err != nil {
		return nil, err
	}
	rsp, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*public), Hierarchy: tpm2.TPMRHNull}.Execute(d.link)
	if err != nil {
		return nil, err
	}
	r.handle = &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}
	d.loaded = append(d.loaded, r)
	return r.handle, nil
}
