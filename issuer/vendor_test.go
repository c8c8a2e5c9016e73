package issuer_test

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/forge"
	"inkan/issuer"
)

// yubi makes what a YubiHSM 2 says of a key, and the root that it leads to.
func yubi(t *testing.T, d *forge.Device) (evidence, root []byte) {
	t.Helper()
	rootKey, deviceKey := newKey(t), newKey(t)
	if d.Keys[attest.PurposeAction] == nil {
		d.Keys[attest.PurposeAction] = newKey(t)
	}
	ext := func(n int, v any) pkix.Extension {
		b, err := asn1.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 41482, 4, n}, Value: b}
	}
	make := func(c, parent *x509.Certificate, pub, by any) *x509.Certificate {
		c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		if parent == nil {
			parent = c
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, by)
		if err != nil {
			t.Fatal(err)
		}
		out, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	r := make(&x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true}, nil, &rootKey.PublicKey, rootKey)
	device := make(&x509.Certificate{Subject: pkix.Name{CommonName: "device"}, ExtraExtensions: []pkix.Extension{ext(2, 7)}}, r, &deviceKey.PublicKey, rootKey)
	bits := func(b ...byte) asn1.BitString { return asn1.BitString{Bytes: b, BitLength: 8 * len(b)} }
	leaf := make(&x509.Certificate{Subject: pkix.Name{CommonName: "key"}, ExtraExtensions: []pkix.Extension{
		ext(1, []byte{2, 3, 1}), ext(2, 7), ext(3, bits(1)), ext(4, bits(0, 1)), ext(5, bits(0, 0, 0, 0, 0, 0, 0, 0x80)), ext(6, 1), ext(9, "mm-07")}}, device, &d.Keys[attest.PurposeAction].PublicKey, deviceKey)
	block := func(c *x509.Certificate) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return append(block(leaf), block(device)...), block(r)
}

// TestVendorAttestsTheKey: with evidence of the HSM's maker the certificate says
// hsm-attested; without it, or with another's, there is none.
func TestVendorAttestsTheKey(t *testing.T) {
	o := newOffice(t)
	evidence, root := yubi(t, o.dev)
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "declared", Device: "host1", Scope: scopeJSON, HSM: true}))
	o.must(t, o.admin.AddAgent(t.Context(), issuer.Agent{Name: "attested", Device: "host1", Scope: scopeJSON, HSM: true, Vendor: attest.VendorYubiHSM2, VendorRoots: string(root)}))
	with := func(agent string, vendor []byte) (*attest.Grant, error) {
		return o.dev.Enrol(t.Context(), "https://"+o.addresses.Agent, o.roots, agent, func(ev *attest.Evidence) { ev.Keys[0].Vendor = vendor })
	}
	for agent, c := range map[string]struct {
		vendor []byte
		want   string
	}{"declared": {nil, certext.ProtectionHSMDeclared}, "attested": {evidence, certext.ProtectionHSMAttested}} {
		g, err := with(agent, c.vendor)
		if err != nil {
			t.Fatalf("%s: %v", agent, err)
		}
		a, err := certext.ParseAttestation(leaf(t, g, 0))
		if err != nil || a.Protection != c.want {
			t.Errorf("%s: the certificate says %+v, %v", agent, a, err)
		}
	}
	another, err := forge.New()
	if err != nil {
		t.Fatal(err)
	}
	foreign, _ := yubi(t, another)
	otherKey, _ := yubi(t, o.dev) // of the same key, by another maker
	for _, c := range []struct {
		name, agent string
		vendor      []byte
		check       string
	}{
		{"none where it is asked for", "attested", nil, "H1"}, {"some where none is", "declared", evidence, "H1"},
		{"of another root", "attested", otherKey, "H2"}, {"of another key and root", "attested", foreign, "H2"},
	} {
		if _, err := with(c.agent, c.vendor); err == nil || !strings.Contains(err.Error(), c.check+":") {
			t.Errorf("%s: got %v, want %s", c.name, err, c.check)
		}
	}
	for want, a := range map[string]issuer.Agent{
		"yubihsm2 or pkix":    {Name: "x", Device: "host1", Scope: scopeJSON, HSM: true, Vendor: "acme", VendorRoots: string(root)},
		"for a key in an HSM": {Name: "x", Device: "host1", Scope: scopeJSON, Vendor: attest.VendorPKIX, VendorRoots: string(root)},
		"the roots":           {Name: "x", Device: "host1", Scope: scopeJSON, HSM: true, Vendor: attest.VendorPKIX},
	} {
		if err := o.admin.AddAgent(t.Context(), a); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want something about %q, got %v", want, err)
		}
	}
}
