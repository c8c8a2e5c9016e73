package attest_test

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"inkan/attest"
	"inkan/internal/forge"
)

func inPEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// TestBundles: no block of a bundle is passed over, as package pem does with what
// it cannot read; text around the blocks is, since vendors put names there.
func TestBundles(t *testing.T) {
	v := newVendor(t)
	crt, crl := inPEM("CERTIFICATE", v.crt.Raw), inPEM("X509 CRL", v.crl(t, time.Now().Add(time.Hour)).Raw)
	glued := func(s string) string { return strings.TrimSuffix(s, "\n") + s }
	broken := func(s string) string { return strings.Replace(s, "\nMI", "\n!!", 1) }
	for name, c := range map[string]struct {
		crt, crl string
		count    int // 0: refused
	}{
		"one":                    {crt, crl, 1},
		"two":                    {crt + "\n" + crt, crl + "\n" + crl, 2},
		"with names":             {"# a root\n" + crt + "another:\n" + crt + "the end\n", "# a list\n" + crl + "another:\n" + crl + "the end\n", 2},
		"nothing":                {"", "", 0},
		"text alone":             {"text", "text", 0},
		"glued together":         {glued(crt) + crt, glued(crl) + crl, 0},
		"one that is malformed":  {crt + broken(crt), crl + broken(crl), 0},
		"malformed at the start": {broken(crt) + crt, broken(crl) + crl, 0},
		"cut off":                {crt + crt[:len(crt)/2], crl + crl[:len(crl)/2], 0},
		"of another kind":        {crt + crl, crl + crt, 0},
		"trailing bytes inside":  {crt + inPEM("CERTIFICATE", append(v.crt.Raw, 0)), crl + inPEM("X509 CRL", []byte{0x30, 0}), 0},
	} {
		if list, err := attest.ParseCertificates([]byte(c.crt)); len(list) != c.count || (err == nil) != (c.count > 0) {
			t.Errorf("%s: %d certificates, %v", name, len(list), err)
		}
		if list, err := attest.ParseCRLs([]byte(c.crl)); len(list) != c.count || (err == nil) != (c.count > 0) {
			t.Errorf("%s: %d lists, %v", name, len(list), err)
		}
	}
}

// TestPartialCRL: a list that says by a critical extension that it is not the
// whole one is none (RFC 5280, section 5.2).
func TestPartialCRL(t *testing.T) {
	v := newVendor(t)
	dev, err := forge.New()
	if err != nil {
		t.Fatal(err)
	}
	h := dev.Hello
	h.EKCertificate = v.issue(t, &dev.EK.PublicKey, nil)
	roots := x509.NewCertPool()
	roots.AddCert(v.crt)
	base, err := asn1.Marshal(1)
	if err != nil {
		t.Fatal(err)
	}
	for name, list := range map[string]x509.RevocationList{
		"a delta":           {ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: base}}},
		"of CAs alone":      {ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 3, 0x82, 1, 0xff}}}},
		"of several makers": {RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: big.NewInt(9), RevocationTime: time.Now(), ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 29}, Critical: true, Value: []byte{0x30, 0}}}}}},
	} {
		list.Number, list.ThisUpdate, list.NextUpdate = big.NewInt(1), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateRevocationList(rand.Reader, &list, v.crt, v.key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := attest.ParseCRLs([]byte(inPEM("X509 CRL", der))); err == nil || !strings.Contains(err.Error(), "critical extension") {
			t.Errorf("%s was taken from an operator: %v", name, err)
		}
		l, err := x509.ParseRevocationList(der)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := attest.VerifyEK(&h, attest.EKOptions{Roots: roots, RequireCRL: true, CRLs: []*x509.RevocationList{l}, Now: time.Now()}); !errors.Is(err, &attest.Refusal{Check: "E5"}) {
			t.Errorf("%s stands for the whole list: %v", name, err)
		}
	}
}
