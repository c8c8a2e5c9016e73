package tpm_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"inkan/attest"
	"inkan/tpm"
)

// approver is an approver's key, and how it behaves.
type approver struct {
	key *ecdsa.PrivateKey
	ref []byte
}

func newApprover(t testing.TB, h *host) *approver {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &approver{k, h.policies.Ref}
}

// approveWith approves the state that the host is in, for keys in approver mode.
func (h *host) approveWith(t testing.TB, name string, approvers ...*approver) {
	t.Helper()
	values, err := h.dev.ReadPCRs(selection)
	if err != nil {
		t.Fatal(err)
	}
	var keys []*ecdsa.PublicKey
	for _, a := range approvers {
		keys = append(keys, &a.key.PublicKey)
	}
	p, err := attest.SignPolicy(h.key, name, values, h.policies.Ref, keys...)
	if err != nil {
		t.Fatal(err)
	}
	c := *h.policies
	c.Approved = append([]attest.ApprovedPolicy{*p}, c.Approved...)
	h.policies = &c
}

// approvedKey makes a key in approver mode.
func (h *host) approvedKey(t testing.TB) *tpm.Key {
	t.Helper()
	auth, err := attest.KeyPolicy(attest.ModeApprover, h.policies.PolicyKey, h.policies.Ref)
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := h.dev.CreateKey(attest.KeyTemplate(auth))
	if err != nil {
		t.Fatal(err)
	}
	k, err := h.dev.LoadKey(file, h.policies)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// consent is an Authorizer that asks approvers in this process.
type consent struct {
	name      []byte
	digest    [32]byte
	approvers []*approver
	before    func()                       // called before the approvers are asked
	change    func(*attest.Authorization)  // what is handed over instead
	nonce     func(nonce []byte) []byte    // what the approver is told
	accepted  func(enough bool, err error) // what the device said
}

func (*consent) HashFunc() crypto.Hash { return crypto.SHA256 }

var errNo = errors.New("the approver says no")

func (c *consent) Authorize(nonce []byte, accept func(string, int32, []byte) (bool, error)) error {
	if c.before != nil {
		c.before()
	}
	if len(c.approvers) == 0 {
		return errNo
	}
	if c.nonce != nil {
		nonce = c.nonce(nonce)
	}
	var last error
	for _, a := range c.approvers {
		x, err := attest.Authorize(a.key, nonce, attest.SignCommandHash(c.name, c.digest), a.ref)
		if err != nil {
			return err
		}
		if c.change != nil {
			c.change(x)
		}
		enough, err := accept(x.Approver, x.Expiration, x.Signature)
		if c.accepted != nil {
			c.accepted(enough, err)
		}
		last = err
		if enough {
			return nil
		}
	}
	return last
}

func approved(k *tpm.Key, text string, change func(*consent), approvers ...*approver) error {
	digest := sha256.Sum256([]byte(text))
	name, err := attest.KeyName(k.PublicArea())
	if err != nil {
		return err
	}
	c := &consent{name: name, digest: digest, approvers: approvers}
	if change != nil {
		change(c)
	}
	sig, err := k.Sign(nil, digest[:], c)
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), digest[:], sig) {
		return errors.New("the signature does not verify")
	}
	return nil
}

func TestApproverMode(t *testing.T) {
	h := newHost(t)
	a, b := newApprover(t, h), newApprover(t, h)
	h.approveWith(t, "approved", a)
	k := h.approvedKey(t)
	if k.Mode() != attest.ModeApprover {
		t.Fatalf("mode %s", k.Mode())
	}
	for i := range 3 {
		if err := approved(k, "a statement", nil, a); err != nil {
			t.Fatalf("signature %d: %v", i, err)
		}
	}
	if err := signs(k); !errors.Is(err, tpm.ErrNotAuthorized) {
		t.Errorf("without an authorizer: %v", err)
	}
	if err := approved(k, "a statement", nil); !errors.Is(err, errNo) {
		t.Errorf("refused by the approver: %v", err)
	}
	if err := approved(k, "a statement", nil, b); err == nil || !strings.Contains(err.Error(), "not one that the policy key approved") {
		t.Errorf("another approver: %v", err)
	}
	if err := approved(k, "a statement", func(c *consent) { c.digest[0]++ }, a); err == nil || !strings.Contains(err.Error(), "does not verify") {
		t.Errorf("authorization for another digest: %v", err)
	}
	if err := approved(k, "a statement", func(c *consent) { c.nonce = func([]byte) []byte { return make([]byte, 32) } }, a); err == nil || !strings.Contains(err.Error(), "does not verify") {
		t.Errorf("authorization for another session: %v", err)
	}
	for _, e := range []int32{0, -60, 3600} {
		if err := approved(k, "a statement", func(c *consent) { c.change = func(x *attest.Authorization) { x.Expiration = e } }, a); err == nil || !strings.Contains(err.Error(), "expiration") {
			t.Errorf("expiration %d: %v", e, err)
		}
	}
	if err := approved(k, "a statement", nil, a); err != nil {
		t.Errorf("after all of these: %v", err)
	}
	// A local key beside it.
	local, _ := h.newKey(t)
	if err := signs(local); err != nil {
		t.Error(err)
	}
	if err := approved(k, "a statement", nil, a); err != nil {
		t.Errorf("after a local key: %v", err)
	}
}

// TestApproverModeHoldsPCRs: authorizations do not stand in for the host's state.
func TestApproverModeHoldsPCRs(t *testing.T) {
	h := newHost(t)
	a := newApprover(t, h)
	h.approveWith(t, "approved", a)
	k := h.approvedKey(t)
	if err := approved(k, "x", nil, a); err != nil {
		t.Fatal(err)
	}
	if err := h.sim.ExtendPCR(7, []byte("changed")); err != nil {
		t.Fatal(err)
	}
	var p *tpm.PCRError
	if err := approved(k, "x", nil, a); !errors.As(err, &p) {
		t.Fatalf("after a change: %v", err)
	}
	h.approveWith(t, "second", a)
	k.SetPolicies(h.policies)
	if err := approved(k, "x", nil, a); err != nil {
		t.Fatalf("after a new approval: %v", err)
	}
}

// TestTwoApprovers: the policy demands both.
func TestTwoApprovers(t *testing.T) {
	h := newHost(t)
	a, b, c := newApprover(t, h), newApprover(t, h), newApprover(t, h)
	h.approveWith(t, "both", a, b)
	k := h.approvedKey(t)
	if err := approved(k, "x", nil, a); !errors.Is(err, tpm.ErrNotAuthorized) {
		t.Errorf("one of two: %v", err)
	}
	if err := approved(k, "x", nil, b, a); err != nil {
		t.Errorf("both: %v", err)
	}
	if err := approved(k, "x", nil, a, c); err == nil {
		t.Error("one of two and a stranger")
	}
	h.approveWith(t, "three", a, b, c)
	k.SetPolicies(&tpm.Policies{PolicyKey: h.policies.PolicyKey, Ref: h.policies.Ref, Approved: h.policies.Approved[:1]})
	for range 2 {
		if err := approved(k, "x", nil, a, b, c); err != nil {
			t.Errorf("three of three: %v", err)
		}
	}
}

// TestSlowApprover: neither the device nor another session waits for it, and
// what it was waiting with is used again.
func TestSlowApprover(t *testing.T) {
	h := newHost(t)
	a := newApprover(t, h)
	h.approveWith(t, "approved", a)
	k := h.approvedKey(t)
	local, _ := h.newKey(t)
	asked, go_ := make(chan struct{}), make(chan struct{})
	done := make(chan error)
	go func() {
		done <- approved(k, "slow", func(c *consent) { c.before = func() { close(asked); <-go_ } }, a)
	}()
	<-asked
	if err := signs(local); err != nil {
		t.Errorf("a local key meanwhile: %v", err)
	}
	if err := approved(k, "quick", nil, a); err != nil {
		t.Errorf("another signature meanwhile: %v", err)
	}
	eks, err := h.dev.EKs() // needs sessions and places of its own
	if err != nil || len(eks) == 0 {
		t.Errorf("endorsement keys meanwhile: %v", err)
	}
	if _, err := h.dev.Quote(selection, []byte("x")); err != nil {
		t.Errorf("a quote meanwhile: %v", err)
	}
	time.Sleep(300 * time.Millisecond) // longer than an idle connection is kept
	close(go_)
	if err := <-done; err != nil {
		t.Errorf("the slow one: %v", err)
	}
}

// TestApproverModeAfterReset: a TPM that lost the session is asked again.
func TestApproverModeAfterReset(t *testing.T) {
	h := newHost(t)
	a := newApprover(t, h)
	h.approveWith(t, "approved", a)
	k := h.approvedKey(t)
	asked := 0
	err := approved(k, "x", func(c *consent) {
		c.before = func() {
			if asked++; asked == 1 {
				if err := h.sim.Kill(); err != nil {
					t.Error(err)
				}
				if err := h.sim.Restart(); err != nil {
					t.Error(err)
				}
			}
		}
	}, a)
	if err != nil || asked != 2 {
		t.Errorf("asked %d times: %v", asked, err)
	}
}

// TestApproverModeLeaks: whatever approvers do, nothing stays in the TPM.
func TestApproverModeLeaks(t *testing.T) {
	h := newHost(t)
	a, liar := newApprover(t, h), newApprover(t, h)
	h.approveWith(t, "approved", a)
	k := h.approvedKey(t)
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			switch i % 3 {
			case 0:
				if err := approved(k, "x", nil, a); err != nil {
					t.Error(err)
				}
			case 1:
				if err := approved(k, "x", nil); !errors.Is(err, errNo) {
					t.Error(err)
				}
			case 2:
				if err := approved(k, "x", nil, liar); err == nil {
					t.Error("a stranger's authorization was taken")
				}
			}
		})
	}
	wg.Wait()
	time.Sleep(300 * time.Millisecond) // idle by now: the device has left the TPM
	if n := leftOver(t, h); n != 0 {
		t.Errorf("%d handles and sessions are left in the TPM", n)
	}
}

// leftOver counts what is loaded in the TPM, as another program sees it.
func leftOver(t *testing.T, h *host) int {
	t.Helper()
	link, err := linuxudstpm.Open(h.sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	n := 0
	for _, kind := range []uint32{0x80000000, 0x02000000, 0x03000000} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: kind, PropertyCount: 64}.Execute(link)
		if err != nil {
			t.Fatal(err)
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			t.Fatal(err)
		}
		n += len(list.Handle)
	}
	return n
}
