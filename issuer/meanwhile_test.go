package issuer_test

import (
	"errors"
	"strings"
	"testing"

	"inkan/attest"
	"inkan/internal/forge"
	"inkan/internal/problem"
	"inkan/issuer"
)

// TestMeanwhile: what an operator changes, and what another exchange of the
// device brings, while an exchange is under way holds for that exchange too. Each has
// the check that must decide as the first word of its name.
func TestMeanwhile(t *testing.T) {
	retire := func(t *testing.T, o *office) {
		t.Helper()
		o.must(t, o.admin.SetStatus(t.Context(), "a", issuer.Retired))
		o.must(t, o.admin.RemoveDevice(t.Context(), "host1"))
	}
	for name, change := range map[string]func(*testing.T, *office){
		"P1 the policy is retired": func(t *testing.T, o *office) { o.must(t, o.admin.RetirePolicy(t.Context(), "good")) },
		"N3 an epoch is demanded": func(t *testing.T, o *office) {
			p, err := attest.SignEpochPolicy(o.policy, "until-7", o.dev.Values(selection), attest.PolicyRef("example.org"), 7)
			o.must(t, err)
			o.must(t, o.admin.AddPolicy(t.Context(), issuer.Policy{Device: "host1", Approved: *p}))
			o.must(t, o.admin.SetEpoch(t.Context(), "host1", 7))
		},
		"E9 the agent is suspended": func(t *testing.T, o *office) { o.must(t, o.admin.SetStatus(t.Context(), "a", issuer.Suspended)) },
		"E9 the device is another": func(t *testing.T, o *office) {
			retire(t, o)
			other, err := forge.New()
			o.must(t, err)
			o.must(t, o.addDevice(t, "host1", other))
			o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "a", Device: "host1", Scope: scopeJSON, TLS: true}))
		},
		"E9 the agent is another": func(t *testing.T, o *office) {
			retire(t, o)
			o.must(t, o.addDevice(t, "host1", o.dev))
			o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "a", Device: "host1", Scope: scopeJSON, Approver: true}))
		},
		"E9 another attestation key is on record": func(t *testing.T, o *office) {
			other, err := forge.New()
			o.must(t, err)
			ak, public, signer := o.dev.AK, o.dev.Hello.AKPublic, o.dev.Signer
			o.dev.AK, o.dev.Hello.AKPublic, o.dev.Signer = other.AK, other.Hello.AKPublic, other.Signer
			_, err = o.enrol(t, o.dev, "a")
			o.must(t, err)
			o.dev.AK, o.dev.Hello.AKPublic, o.dev.Signer = ak, public, signer
		},
		"E9 another storage root key is on record": func(t *testing.T, o *office) {
			other, err := forge.New()
			o.must(t, err)
			srk, public := o.dev.SRK, o.dev.Hello.SRKPublic
			o.dev.SRK, o.dev.Hello.SRKPublic = other.SRK, other.Hello.SRKPublic
			_, err = o.enrol(t, o.dev, "a")
			o.must(t, err)
			o.dev.SRK, o.dev.Hello.SRKPublic = srk, public
		},
		"Q6 the TPM was reset": func(t *testing.T, o *office) {
			o.dev.Clock.ResetCount++
			_, err := o.enrol(t, o.dev, "a")
			o.must(t, err)
			o.dev.Clock.ResetCount--
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t)
			x := o.begin(t)
			defer x.channel.Close()
			change(t, o)
			err := x.channel.Post(t.Context(), "/v1/sessions/evidence", o.evidence(t, x), new(attest.Grant))
			check, _, _ := strings.Cut(name, " ")
			if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Check != check {
				t.Errorf("got %v, want a refusal by %s", err, check)
			}
		})
	}
}

// TestLaterEvidenceStays: an exchange that ends after one whose evidence is
// newer does not put the record of the device back.
func TestLaterEvidenceStays(t *testing.T) {
	o := newOffice(t)
	x := o.begin(t)
	defer x.channel.Close()
	old := o.evidence(t, x)
	o.dev.Clock.Clock += 5000
	_, err := o.enrol(t, o.dev, "a")
	o.must(t, err)
	o.must(t, x.channel.Post(t.Context(), "/v1/sessions/evidence", old, new(attest.Grant)))
	o.dev.Clock.Clock--
	if _, err = o.enrol(t, o.dev, "a"); err == nil || !strings.Contains(err.Error(), "Q6") {
		t.Errorf("a clock that went back behind the newest evidence: %v", err)
	}
}

// TestIssueAfterSuspension: whatever the decision was made on, no certificate
// comes into the inventory once its agent's were revoked.
func TestIssueAfterSuspension(t *testing.T) {
	o := newOffice(t)
	o.must(t, issuer.Late(t.Context(), o.issuer, "a", &newKey(t).PublicKey)())
	for _, status := range []string{issuer.Suspended, issuer.Retired} {
		late := issuer.Late(t.Context(), o.issuer, "a", &newKey(t).PublicKey)
		o.must(t, o.admin.SetStatus(t.Context(), "a", status))
		if err := late(); !errors.Is(err, &attest.Refusal{Check: "E9"}) {
			t.Errorf("%s: %v", status, err)
		}
		list, err := o.admin.Certificates(t.Context(), "a")
		o.must(t, err)
		for _, c := range list {
			if c.Revoked.IsZero() {
				t.Errorf("%s: certificate %s is not revoked", status, c.Serial)
			}
		}
	}
}
