package attest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// inApproverMode makes the fixture's action key one in approver mode.
func (f *fixture) inApproverMode(t testing.TB) {
	t.Helper()
	c := f.x.Challenge
	auth, err := attest.KeyPolicy(attest.ModeApprover, c.PolicyKey, c.PolicyRef)
	if err != nil {
		t.Fatal(err)
	}
	f.x.AuthPolicies[attest.ModeApprover] = auth
	c.Keys[0] = attest.KeyRequest{Purpose: attest.PurposeAction, Mode: attest.ModeApprover, Template: attest.KeyTemplate(auth)}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p, err := attest.SignPolicy(f.policy, "with-approver", f.dev.Values(selection), c.PolicyRef, &k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	c.Policies = append(c.Policies, *p)
}

func TestAppraiseAcceptsKeyInApproverMode(t *testing.T) {
	f := newFixture(t)
	f.inApproverMode(t)
	r, err := attest.Appraise(&f.x, f.evidence(t))
	if err != nil {
		t.Fatal(err)
	}
	if k := r.Keys()[0]; k.Mode != attest.ModeApprover || k.CSR != nil || r.Policy() != "with-approver" {
		t.Errorf("key = %+v, policy %s", k, r.Policy())
	}
	if k := r.Keys()[1]; k.Mode != attest.ModeLocal || k.CSR == nil {
		t.Errorf("TLS key = %+v", k)
	}
}

func refusedBy(t *testing.T, check string, err error) {
	t.Helper()
	var r *attest.Refusal
	if !errors.As(err, &r) || r.Check != check {
		t.Errorf("%v, a refusal by %s is expected", err, check)
	}
}

// TestK3LocalKeyForApproverMode: a host cannot choose the weaker form.
func TestK3LocalKeyForApproverMode(t *testing.T) {
	f := newFixture(t)
	f.inApproverMode(t)
	f.dev.ChangeKey = func(purpose string, p *tpm2.TPMTPublic) {
		if purpose == attest.PurposeAction {
			p.AuthPolicy.Buffer = f.x.AuthPolicies[attest.ModeLocal]
		}
	}
	_, err := attest.Appraise(&f.x, f.evidence(t))
	refusedBy(t, "K3", err)
}

func TestK3ApproverModeNotExpected(t *testing.T) {
	f := newFixture(t)
	f.inApproverMode(t)
	delete(f.x.AuthPolicies, attest.ModeApprover)
	_, err := attest.Appraise(&f.x, f.evidence(t))
	refusedBy(t, "K3", err)
}

func TestK2RequestForApproverMode(t *testing.T) {
	f := newFixture(t)
	f.inApproverMode(t)
	f.dev.ChangeCSR = func(csr []byte) []byte {
		if csr == nil {
			return []byte{0x30, 0}
		}
		return csr
	}
	_, err := attest.Appraise(&f.x, f.evidence(t))
	refusedBy(t, "K2", err)
}

// TestP1LocalPolicyForApproverMode: approvals without approvers do not count for such a key.
func TestP1LocalPolicyForApproverMode(t *testing.T) {
	f := newFixture(t)
	f.inApproverMode(t)
	f.x.Challenge.Policies = f.x.Challenge.Policies[:1]
	_, err := attest.Appraise(&f.x, f.evidence(t))
	refusedBy(t, "P1", err)
}

func TestPoliciesOfModesDiffer(t *testing.T) {
	f := newFixture(t)
	f.inApproverMode(t)
	c := f.x.Challenge
	p := c.Policies[1]
	if err := attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, &p); err != nil {
		t.Fatal(err)
	}
	bare := p
	bare.Approvers = nil
	if attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, &bare) == nil {
		t.Error("an approval was taken without its approvers")
	}
	twice := p
	twice.Approvers = [][]byte{p.Approvers[0], p.Approvers[0]}
	if err := attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, &twice); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("an approver twice: %v", err)
	}
	other := p
	other.Approvers = [][]byte{c.PolicyKey}
	if attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, &other) == nil {
		t.Error("an approval was taken with another approver")
	}
	odd := p
	odd.Approvers = [][]byte{f.x.AK}
	if err := attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, &odd); err == nil {
		t.Error("an approver with another public area was taken")
	}
	local, err := attest.KeyPolicy(attest.ModeLocal, c.PolicyKey, c.PolicyRef)
	if err != nil || bytes.Equal(local, f.x.AuthPolicies[attest.ModeApprover]) {
		t.Errorf("modes have one authPolicy (%v)", err)
	}
	if _, err := attest.KeyPolicy("", c.PolicyKey, c.PolicyRef); err == nil {
		t.Error("no mode has an authPolicy")
	}
}

// TestSignCommandHash compares with go-tpm's computation of cpHash.
func TestSignCommandHash(t *testing.T) {
	name, digest := append([]byte{0, 0x0b}, bytes.Repeat([]byte{7}, 32)...), sha256.Sum256([]byte("x"))
	want, err := tpm2.CPHash[tpm2.SignResponse](tpm2.TPMAlgSHA256, tpm2.Sign{
		KeyHandle: tpm2.NamedHandle{Handle: 0x80000001, Name: tpm2.TPM2BName{Buffer: name}}, Digest: tpm2.TPM2BDigest{Buffer: digest[:]},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := attest.SignCommandHash(name, digest); !bytes.Equal(got[:], want.Buffer) {
		t.Errorf("%x, go-tpm has %x", got, want.Buffer)
	}
}

func TestActionKeyName(t *testing.T) {
	f := newFixture(t)
	ev := f.evidence(t)
	r, err := attest.Appraise(&f.x, ev)
	if err != nil {
		t.Fatal(err)
	}
	k := r.Keys()[0]
	name, err := attest.ActionKeyName(k.PublicKey.(*ecdsa.PublicKey), k.AuthPolicy)
	if err != nil || !bytes.Equal(name, k.Name) {
		t.Errorf("%x, %v: the TPM has %x", name, err, k.Name)
	}
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.ActionKeyName(&other.PublicKey, k.AuthPolicy); err == nil {
		t.Error("a P-384 key has a Name")
	}
}

func TestAuthorize(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	nonce, cp, ref := bytes.Repeat([]byte{5}, attest.NonceTPMSize), sha256.Sum256([]byte("command")), attest.PolicyRef("example.org")
	a, err := attest.Authorize(key, nonce, cp, ref)
	if err != nil {
		t.Fatal(err)
	}
	area, err := attest.PolicyKeyPublic(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	name, err := attest.KeyName(area)
	if err != nil || a.Approver != hex.EncodeToString(name) {
		t.Errorf("approver %s, %x is expected (%v)", a.Approver, name, err)
	}
	if err := attest.VerifyAuthorization(area, a, nonce, cp, ref); err != nil {
		t.Fatal(err)
	}
	for n, bad := range map[string][]byte{"empty": nil, "short": nonce[:16], "long": append(nonce, 0)} {
		if _, err := attest.Authorize(key, bad, cp, ref); err == nil {
			t.Errorf("a nonce that is %s was authorized", n)
		}
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.Authorize(p384, nonce, cp, ref); err == nil {
		t.Error("a P-384 key authorized")
	}
	otherCommand, otherNonce := sha256.Sum256(nil), bytes.Repeat([]byte{6}, attest.NonceTPMSize)
	late := *a
	late.Expiration = 3600
	for name, err := range map[string]error{
		"another command":      attest.VerifyAuthorization(area, a, nonce, otherCommand, ref),
		"another session":      attest.VerifyAuthorization(area, a, otherNonce, cp, ref),
		"another trust domain": attest.VerifyAuthorization(area, a, nonce, cp, attest.PolicyRef("example.com")),
		"another expiration":   attest.VerifyAuthorization(area, &late, nonce, cp, ref),
	} {
		if err == nil {
			t.Errorf("an authorization was taken for %s", name)
		}
	}
}
