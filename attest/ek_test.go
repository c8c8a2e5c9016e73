package attest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
	"inkan/internal/forge"
)

// vendor makes EK certificates.
type vendor struct {
	key *ecdsa.PrivateKey
	crt *x509.Certificate
}

func newVendor(t testing.TB) *vendor {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "TPM vendor"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &vendor{k, c}
}

// san is a subject alternative name with the TPM's attributes.
func san(t testing.TB, oids ...asn1.ObjectIdentifier) pkix.Extension {
	t.Helper()
	var set []pkix.AttributeTypeAndValue
	for _, id := range oids {
		set = append(set, pkix.AttributeTypeAndValue{Type: id, Value: "id:1"})
	}
	rdn, err := asn1.Marshal(pkix.RDNSequence{set})
	if err != nil {
		t.Fatal(err)
	}
	b, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: rdn}})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: b}
}

var tpmOIDs = []asn1.ObjectIdentifier{{2, 23, 133, 2, 1}, {2, 23, 133, 2, 2}, {2, 23, 133, 2, 3}}

func (v *vendor) issue(t testing.TB, key any, change func(*x509.Certificate)) []byte {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(77), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageKeyEncipherment,
		BasicConstraintsValid: true, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}}, ExtraExtensions: []pkix.Extension{san(t, tpmOIDs...)}}
	if change != nil {
		change(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, v.crt, key, v.key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// ca makes a CA below.
func (v *vendor) ca(t testing.TB, name string) (*vendor, []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der := v.issue(t, &k.PublicKey, func(c *x509.Certificate) {
		c.Subject, c.IsCA, c.KeyUsage, c.UnknownExtKeyUsage, c.ExtraExtensions = pkix.Name{CommonName: name}, true, x509.KeyUsageCertSign, nil, nil
	})
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &vendor{k, c}, der
}

func (v *vendor) crl(t testing.TB, next time.Time, serials ...int64) *x509.RevocationList {
	t.Helper()
	l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: next}
	for _, s := range serials {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, v.crt, v.key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseRevocationList(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// weakEK has the ROCA weakness: its modulus is a power of 65537 modulo every small prime.
func weakEK(t testing.TB) *big.Int {
	m := big.NewInt(1)
	for _, p := range []int64{2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167} {
		m.Mul(m, big.NewInt(p))
	}
	n := new(big.Int).Exp(big.NewInt(65537), big.NewInt(12345), m)
	n.Add(n, new(big.Int).Mul(m, new(big.Int).Lsh(big.NewInt(1), uint(2047-m.BitLen()))))
	for n.BitLen() < 2048 {
		n.Add(n, new(big.Int).Mul(m, new(big.Int).Lsh(big.NewInt(1), uint(2048-m.BitLen()-1))))
	}
	if n.BitLen() != 2048 {
		t.Fatalf("the fixture has %d bits", n.BitLen())
	}
	return n
}

// TestEK forges one fault each in what a host says of its endorsement key; the
// check that must refuse it is the first word of the name.
func TestEK(t *testing.T) {
	dev, err := forge.New()
	if err != nil {
		t.Fatal(err)
	}
	v := newVendor(t)
	key := &dev.EK.PublicKey
	public := func(change func(*tpm2.TPMTPublic)) func(*attest.Hello) {
		return func(h *attest.Hello) {
			p, err := tpm2.Unmarshal[tpm2.TPMTPublic](h.EKPublic)
			if err != nil {
				t.Fatal(err)
			}
			change(p)
			h.EKPublic = tpm2.Marshal(*p)
		}
	}
	attribute := func(change func(*tpm2.TPMAObject)) func(*attest.Hello) {
		return public(func(p *tpm2.TPMTPublic) { change(&p.ObjectAttributes) })
	}
	modulus := func(n *big.Int, bits tpm2.TPMKeyBits) func(*attest.Hello) {
		return public(func(p *tpm2.TPMTPublic) {
			parms, _ := p.Parameters.RSADetail()
			parms.KeyBits = bits
			p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: n.Bytes()})
		})
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	certificate := func(change func(*x509.Certificate)) func(*attest.Hello) {
		der := v.issue(t, key, change)
		return func(h *attest.Hello) { h.EKCertificate = der }
	}
	expired := certificate(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	// under has the EK certified by a CA two steps below the root, whose
	// certificates are one after the other in NV, as Intel's firmware TPM has them.
	under := func(padding int, split bool) func(*attest.Hello) {
		return func(h *attest.Hello) {
			first, one := v.ca(t, "first")
			second, two := first.ca(t, "second")
			h.EKCertificate = second.issue(t, key, nil)
			all := append(append(append(bytes.Clone(one), make([]byte, padding)...), two...), bytes.Repeat([]byte{0xff}, padding)...)
			h.EKChain = [][]byte{all}
			if split {
				h.EKChain = [][]byte{all[:100], all[100 : len(one)+50], all[len(one)+50:]}
			}
		}
	}
	for name, c := range map[string]struct {
		hello   func(*attest.Hello)
		options func(*attest.EKOptions)
	}{
		"ok":              {},
		"ok with padding": {hello: func(h *attest.Hello) { h.EKCertificate = append(h.EKCertificate, 0xff, 0xff, 0xff) }},
		"ok with a CRL": {options: func(o *attest.EKOptions) {
			o.RequireCRL = true
			o.CRLs = []*x509.RevocationList{v.crl(t, time.Now().Add(time.Hour), 5)}
		}},
		"ok expired, and the record allows it": {hello: expired, options: func(o *attest.EKOptions) { o.AllowExpired = true }},
		"E1 bytes behind the certificate":      {hello: func(h *attest.Hello) { h.EKCertificate = append(h.EKCertificate, 1, 2) }},
		"E1 bytes that are no text behind it":  {hello: func(h *attest.Hello) { h.EKCertificate = append(h.EKCertificate, 0x80, 0x91, 0xfe) }},
		"E1 both kinds of padding":             {hello: func(h *attest.Hello) { h.EKCertificate = append(h.EKCertificate, 0, 0xff) }},
		"ok with two CAs in one NV index":      {hello: under(0, false)},
		"ok with two CAs, padded":              {hello: under(7, false)},
		"ok with two CAs over NV indexes":      {hello: under(0, true)},
		"E2 a CA is missing":                   {hello: func(h *attest.Hello) { under(0, false)(h); h.EKChain[0] = h.EKChain[0][:len(h.EKChain[0])/2] }},
		"E2 CAs without an end":                {hello: func(h *attest.Hello) { under(0, false)(h); h.EKChain[0] = bytes.Repeat(h.EKChain[0], 5) }},
		"E2 bytes behind the CAs":              {hello: func(h *attest.Hello) { under(0, false)(h); h.EKChain[0] = append(h.EKChain[0], 1, 2) }},
		"E2 a chain that is too large": {hello: func(h *attest.Hello) {
			under(0, false)(h)
			h.EKChain[0] = append(h.EKChain[0], make([]byte, 40<<10)...)
		}},
		"E1 no certificate in NV":            {hello: func(h *attest.Hello) { h.EKCertificate = []byte{0xff, 0xff} }},
		"E1 a certificate that is too large": {hello: func(h *attest.Hello) { h.EKCertificate = append(h.EKCertificate, make([]byte, 9<<10)...) }},
		"E2 another vendor":                  {hello: func(h *attest.Hello) { h.EKCertificate = newVendor(t).issue(t, key, nil) }},
		"E2 too many intermediates":          {hello: func(h *attest.Hello) { h.EKChain = make([][]byte, 9) }},
		"E2 no roots":                        {options: func(o *attest.EKOptions) { o.Roots = nil }},
		"E3 critical name without the TPM's": {hello: certificate(func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{san(t, tpmOIDs[:2]...)} })},
		"E3 unknown critical extension": {hello: certificate(func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		})},
		"E4 no extended key usage": {hello: certificate(func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil })},
		"E4 another key usage":     {hello: certificate(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature })},
		"E4 a CA":                  {hello: certificate(func(c *x509.Certificate) { c.IsCA = true })},
		"E5 expired":               {hello: expired},
		"E5 not valid yet":         {hello: certificate(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })},
		"E5 revoked":               {options: func(o *attest.EKOptions) { o.CRLs = []*x509.RevocationList{v.crl(t, time.Now().Add(time.Hour), 77)} }},
		"E5 no CRL":                {options: func(o *attest.EKOptions) { o.RequireCRL = true }},
		"E5 CRL that is over": {options: func(o *attest.EKOptions) {
			o.RequireCRL = true
			o.CRLs = []*x509.RevocationList{v.crl(t, time.Now().Add(-time.Minute))}
		}},
		"E6 certificate for another": {hello: func(h *attest.Hello) { h.EKCertificate = v.issue(t, &small.PublicKey, nil) }},
		"E7 EK that signs":           {hello: attribute(func(a *tpm2.TPMAObject) { a.SignEncrypt = true })},
		"E7 EK that is unrestricted": {hello: attribute(func(a *tpm2.TPMAObject) { a.Restricted = false })},
		"E7 EK that can be moved":    {hello: attribute(func(a *tpm2.TPMAObject) { a.FixedTPM = false })},
		"E7 EK that was imported":    {hello: attribute(func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false })},
		"E7 EK of a password":        {hello: attribute(func(a *tpm2.TPMAObject) { a.UserWithAuth = true })},
		"E7 EK of another policy":    {hello: public(func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, 32) })},
		"E7 EK that is garbage":      {hello: func(h *attest.Hello) { h.EKPublic = []byte("garbage") }},
		"E7 EK with another exponent": {hello: public(func(p *tpm2.TPMTPublic) {
			parms, _ := p.Parameters.RSADetail()
			parms.Exponent = 3
		})},
		"E8 EK that is short":          {hello: modulus(small.N, 1024)},
		"E8 EK with the ROCA weakness": {hello: modulus(weakEK(t), 2048)},
		"E10 EK that is not pinned":    {options: func(o *attest.EKOptions) { o.Pin = make([]byte, 32) }},
		"E11 no certificate":           {hello: func(h *attest.Hello) { h.EKCertificate = nil }},
	} {
		t.Run(name, func(t *testing.T) {
			h := dev.Hello
			h.EKCertificate = v.issue(t, key, nil)
			if c.hello != nil {
				c.hello(&h)
			}
			roots := x509.NewCertPool()
			roots.AddCert(v.crt)
			o := attest.EKOptions{Roots: roots, Now: time.Now()}
			if c.options != nil {
				c.options(&o)
			}
			e, err := attest.VerifyEK(&h, o)
			check, _, _ := strings.Cut(name, " ")
			if check == "ok" {
				if err != nil || e.Kind() != attest.Certified {
					t.Errorf("refused: %v", err)
				}
				return
			}
			if !errors.Is(err, &attest.Refusal{Check: check}) || e != nil {
				t.Errorf("got %v, want a refusal by %s", err, check)
			}
		})
	}
}

func TestMakeCredentialNeedsAnEndorsement(t *testing.T) {
	if _, err := attest.MakeCredential(nil, nil, nil, rand.Reader); err == nil {
		t.Error("nil is no endorsement")
	}
	if _, err := attest.MakeCredential(&attest.Endorsement{}, nil, nil, rand.Reader); err == nil {
		t.Error("the zero value is no endorsement")
	}
}

func TestPolicies(t *testing.T) {
	f := newFixture(t)
	good := f.dev.Values(selection)
	for name, values := range map[string][]attest.PCRValue{
		"nothing":        nil,
		"PCR 16":         {{Bank: "sha256", Index: 16, Digest: make([]byte, 32)}},
		"PCR 23":         {{Bank: "sha256", Index: 23, Digest: make([]byte, 32)}},
		"SHA-1":          {{Bank: "sha1", Index: 0, Digest: make([]byte, 20)}},
		"a short value":  {{Bank: "sha256", Index: 0, Digest: make([]byte, 20)}},
		"twice the same": {good[0], good[0]},
		"out of order":   {good[1], good[0]},
	} {
		if _, err := attest.SignPolicy(f.policy, "p", values, nil); err == nil {
			t.Errorf("%s was approved", name)
		}
	}
	p, err := attest.SignPolicy(f.policy, "p", good, []byte("a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := attest.VerifyPolicy(f.x.Challenge.PolicyKey, []byte("b"), p); err == nil {
		t.Error("an approval for one policyRef serves another")
	}
	if _, err := attest.SignPolicy(f.policy, "no spaces", good, nil); err == nil {
		t.Error("a name with a space")
	}
}

func FuzzVerifyEK(f *testing.F) {
	dev, err := forge.New()
	if err != nil {
		f.Fatal(err)
	}
	v := newVendor(f)
	roots := x509.NewCertPool()
	roots.AddCert(v.crt)
	f.Add(dev.Hello.EKPublic, v.issue(f, &dev.EK.PublicKey, nil), []byte{})
	f.Fuzz(func(_ *testing.T, public, certificate, intermediate []byte) {
		_, _ = attest.VerifyEK(&attest.Hello{EKPublic: public, EKCertificate: certificate, EKChain: [][]byte{intermediate}}, attest.EKOptions{Roots: roots, Now: time.Now()}) // it must not crash
		_, _ = attest.CheckAK(public)
	})
}
