package attest_test

import (
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// newEpochFixture is an exchange with a device that has epochs, at epoch 5.
func newEpochFixture(t *testing.T) *fixture {
	t.Helper()
	f := newFixture(t)
	c := f.x.Challenge
	var err error
	if f.x.AuthPolicies[attest.ModeLocal], err = attest.EpochKeyPolicy(attest.ModeLocal, c.PolicyKey, c.PolicyRef); err != nil {
		t.Fatal(err)
	}
	for i := range c.Keys {
		c.Keys[i].Template = attest.KeyTemplate(f.x.AuthPolicies[attest.ModeLocal])
	}
	f.approveEpoch(t, "until-5", 5)
	c.Epoch, f.dev.Epoch, f.x.Epoch = &attest.EpochDemand{AtLeast: 5}, 5, 4
	return f
}

func (f *fixture) approveEpoch(t *testing.T, name string, epoch uint64) {
	t.Helper()
	c := f.x.Challenge
	p, err := attest.SignEpochPolicy(f.policy, name, f.dev.Values(selection), c.PolicyRef, epoch)
	if err != nil {
		t.Fatal(err)
	}
	c.Policies = append(c.Policies, *p)
}

func TestAppraiseAcceptsEpoch(t *testing.T) {
	f := newEpochFixture(t)
	r, err := attest.Appraise(&f.x, f.evidence(t))
	if err != nil || r.Epoch() != 5 || r.Policy() != "until-5" {
		t.Errorf("epoch %d, policy %s: %v", r.Epoch(), r.Policy(), err)
	}
}

func TestAppraiseRefusesEpoch(t *testing.T) {
	onEpoch := func(change func(*tpm2.TPMSAttest, *tpm2.TPMSNVCertifyInfo)) func(*testing.T, *fixture) {
		return func(_ *testing.T, f *fixture) {
			f.dev.Change = func(kind string, s *tpm2.TPMSAttest) {
				if kind == "epoch" {
					info, _ := s.Attested.NV() // it is one
					change(s, info)
				}
			}
		}
	}
	for _, c := range []struct {
		name, check string
		change      func(*testing.T, *fixture)
		evidence    func(*attest.Evidence)
	}{
		{"none", "N1", nil, func(ev *attest.Evidence) { ev.Epoch = nil }},
		{"not asked for", "N1", nil, func(ev *attest.Evidence) { ev.Epoch = &ev.Quote }},
		{"another type", "N1", nil, func(ev *attest.Evidence) { ev.Epoch = &ev.Quote }},
		{"a signature that does not fit", "N1", nil, func(ev *attest.Evidence) { ev.Epoch.Signature = ev.Quote.Signature }},
		{"of another exchange", "N1", onEpoch(func(s *tpm2.TPMSAttest, _ *tpm2.TPMSNVCertifyInfo) { s.ExtraData.Buffer[0]++ }), nil},
		{"by another key", "N1", onEpoch(func(s *tpm2.TPMSAttest, _ *tpm2.TPMSNVCertifyInfo) {
			s.QualifiedSigner.Buffer = append([]byte{0, 11}, make([]byte, 32)...)
		}), nil},
		{"another index", "N2", onEpoch(func(_ *tpm2.TPMSAttest, i *tpm2.TPMSNVCertifyInfo) { i.IndexName.Buffer[5]++ }), nil},
		{"half of it", "N2", onEpoch(func(_ *tpm2.TPMSAttest, i *tpm2.TPMSNVCertifyInfo) { i.NVContents.Buffer = i.NVContents.Buffer[:4] }), nil},
		{"at an offset", "N2", onEpoch(func(_ *tpm2.TPMSAttest, i *tpm2.TPMSNVCertifyInfo) { i.Offset = 1 }), nil},
		{"not there yet", "N3", func(_ *testing.T, f *fixture) { f.x.Challenge.Epoch.AtLeast = 6 }, nil},
		{"gone back", "N3", func(_ *testing.T, f *fixture) { f.x.Epoch = 6 }, nil},
		{"impossibly high", "N3", func(_ *testing.T, f *fixture) { f.dev.Epoch = 1 << 63 }, nil},
		{"the approval ended", "P1", func(_ *testing.T, f *fixture) { f.dev.Epoch = 6 }, nil},
		{"an approval without an epoch alone", "P1", func(_ *testing.T, f *fixture) { f.x.Challenge.Policies = f.x.Challenge.Policies[:1] }, nil},
		{"a key that takes approvals without one", "K3", func(t *testing.T, f *fixture) {
			auth, err := attest.KeyPolicy(attest.ModeLocal, f.x.Challenge.PolicyKey, f.x.Challenge.PolicyRef)
			if err != nil {
				t.Fatal(err)
			}
			f.dev.ChangeKey = func(_ string, p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = auth }
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newEpochFixture(t)
			if c.name == "not asked for" {
				f = newFixture(t)
			}
			if c.change != nil {
				c.change(t, f)
			}
			ev := f.evidence(t)
			if c.evidence != nil {
				c.evidence(ev)
			}
			if _, err := attest.Appraise(&f.x, ev); !errors.Is(err, &attest.Refusal{Check: c.check}) {
				t.Errorf("%v, %s is expected", err, c.check)
			}
		})
	}
}

// TestEpochOfApproval: the epoch is part of what the policy key signs.
func TestEpochOfApproval(t *testing.T) {
	f := newEpochFixture(t)
	c := f.x.Challenge
	p := c.Policies[1]
	if err := attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, &p); err != nil {
		t.Fatal(err)
	}
	for _, n := range []uint64{0, 4, 6, 1 << 63} {
		if p.Epoch = n; attest.VerifyPolicy(c.PolicyKey, c.PolicyRef, &p) == nil {
			t.Errorf("an approval for epoch 5 serves for %d", n)
		}
	}
	if _, err := attest.EpochKeyPolicy("x", c.PolicyKey, c.PolicyRef); err == nil {
		t.Error("an unknown mode")
	}
}

// TestAppraiseTestimony: what the TPM says of its signatures is checked where it is there.
func TestAppraiseTestimony(t *testing.T) {
	onAudit := func(change func(*tpm2.TPMSAttest, *tpm2.TPMSCommandAuditInfo)) func(*fixture) {
		return func(f *fixture) {
			f.dev.Change = func(kind string, s *tpm2.TPMSAttest) {
				if kind == "audit" {
					info, _ := s.Attested.CommandAudit() // it is one
					change(s, info)
				}
			}
		}
	}
	last := uint64(7)
	for _, c := range []struct {
		name, check string
		change      func(*fixture)
		evidence    func(*attest.Evidence)
	}{
		{"good", "", func(*fixture) {}, nil},
		{"none", "", func(f *fixture) { f.dev.Audit, f.x.Audit = 0, nil }, nil},
		{"none, and the device gave one before", "C1", func(f *fixture) { f.dev.Audit = 0 }, nil},
		{"another type", "C1", func(*fixture) {}, func(ev *attest.Evidence) { ev.Audit = &ev.Quote }},
		{"a signature that does not fit", "C1", func(*fixture) {}, func(ev *attest.Evidence) { ev.Audit.Signature = ev.Quote.Signature }},
		{"of another exchange", "C1", onAudit(func(s *tpm2.TPMSAttest, _ *tpm2.TPMSCommandAuditInfo) { s.ExtraData.Buffer[0]++ }), nil},
		{"by another key", "C1", onAudit(func(s *tpm2.TPMSAttest, _ *tpm2.TPMSCommandAuditInfo) {
			s.QualifiedSigner.Buffer = append([]byte{0, 11}, make([]byte, 32)...)
		}), nil},
		{"a digest of another size", "C1", onAudit(func(_ *tpm2.TPMSAttest, i *tpm2.TPMSCommandAuditInfo) { i.AuditDigest.Buffer = make([]byte, 20) }), nil},
		{"another hash", "C2", onAudit(func(_ *tpm2.TPMSAttest, i *tpm2.TPMSCommandAuditInfo) { i.DigestAlg = tpm2.TPMAlgSHA384 }), nil},
		{"TPM2_Sign is not audited", "C2", onAudit(func(_ *tpm2.TPMSAttest, i *tpm2.TPMSCommandAuditInfo) { i.CommandDigest.Buffer[0]++ }), nil},
		{"a counter that went back", "C2", func(f *fixture) { f.dev.Audit = 6 }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t)
			f.dev.Audit, f.x.Audit = 7, &last
			c.change(f)
			ev := f.evidence(t)
			if c.evidence != nil {
				c.evidence(ev)
			}
			r, err := attest.Appraise(&f.x, ev)
			switch {
			case c.check != "" && !errors.Is(err, &attest.Refusal{Check: c.check}):
				t.Errorf("%v, %s is expected", err, c.check)
			case c.check == "" && err != nil:
				t.Error(err)
			case c.name == "good" && (r.Testimony() == nil || r.Testimony().Counter != 7):
				t.Errorf("testimony %+v", r.Testimony())
			}
		})
	}
}
