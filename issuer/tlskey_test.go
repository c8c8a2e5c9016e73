package issuer_test

import (
	"strings"
	"testing"

	"inkan/issuer"
)

// TestTLSKeyInAnHSM: the TLS key may be in an HSM, whatever the action key is
// in; an agent in approver mode shows approvers one in the TPM.
func TestTLSKeyInAnHSM(t *testing.T) {
	o := newOffice(t)
	for name, a := range map[string]issuer.Agent{"both": {HSM: true, TLSHSM: true}, "tls-alone": {TLSHSM: true}, "tpm": {TLS: true}} {
		a.Name, a.Device, a.Scope = name, "host1", scopeJSON
		o.must(t, o.admin.AddAgent(t.Context(), a))
		g, err := o.dev.Enrol(t.Context(), "https://"+o.addresses.Agent, o.roots, name, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		c := leaf(t, g, 1)
		if len(c.ExtKeyUsage) != 1 || len(c.URIs) != 1 || !strings.HasSuffix(c.URIs[0].Path, "/"+name) {
			t.Errorf("%s: the TLS certificate is for %v, %v", name, c.ExtKeyUsage, c.URIs)
		}
		agents, err := o.admin.Agents(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range agents {
			if x.Name == name && (x.TLSHSM != a.TLSHSM || x.TLS != a.TLS) {
				t.Errorf("%s reads back as %+v", name, x)
			}
		}
	}
	if err := o.admin.AddAgent(t.Context(), issuer.Agent{Name: "x", Device: "host1", Scope: scopeJSON, Approver: true, TLSHSM: true}); err == nil || !strings.Contains(err.Error(), "a TLS key in the TPM") {
		t.Errorf("approver mode with a TLS key in an HSM: %v", err)
	}
}
