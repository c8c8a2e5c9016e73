package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
	"inkan/simulator"
)

// consenting is an Authorizer for the reserve: approvers' consents.
type consenting struct {
	keys    []*ecdsa.PrivateKey
	ref     []byte
	seconds int
	change  func(*attest.Authorization)
	nonce   []byte // that is consented to; nil: the session's
	refuse  error
}

func (*consenting) HashFunc() crypto.Hash { return crypto.SHA256 }

func (c *consenting) Authorize(nonce []byte, accept func(string, int32, []byte) (bool, error)) error {
	if c.refuse != nil {
		return c.refuse
	}
	if c.nonce != nil {
		nonce = c.nonce
	}
	var last error
	for _, key := range c.keys {
		k, err := attest.NewApproverKey(key)
		if err != nil {
			return err
		}
		x, err := k.Consent(nonce, c.seconds, c.ref)
		if err != nil {
			return err
		}
		if c.change != nil {
			c.change(x)
		}
		enough, err := accept(x.Approver, x.Expiration, x.Signature)
		if enough {
			return nil
		}
		last = err
	}
	return last
}

// reserveHost is a TPM with a key in reserve mode.
type reserveHost struct {
	sim      *simulator.TPM
	d        *Device
	policy   *ecdsa.PrivateKey // the policy key
	approver *ecdsa.PrivateKey
	policies *Policies
	k        *Key
	digest   [32]byte
}

func newReserveHost(t *testing.T) *reserveHost {
	t.Helper()
	h := &reserveHost{sim: simulator.TPMForTest(t), policy: p256(t), approver: p256(t), digest: sha256.Sum256([]byte("a statement"))}
	var err error
	if h.d, err = Open(h.sim.Address); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.d.Close() })
	area, err := attest.PolicyKeyPublic(&h.policy.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	h.policies = &Policies{PolicyKey: area, Ref: []byte("test")}
	h.approve(t, "reserve", h.approver)
	h.k = h.key(t, attest.ModeReserve)
	return h
}

// approve approves the state that the host is in for the reserve.
func (h *reserveHost) approve(t *testing.T, name string, approver *ecdsa.PrivateKey) {
	t.Helper()
	values, err := h.d.ReadPCRs([]attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 7}}})
	if err != nil {
		t.Fatal(err)
	}
	p, err := attest.SignReservePolicy(h.policy, name, values, h.policies.Ref, 0, &approver.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	c := *h.policies
	c.Approved = append([]attest.ApprovedPolicy{*p}, c.Approved...)
	h.policies = &c
	if h.k != nil {
		h.k.SetPolicies(h.policies)
	}
}

func (h *reserveHost) key(t *testing.T, mode string) *Key {
	t.Helper()
	auth, err := attest.KeyPolicy(mode, h.policies.PolicyKey, h.policies.Ref)
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := h.d.CreateKey(attest.KeyTemplate(auth))
	if err != nil {
		t.Fatal(err)
	}
	k, err := h.d.LoadKey(file, h.policies)
	if err != nil {
		t.Fatal(err)
	}
	if k.Mode() != mode {
		t.Fatalf("mode %s, %s is expected", k.Mode(), mode)
	}
	return k
}

func (h *reserveHost) sign() error {
	sig, err := h.k.Sign(nil, h.digest[:], crypto.SHA256)
	if err == nil && !ecdsa.VerifyASN1(h.k.public, h.digest[:], sig) {
		return errors.New("the signature does not verify")
	}
	return err
}

func (h *reserveHost) reserve(seconds int, change func(*consenting)) error {
	c := &consenting{keys: []*ecdsa.PrivateKey{h.approver}, ref: h.policies.Ref, seconds: seconds}
	if change != nil {
		change(c)
	}
	_, err := h.k.Reserve(c)
	return err
}

// TestReserve: a consent of an approver serves any number of signatures until
// it expires, by the TPM's own clock.
func TestReserve(t *testing.T) {
	h := newReserveHost(t)
	if err := h.sign(); !errors.Is(err, ErrNoConsent) {
		t.Fatalf("before a consent: %v", err)
	}
	begun := time.Now()
	until, err := h.k.Reserve(&consenting{keys: []*ecdsa.PrivateKey{h.approver}, ref: h.policies.Ref, seconds: 60})
	if err != nil {
		t.Fatal(err)
	}
	if left := until.Sub(begun); left < 55*time.Second || left > 60*time.Second || !h.k.Reserved().Equal(until) {
		t.Errorf("it serves for %s, until %s", left, h.k.Reserved())
	}
	for range 5 {
		if err := h.sign(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.d.Quote([]attest.PCRSelection{{Bank: "sha256", Indexes: []int{0}}}, []byte("x")); err != nil {
		t.Errorf("a quote between: %v", err)
	}
	if err := h.sign(); err != nil {
		t.Errorf("after a quote: %v", err)
	}
	// What this program remembers does not count: the TPM has the last word.
	if err := h.reserve(3, nil); err != nil {
		t.Fatal(err)
	}
	h.k.consent.until = time.Now().Add(time.Hour)
	if err := h.sign(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3200 * time.Millisecond)
	if err := h.sign(); !errors.Is(err, ErrNoConsent) {
		t.Errorf("after the TPM let it expire: %v", err)
	}
	if n := h.d.count(t); n > maxLoaded+approvedSessions+1 {
		t.Errorf("%d handles and sessions are in the TPM", n)
	}
}

// TestReserveRefused: what is no consent is none.
func TestReserveRefused(t *testing.T) {
	h := newReserveHost(t)
	stranger := p256(t)
	for what, c := range map[string]struct {
		change func(*consenting)
		why    string
	}{
		"a stranger's consent":            {func(c *consenting) { c.keys = []*ecdsa.PrivateKey{stranger} }, "not one that the policy key approved"},
		"another session's":               {func(c *consenting) { c.nonce = make([]byte, attest.NonceTPMSize) }, "does not verify"},
		"another trust domain's":          {func(c *consenting) { c.ref = []byte("other") }, "does not verify"},
		"one that lasts longer than said": {func(c *consenting) { c.change = func(x *attest.Authorization) { x.Expiration -= 60 } }, "does not verify"},
		"one without an end":              {func(c *consenting) { c.change = func(x *attest.Authorization) { x.Expiration = 0 } }, "-900 to -1 is expected"},
		"one that is too long":            {func(c *consenting) { c.change = func(x *attest.Authorization) { x.Expiration = -901 } }, "-900 to -1 is expected"},
		"a refusal":                       {func(c *consenting) { c.refuse = errors.New("the approver says no") }, "says no"},
		"nothing":                         {func(c *consenting) { c.keys = nil }, ErrNotAuthorized.Error()},
	} {
		if err := h.reserve(60, c.change); err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: %v", what, err)
		}
		if err := h.sign(); !errors.Is(err, ErrNoConsent) {
			t.Errorf("a signature after %s: %v", what, err)
		}
	}
	if err := h.reserve(60, nil); err != nil {
		t.Errorf("after all of these: %v", err)
	}
	if err := h.sign(); err != nil {
		t.Errorf("after all of these: %v", err)
	}
	if _, err := h.key(t, attest.ModeLocal).Reserve(&consenting{}); err == nil {
		t.Error("a local key took a consent")
	}
}

// TestReserveEnds: a change of the host's state, a reset of the TPM and the
// end of the approval end the reserve.
func TestReserveEnds(t *testing.T) {
	h := newReserveHost(t)
	if err := errors.Join(h.reserve(60, nil), h.sign()); err != nil {
		t.Fatal(err)
	}
	// The ticket is of that TPM, since its last reset.
	if err := errors.Join(h.sim.Kill(), h.sim.Restart()); err != nil {
		t.Fatal(err)
	}
	if err := h.sign(); !errors.Is(err, ErrNoConsent) {
		t.Errorf("after a reset: %v", err)
	}
	if err := errors.Join(h.reserve(60, nil), h.sign()); err != nil {
		t.Fatalf("a consent after the reset: %v", err)
	}
	h.d.Release() // the simulator serves one connection at a time
	if err := h.sim.ExtendPCR(7, []byte("changed")); err != nil {
		t.Fatal(err)
	}
	var p *PCRError
	if err := h.sign(); !errors.As(err, &p) {
		t.Errorf("after a change of the host: %v", err)
	}
	h.k.SetPolicies(&Policies{PolicyKey: h.policies.PolicyKey, Ref: h.policies.Ref})
	if err := h.reserve(60, nil); !errors.Is(err, ErrNoPolicy) {
		t.Errorf("without an approval: %v", err)
	}
}

// TestReserveIsNoAuthorization: as root, with all that the host has: a consent
// does not serve a key in approver mode, an authorization does not serve the
// reserve, and a ticket that was changed is none.
func TestReserveIsNoAuthorization(t *testing.T) {
	h := newReserveHost(t)
	values, err := h.d.ReadPCRs([]attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 7}}})
	if err != nil {
		t.Fatal(err)
	}
	approved, err := attest.SignPolicy(h.policy, "approver", values, h.policies.Ref, &h.approver.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	h.policies = &Policies{PolicyKey: h.policies.PolicyKey, Ref: h.policies.Ref, Approved: append(h.policies.Approved, *approved)}
	h.k.SetPolicies(h.policies)
	main := h.key(t, attest.ModeApprover)
	if err := errors.Join(h.reserve(600, nil), h.sign()); err != nil {
		t.Fatal(err)
	}
	c := h.k.consent
	// try begins a policy session, runs steps in it and signs with a key.
	try := func(k *Key, approval *attest.ApprovedPolicy, step func(tpm2.Session) error) error {
		return h.d.do("trying", func() error {
			x, err := h.d.prepare(h.policies, approval)
			if err != nil {
				return err
			}
			if err := k.load(); err != nil {
				return err
			}
			s, _, err := tpm2.PolicySession(h.d.link, tpm2.TPMAlgSHA256, attest.NonceTPMSize)
			if err != nil {
				return err
			}
			defer h.d.flush(s.Handle())
			if _, err := (tpm2.PolicyPCR{PolicySession: s.Handle(), PcrDigest: tpm2.TPM2BDigest{Buffer: x.pcrDigest}, Pcrs: x.selection}).Execute(h.d.link); err != nil {
				return answer(err)
			}
			if err := step(s); err != nil {
				return answer(err)
			}
			if _, err := (tpm2.PolicyAuthorize{PolicySession: s.Handle(), ApprovedPolicy: tpm2.TPM2BDigest{Buffer: x.digest}, PolicyRef: tpm2.TPM2BDigest{Buffer: x.ref}, KeySign: x.authority.name, CheckTicket: x.authority.ticket}).Execute(h.d.link); err != nil {
				return answer(err)
			}
			_, err = k.command(h.digest[:], nil, s)
			return answer(err)
		})
	}
	ticket := func(c *consent, ref []byte) func(tpm2.Session) error {
		return func(s tpm2.Session) error { return h.d.link.replay(policyTicket(s.Handle(), c, ref)) }
	}
	ref := attest.ReserveRef(h.policies.Ref)
	reserve := &h.policies.Approved[0]
	longer := *c
	longer.timeout = append([]byte{0}, c.timeout...)[:len(c.timeout)]
	longer.timeout[len(longer.timeout)-1]++
	for _, x := range []struct {
		what string
		err  error
		want tpm2.TPMRC
	}{
		{"the reserve's approval without a ticket", try(h.k, reserve, func(tpm2.Session) error { return nil }), tpm2.TPMRCValue},
		{"the ticket under the approval for approver mode", try(main, approved, ticket(c, ref)), tpm2.TPMRCValue},
		{"the ticket with the policyRef of authorizations", try(main, approved, ticket(c, attest.AuthorizationRef(h.policies.Ref))), tpm2.TPMRCTicket},
		{"the reserve's approval for the key in approver mode", try(main, reserve, ticket(c, ref)), tpm2.TPMRCPolicyFail},
		{"a ticket with a later end", try(h.k, reserve, ticket(&longer, ref)), tpm2.TPMRCTicket},
		{"an authorization in place of a consent", try(h.k, reserve, func(s tpm2.Session) error {
			hash := attest.SignCommandHash(h.k.name, h.digest)
			a, err := attest.Authorize(h.approver, s.NonceTPM().Buffer, hash, h.policies.Ref)
			if err != nil {
				return err
			}
			sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](a.Signature)
			if err != nil {
				return err
			}
			approver, err := h.d.external(reserve.Approvers[0])
			if err != nil {
				return err
			}
			_, err = tpm2.PolicySigned{AuthObject: *approver, PolicySession: s.Handle(), NonceTPM: s.NonceTPM(), CPHashA: tpm2.TPM2BDigest{Buffer: hash[:]},
				PolicyRef: tpm2.TPM2BNonce{Buffer: attest.AuthorizationRef(h.policies.Ref)}, Expiration: a.Expiration, Auth: *sig}.Execute(h.d.link)
			return err
		}), tpm2.TPMRCValue},
	} {
		if !errors.Is(x.err, x.want) {
			t.Errorf("%s: %v, %v is expected", x.what, x.err, x.want)
		}
	}
	if err := h.sign(); err != nil {
		t.Errorf("after all of these: %v", err)
	}
}
