package tpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
	"inkan/simulator"
)

// asked is an Authorizer: approvers' keys, and what happens while they are asked.
type asked struct {
	keys      []*ecdsa.PrivateKey
	policyRef []byte
	command   [32]byte
	meanwhile func()
	times     int
}

func (*asked) HashFunc() crypto.Hash { return crypto.SHA256 }

func (a *asked) Authorize(nonce []byte, accept func(string, int32, []byte) (bool, error)) error {
	a.times++
	if a.meanwhile != nil {
		time.Sleep(50 * time.Millisecond) // the state that is expected is in the session
		a.meanwhile()
	}
	for _, k := range a.keys {
		x, err := attest.Authorize(k, nonce, a.command, a.policyRef)
		if err != nil {
			return err
		}
		if _, err := accept(x.Approver, x.Expiration, x.Signature); err != nil {
			return err
		}
	}
	return nil
}

func p256(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestStateWhileApproversAreAsked: the host's state is put into the session
// while approvers are asked; what happens to it meanwhile counts.
func TestStateWhileApproversAreAsked(t *testing.T) {
	sim := simulator.TPMForTest(t)
	d, err := Open(sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	policyKey, a, b, c := p256(t), p256(t), p256(t), p256(t)
	area, err := attest.PolicyKeyPublic(&policyKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	ref := []byte("test")
	approve := func(name string, approvers ...*ecdsa.PublicKey) attest.ApprovedPolicy {
		t.Helper()
		values, err := d.ReadPCRs([]attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 7}}})
		if err != nil {
			t.Fatal(err)
		}
		p, err := attest.SignPolicy(policyKey, name, values, ref, approvers...)
		if err != nil {
			t.Fatal(err)
		}
		return *p
	}
	auth, err := attest.KeyPolicy(attest.ModeApprover, area, ref)
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := d.CreateKey(attest.KeyTemplate(auth))
	if err != nil {
		t.Fatal(err)
	}
	policies := []attest.ApprovedPolicy{approve("a-and-b", &a.PublicKey, &b.PublicKey), approve("a-and-c", &a.PublicKey, &c.PublicKey)}
	k, err := d.LoadKey(file, &Policies{PolicyKey: area, Ref: ref, Approved: policies})
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("a statement"))
	sign := func(meanwhile func(), keys ...*ecdsa.PrivateKey) (int, error) {
		x := &asked{keys: keys, policyRef: ref, command: attest.SignCommandHash(k.name, digest), meanwhile: meanwhile}
		sig, err := k.Sign(nil, digest[:], x)
		if err == nil && !ecdsa.VerifyASN1(k.public, digest[:], sig) {
			t.Error("the signature does not verify")
		}
		return x.times, err
	}
	extend := func(pcr uint32) func() {
		done := false
		return func() {
			if done {
				return
			}
			done = true
			err := d.do("extending", func() error {
				_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
					Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]}}}}.Execute(d.link)
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
	for _, c := range []struct {
		what      string
		meanwhile func()
		keys      []*ecdsa.PrivateKey
		asked     int
	}{
		{"nothing is expected", nil, []*ecdsa.PrivateKey{a, b}, 1},
		{"what is expected is so", nil, []*ecdsa.PrivateKey{a, b}, 1},
		{"another approval for the same state", nil, []*ecdsa.PrivateKey{a, c}, 1},
		{"a PCR that no approval names is extended", extend(10), []*ecdsa.PrivateKey{a, b}, 2},
		{"after that", nil, []*ecdsa.PrivateKey{a, b}, 1},
	} {
		if n, err := sign(c.meanwhile, c.keys...); err != nil || n != c.asked {
			t.Errorf("%s: asked %d times, %d is expected: %v", c.what, n, c.asked, err)
		}
	}
	var p *PCRError
	if n, err := sign(extend(7), a, b); !errors.As(err, &p) {
		t.Errorf("a PCR of the approval is extended: asked %d times: %v", n, err)
	}
	if n, err := sign(nil, a, b); !errors.As(err, &p) || n != 1 {
		t.Errorf("after that: asked %d times: %v", n, err)
	}
	// Another approval beside the one that was right.
	k.SetPolicies(&Policies{PolicyKey: area, Ref: ref, Approved: append(policies, approve("new-state", &a.PublicKey))})
	for range 2 {
		if n, err := sign(nil, a); err != nil || n != 1 {
			t.Errorf("an approval for the new state: asked %d times: %v", n, err)
		}
	}
	if n := len(d.free); n > approvedSessions {
		t.Errorf("%d sessions are kept", n)
	}
}
