package issuer_test

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"

	"inkan/attest"
	"inkan/internal/attester"
	"inkan/issuer"
)

// TestUnattested: a host without a TPM gets a certificate for the pinned key,
// where the inventory says so, and nothing else.
func TestUnattested(t *testing.T) {
	o := newOffice(t)
	key := newKey(t)
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	o.must(t, err)
	pin := fmt.Sprintf("%x", sha256.Sum256(spki))
	o.must(t, o.admin.AddDevice(t.Context(), issuer.Device{ID: "cloud1", EK: pin, Unattested: true}))
	for name, a := range map[string]issuer.Agent{
		"b":       {HSM: true},
		"tls":     {HSM: true, TLS: true},
		"no-hsm":  {},
		"bounded": {HSM: true, Scope: strings.Replace(scopeJSON, `"max_order_notional"`, `"max_attestation_age_s":3600,"max_order_notional"`, 1)},
	} {
		if a.Name, a.Device = name, "cloud1"; a.Scope == "" {
			a.Scope = scopeJSON
		}
		o.must(t, o.admin.AddAgent(t.Context(), a))
	}
	at := attester.Issuer{URL: "https://" + o.addresses.Agent, Roots: o.roots}
	declare := func(agent string, k *ecdsa.PrivateKey) error {
		out, err := attester.Declare(t.Context(), at, agent, k)
		if err == nil {
			_, err = out.Chain(attest.PurposeAction, k.Public())
		}
		return err
	}
	if err := declare("b", key); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, agent, check string
		key                *ecdsa.PrivateKey
	}{
		{"an agent of a host with a TPM", "a", "U1", key},
		{"a TLS key besides", "tls", "U1", key},
		{"no key in an HSM", "no-hsm", "U1", key},
		{"another key", "b", "U1", newKey(t)},
		{"a scope that bounds the attestation's age", "bounded", "U3", key},
		{"nobody", "nobody", "E9", key},
	} {
		if err := declare(c.agent, c.key); err == nil || !strings.Contains(err.Error(), c.check) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	o.must(t, o.admin.SetStatus(t.Context(), "b", issuer.Suspended))
	if err := declare("b", key); err == nil || !strings.Contains(err.Error(), "E9") {
		t.Errorf("a suspended agent: %v", err)
	}
	if err := o.admin.AddDevice(t.Context(), issuer.Device{ID: "cloud2", EK: strings.Repeat("ab", 32), Unattested: true, AllowExpired: true}); err == nil {
		t.Error("a host without a TPM has something of a TPM")
	}
}
