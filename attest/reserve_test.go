package attest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"

	"inkan/attest"
)

func approverKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// inReserve makes a third key of the fixture one in reserve mode.
func (f *fixture) inReserve(t *testing.T) {
	t.Helper()
	f.inApproverMode(t)
	c := f.x.Challenge
	auth, err := attest.KeyPolicy(attest.ModeReserve, c.PolicyKey, c.PolicyRef)
	if err != nil {
		t.Fatal(err)
	}
	f.x.AuthPolicies[attest.ModeReserve] = auth
	c.Keys = append(c.Keys, attest.KeyRequest{Purpose: attest.PurposeReserve, Mode: attest.ModeReserve, Template: attest.KeyTemplate(auth)})
}

func TestAppraiseAcceptsReserve(t *testing.T) {
	f := newFixture(t)
	f.inReserve(t)
	r, err := attest.Appraise(&f.x, f.evidence(t))
	if err != nil {
		t.Fatal(err)
	}
	keys := r.Keys()
	if k := keys[len(keys)-1]; k.Mode != attest.ModeReserve || k.CSR != nil || !bytes.Equal(k.AuthPolicy, f.x.AuthPolicies[attest.ModeReserve]) {
		t.Errorf("%+v", k)
	}
}

// TestK3Reserve: a key in another mode is not taken for the reserve's.
func TestK3Reserve(t *testing.T) {
	for _, mode := range []string{attest.ModeLocal, attest.ModeApprover} {
		f := newFixture(t)
		f.inReserve(t)
		keys := f.x.Challenge.Keys
		keys[len(keys)-1].Template = attest.KeyTemplate(f.x.AuthPolicies[mode])
		_, err := attest.Appraise(&f.x, f.evidence(t))
		refusedBy(t, "K3", err)
	}
	f := newFixture(t)
	f.inReserve(t)
	delete(f.x.AuthPolicies, attest.ModeReserve)
	_, err := attest.Appraise(&f.x, f.evidence(t))
	refusedBy(t, "K3", err)
}

func TestK2ReserveWithRequest(t *testing.T) {
	f := newFixture(t)
	f.inReserve(t)
	f.dev.ChangeCSR = func([]byte) []byte { return []byte{1} }
	_, err := attest.Appraise(&f.x, f.evidence(t))
	refusedBy(t, "K2", err)
}

// TestReservePolicy: an approval for the reserve is for that mode alone, and names one approver.
func TestReservePolicy(t *testing.T) {
	f := newFixture(t)
	c := f.x.Challenge
	a, b := approverKey(t), approverKey(t)
	p, err := attest.SignReservePolicy(f.policy, "reserve", f.dev.Values(selection), c.PolicyRef, 0, &a.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if p.Mode() != attest.ModeReserve || len(attest.OfMode([]attest.ApprovedPolicy{*p}, attest.ModeApprover)) != 0 {
		t.Errorf("its mode is %s", p.Mode())
	}
	other := *p
	other.Reserve = false
	if attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, &other) == nil {
		t.Error("an approval for the reserve passes for one for approver mode")
	}
	q, err := attest.SignPolicy(f.policy, "approver", f.dev.Values(selection), c.PolicyRef, &a.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	q.Reserve = true
	if attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, q) == nil {
		t.Error("an approval for approver mode passes for one for the reserve")
	}
	two := *p
	area, err := attest.PolicyKeyPublic(&b.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	two.Approvers = append(two.Approvers, area)
	if _, err := attest.PolicyDigest(&two, c.PolicyRef); err == nil {
		t.Error("two approvers in an approval for the reserve")
	}
	seen := make(map[string]string)
	for _, mode := range attest.Modes {
		for name, policy := range map[string]func(string, []byte, []byte) ([]byte, error){"": attest.KeyPolicy, " with epochs": attest.EpochKeyPolicy} {
			auth, err := policy(mode, c.PolicyKey, c.PolicyRef)
			if err != nil {
				t.Fatal(err)
			}
			if other := seen[string(auth)]; other != "" {
				t.Errorf("%s and %s%s have one authPolicy", other, mode, name)
			}
			seen[string(auth)] = mode + name
		}
	}
}

// TestConsentBounds: no consent without an end, for too long, or for any session.
func TestConsentBounds(t *testing.T) {
	key := approverKey(t)
	k, err := attest.NewApproverKey(key)
	if err != nil {
		t.Fatal(err)
	}
	nonce := make([]byte, attest.NonceTPMSize)
	for _, seconds := range []int{-60, 0, attest.MaxReserve + 1, 1 << 40} {
		if _, err := k.Consent(nonce, seconds, []byte("x")); err == nil {
			t.Errorf("a consent for %d s", seconds)
		}
	}
	for _, n := range [][]byte{nil, nonce[1:], append(nonce, 0)} {
		if _, err := k.Consent(n, 60, []byte("x")); err == nil {
			t.Errorf("a consent for a nonce of %d bytes", len(n))
		}
	}
	x, err := k.Consent(nonce, attest.MaxReserve, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if err := attest.VerifyConsent(&key.PublicKey, x, nonce, []byte("x")); err != nil {
		t.Error(err)
	}
	if err := attest.VerifyConsent(&key.PublicKey, x, nonce, []byte("y")); err == nil {
		t.Error("a consent for another trust domain")
	}
	// It is none of an authorization, whatever is put in the place of what it lacks.
	if err := attest.VerifyAuthorizationBy(&key.PublicKey, x, nonce, [32]byte{}, []byte("x")); err == nil {
		t.Error("a consent passes for an authorization")
	}
}
