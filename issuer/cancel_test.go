package issuer_test

import (
	"crypto/ecdsa"
	"testing"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/issuer"
	"inkan/scope"
)

// TestCancelsAlone: an agent in approver mode gets a second action certificate
// where the inventory says so, for another key and for cancels alone.
func TestCancelsAlone(t *testing.T) {
	o := newOffice(t)
	if err := o.admin.AddAgent(t.Context(), issuer.Agent{Name: "b", Device: "host1", Scope: scopeJSON, Cancels: true}); err == nil {
		t.Error("a key for cancels beside a key in local mode")
	}
	p, err := attest.SignPolicy(o.policy, "approved", o.dev.Values(selection), attest.PolicyRef("example.org"), []*ecdsa.PublicKey{&newKey(t).PublicKey}...)
	o.must(t, err)
	o.must(t, o.admin.AddPolicy(t.Context(), issuer.Policy{Device: "*", Approved: *p}))
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "b", Device: "host1", Scope: scopeJSON, Approver: true, Cancels: true}))
	g, err := o.enrol(t, o.dev, "b")
	o.must(t, err)
	byPurpose := make(map[string]*certext.ActionCertificate)
	for n, c := range g.Certificates {
		if c.Purpose == attest.PurposeTLS {
			continue
		}
		a, err := certext.ParseAction(leaf(t, g, n))
		o.must(t, err)
		byPurpose[c.Purpose] = a
	}
	action, cancel := byPurpose[attest.PurposeAction], byPurpose[attest.PurposeCancel]
	if len(byPurpose) != 2 || len(g.Certificates) != 3 {
		t.Fatalf("%d certificates", len(g.Certificates))
	}
	full, err := scope.ParseCanonical(action.Scope)
	o.must(t, err)
	want, err := full.CancelsOnly()
	o.must(t, err)
	if string(cancel.Scope) != string(want.Canonical()) || cancel.Agent != action.Agent {
		t.Errorf("the key for cancels may do %s", cancel.Scope)
	}
	if action.Attestation.Mode != certext.ModeApprover || cancel.Attestation.Mode != certext.ModeLocal || action.Attestation.KeyName == cancel.Attestation.KeyName {
		t.Errorf("action key %+v, key for cancels %+v", action.Attestation, cancel.Attestation)
	}
	// Without the operator's word there is none.
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "c", Device: "host1", Scope: scopeJSON, Approver: true}))
	o.dev.Clock.Clock += 1000
	if g, err = o.enrol(t, o.dev, "c"); err != nil || len(g.Certificates) != 2 {
		t.Errorf("%d certificates, %v", len(g.Certificates), err)
	}
}
