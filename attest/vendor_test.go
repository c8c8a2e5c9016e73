package attest_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	stdasn1 "encoding/asn1"
	"encoding/pem"
	"errors"
	"maps"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"inkan/attest"
)

// maker is an HSM maker with a root of our own: root, intermediate, device.
type maker struct {
	roots                *x509.CertPool
	root, middle, device *x509.Certificate
	rootKey, middleKey   *ecdsa.PrivateKey
	deviceKey, key       *ecdsa.PrivateKey
	spki                 []byte
	leaf                 map[int][]byte // extensions of the key's certificate
	critical             bool
	ca                   bool
	claims               []claim // of the key's entity
	more                 [][]byte
	alg                  string
	version              int64
	spoil                func([]byte) []byte
	unsigned, nosigner   bool
}

type claim struct {
	n     []int
	value func(*cryptobyte.Builder)
}

func ecKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func der(t testing.TB, v any) []byte {
	t.Helper()
	b, err := stdasn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func bits(b ...byte) stdasn1.BitString { return stdasn1.BitString{Bytes: b, BitLength: 8 * len(b)} }

func yubiExtension(n int, value []byte, critical bool) pkix.Extension {
	return pkix.Extension{Id: stdasn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 41482, 4, n}, Value: value, Critical: critical}
}

func newMaker(t testing.TB) *maker {
	t.Helper()
	v := &maker{rootKey: ecKey(t), middleKey: ecKey(t), deviceKey: ecKey(t), key: ecKey(t), roots: x509.NewCertPool(), version: 1, alg: "1.2.840.10045.4.3.2"}
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	}
	v.root = v.issue(t, ca("root"), &v.rootKey.PublicKey, nil, v.rootKey)
	v.roots.AddCert(v.root)
	v.middle = v.issue(t, ca("middle"), &v.middleKey.PublicKey, v.root, v.rootKey)
	v.device = v.issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: "YubiHSM Attestation (7)"}, ExtraExtensions: []pkix.Extension{yubiExtension(2, der(t, 7), false)}}, &v.deviceKey.PublicKey, v.middle, v.middleKey)
	var err error
	if v.spki, err = x509.MarshalPKIXPublicKey(&v.key.PublicKey); err != nil {
		t.Fatal(err)
	}
	v.leaf = map[int][]byte{
		1: der(t, []byte{2, 3, 1}), 2: der(t, 7), 3: der(t, bits(1)), 4: der(t, bits(0, 1)), 5: der(t, bits(0, 0, 0, 0, 0, 0, 0, 0x80)), 6: der(t, 0x1234), 9: marshalUTF8(t, "mm-07"),
	}
	yes, no := boolean(true), boolean(false)
	v.claims = []claim{{[]int{1, 2, 0}, text("key-1")}, {[]int{1, 2, 1}, octets(v.spki)}, {[]int{1, 2, 2}, no}, {[]int{1, 2, 3}, yes}, {[]int{1, 2, 4}, yes}, {[]int{1, 2, 5}, yes}}
	return v
}

func marshalUTF8(t testing.TB, s string) []byte {
	t.Helper()
	b, err := stdasn1.MarshalWithParams(s, "utf8")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (v *maker) issue(t testing.TB, c *x509.Certificate, pub *ecdsa.PublicKey, parent *x509.Certificate, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	if parent == nil {
		parent = c
	}
	b, err := x509.CreateCertificate(rand.Reader, c, parent, pub, by)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func pemOf(certs ...*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}

// yubi makes what a YubiHSM 2 would.
func (v *maker) yubi(t testing.TB) []byte {
	t.Helper()
	c := &x509.Certificate{Subject: pkix.Name{CommonName: "YubiHSM Attestation id:0x1234"}, IsCA: v.ca, BasicConstraintsValid: v.ca}
	for _, n := range slices.Sorted(maps.Keys(v.leaf)) {
		c.ExtraExtensions = append(c.ExtraExtensions, yubiExtension(n, v.leaf[n], v.critical))
	}
	parent := *v.device
	parent.PublicKey = &v.deviceKey.PublicKey // which a test may have changed
	return pemOf(v.issue(t, c, &v.key.PublicKey, &parent, v.deviceKey), v.device, v.middle)
}

func octets(b []byte) func(*cryptobyte.Builder) { return tagged(0, b) }
func text(s string) func(*cryptobyte.Builder)   { return tagged(1, []byte(s)) }
func number(n byte) func(*cryptobyte.Builder)   { return tagged(4, []byte{n}) }
func boolean(v bool) func(*cryptobyte.Builder) {
	if v {
		return tagged(2, []byte{0xff})
	}
	return tagged(2, []byte{0})
}

func tagged(tag uint8, b []byte) func(*cryptobyte.Builder) {
	return func(out *cryptobyte.Builder) {
		out.AddASN1(asn1.Tag(tag).ContextSpecific(), func(c *cryptobyte.Builder) { c.AddBytes(b) })
	}
}

func oid(n ...int) stdasn1.ObjectIdentifier {
	return append(stdasn1.ObjectIdentifier{1, 2, 3, 999}, n...)
}

func entity(kind int, claims []claim) []byte {
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oid(0, kind))
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, c := range claims {
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1ObjectIdentifier(oid(c.n...))
					if c.value != nil {
						c.value(b)
					}
				})
			}
		})
	})
	return b.BytesOrPanic()
}

// evidence makes what the draft describes, by hand.
func (v *maker) evidence(t testing.TB) []byte {
	t.Helper()
	var tbs cryptobyte.Builder
	tbs.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(v.version)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for _, e := range v.more {
				b.AddBytes(e)
			}
			if v.claims != nil {
				b.AddBytes(entity(2, v.claims))
			}
		})
	})
	signed := tbs.BytesOrPanic()
	sum := sha256.Sum256(signed)
	sig, err := ecdsa.SignASN1(rand.Reader, v.deviceKey, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	if v.spoil != nil {
		signed = v.spoil(bytes.Clone(signed))
	}
	parts := strings.Split(v.alg, ".")
	alg := make(stdasn1.ObjectIdentifier, len(parts))
	for i, p := range parts {
		n, _ := new(big.Int).SetString(p, 10)
		alg[i] = int(n.Int64())
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(signed)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			if v.unsigned {
				return
			}
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
					b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddASN1OctetString([]byte("ak-1")) })
					if !v.nosigner {
						b.AddASN1(asn1.Tag(2).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddBytes(v.device.Raw) })
					}
				})
				b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(alg) })
				b.AddASN1OctetString(sig)
			})
		})
		b.AddASN1(asn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddBytes(v.middle.Raw) })
	})
	return pem.EncodeToMemory(&pem.Block{Type: "EVIDENCE", Bytes: b.BytesOrPanic()})
}

func (v *maker) set(n int, value func(*cryptobyte.Builder)) {
	for i := range v.claims {
		if v.claims[i].n[2] == n {
			v.claims[i].value = value
		}
	}
}

func (v *maker) drop(n int) {
	v.claims = slices.DeleteFunc(v.claims, func(c claim) bool { return c.n[2] == n })
}

func TestVendorEvidence(t *testing.T) {
	v := newMaker(t)
	for _, format := range []string{attest.VendorYubiHSM2, attest.VendorPKIX} {
		for _, critical := range []bool{false, true} {
			v.critical = critical
			ev := v.yubi(t)
			if format == attest.VendorPKIX {
				ak, err := x509.MarshalPKIXPublicKey(&v.deviceKey.PublicKey)
				if err != nil {
					t.Fatal(err)
				}
				v.more = [][]byte{entity(0, []claim{{[]int{1, 0, 2}, octets(ak)}}), entity(1, []claim{{[]int{1, 1, 0}, text("Maker")}, {[]int{1, 1, 7}, number(3)}}), entity(2, []claim{{[]int{1, 2, 1}, octets([]byte("another key"))}})}
				ev = v.evidence(t)
			}
			if err := attest.VerifyVendor(format, ev, v.spki, v.roots, time.Now()); err != nil {
				t.Errorf("%s: %v", format, err)
			}
		}
	}
}

func TestVendorRefusals(t *testing.T) {
	other := newMaker(t)
	past := time.Now().Add(-time.Minute).UTC().Format("20060102150405Z")
	for name, c := range map[string]struct {
		format string
		change func(v *maker)
		after  func(v *maker, ev []byte) []byte
	}{
		"H1 nothing":        {format: "yubihsm2", after: func(*maker, []byte) []byte { return nil }},
		"H1 unknown format": {format: "other"},
		"H1 too large":      {format: "yubihsm2", after: func(_ *maker, ev []byte) []byte { return append(ev, make([]byte, attest.MaxVendor)...) }},
		"H1 text behind":    {format: "yubihsm2", after: func(_ *maker, ev []byte) []byte { return append(ev, "x"...) }},
		"H1 not a certificate": {format: "yubihsm2", after: func(*maker, []byte) []byte {
			return []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		}},
		"H1 the device's is missing": {format: "yubihsm2", after: func(_ *maker, ev []byte) []byte {
			return ev[:bytes.Index(ev, []byte("-----END"))+len("-----END CERTIFICATE-----\n")]
		}},
		"H1 many certificates":       {format: "yubihsm2", after: func(v *maker, ev []byte) []byte { return append(ev, bytes.Repeat(pemOf(v.middle), 8)...) }},
		"H2 no roots":                {format: "yubihsm2", change: func(v *maker) { v.roots = nil }},
		"H2 another root":            {format: "yubihsm2", change: func(v *maker) { v.roots = other.roots }},
		"H2 another device's key":    {format: "yubihsm2", change: func(v *maker) { v.deviceKey = other.deviceKey }},
		"H2 the key's is a CA":       {format: "yubihsm2", change: func(v *maker) { v.ca = true }},
		"H3 another key":             {format: "yubihsm2", change: func(v *maker) { v.spki = other.spki }},
		"H4 imported":                {format: "yubihsm2", change: func(v *maker) { v.leaf[3] = der(t, bits(2)) }},
		"H4 imported wrapped":        {format: "yubihsm2", change: func(v *maker) { v.leaf[3] = der(t, bits(0x11)) }},
		"H5 exportable under wrap":   {format: "yubihsm2", change: func(v *maker) { v.leaf[5] = der(t, bits(0, 0, 0, 0, 0, 1, 0, 0x80)) }},
		"H7 no firmware version":     {format: "yubihsm2", change: func(v *maker) { delete(v.leaf, 1) }},
		"H7 no serial":               {format: "yubihsm2", change: func(v *maker) { delete(v.leaf, 2) }},
		"H7 no origin":               {format: "yubihsm2", change: func(v *maker) { delete(v.leaf, 3) }},
		"H7 no domains":              {format: "yubihsm2", change: func(v *maker) { delete(v.leaf, 4) }},
		"H7 no capabilities":         {format: "yubihsm2", change: func(v *maker) { delete(v.leaf, 5) }},
		"H7 no object id":            {format: "yubihsm2", change: func(v *maker) { delete(v.leaf, 6) }},
		"H7 no label":                {format: "yubihsm2", change: func(v *maker) { delete(v.leaf, 9) }},
		"H7 short capabilities":      {format: "yubihsm2", change: func(v *maker) { v.leaf[5] = der(t, bits(0, 0)) }},
		"H7 malformed origin":        {format: "yubihsm2", change: func(v *maker) { v.leaf[3] = []byte{1} }},
		"H8 another device's serial": {format: "yubihsm2", change: func(v *maker) { v.leaf[2] = der(t, 8) }},

		"H1 no PEM": {format: "pkix", after: func(*maker, []byte) []byte { return []byte("x") }},
		"H1 malformed DER": {format: "pkix", after: func(*maker, []byte) []byte {
			return []byte("-----BEGIN EVIDENCE-----\nMAAB\n-----END EVIDENCE-----\n")
		}},
		"H1 version 2":               {format: "pkix", change: func(v *maker) { v.version = 2 }},
		"H1 key twice":               {format: "pkix", change: func(v *maker) { v.more = [][]byte{entity(2, v.claims)} }},
		"H1 claim twice":             {format: "pkix", change: func(v *maker) { v.claims = append(v.claims, claim{[]int{1, 2, 2}, boolean(false)}) }},
		"H1 platform twice":          {format: "pkix", change: func(v *maker) { p := entity(1, []claim{{[]int{1, 1, 0}, text("M")}}); v.more = [][]byte{p, p} }},
		"H2 unsigned":                {format: "pkix", change: func(v *maker) { v.unsigned = true }},
		"H2 no signer":               {format: "pkix", change: func(v *maker) { v.nosigner = true }},
		"H2 pkix another root":       {format: "pkix", change: func(v *maker) { v.roots = other.roots }},
		"H2 altered":                 {format: "pkix", change: func(v *maker) { v.spoil = func(b []byte) []byte { b[len(b)-1] ^= 1; return b } }},
		"H2 SHA-1":                   {format: "pkix", change: func(v *maker) { v.alg = "1.2.840.10045.4.1" }},
		"H2 signed by another":       {format: "pkix", change: func(v *maker) { v.deviceKey = other.deviceKey }},
		"H2 signed by a CA":          {format: "pkix", change: func(v *maker) { v.device, v.deviceKey = v.middle, v.middleKey }},
		"H2 another AK is named":     {format: "pkix", change: func(v *maker) { v.more = [][]byte{entity(0, []claim{{[]int{1, 0, 2}, octets(v.spki)}})} }},
		"H3 pkix another key":        {format: "pkix", change: func(v *maker) { v.spki = other.spki }},
		"H3 no key":                  {format: "pkix", change: func(v *maker) { v.claims = nil; v.more = [][]byte{entity(1, []claim{{[]int{1, 1, 0}, text("M")}})} }},
		"H4 not local":               {format: "pkix", change: func(v *maker) { v.set(5, boolean(false)) }},
		"H5 extractable":             {format: "pkix", change: func(v *maker) { v.set(2, boolean(true)) }},
		"H5 was extractable":         {format: "pkix", change: func(v *maker) { v.set(4, boolean(false)) }},
		"H5 not sensitive":           {format: "pkix", change: func(v *maker) { v.set(3, boolean(false)) }},
		"H7 no local":                {format: "pkix", change: func(v *maker) { v.drop(5) }},
		"H7 no extractable":          {format: "pkix", change: func(v *maker) { v.drop(2) }},
		"H7 no never-extractable":    {format: "pkix", change: func(v *maker) { v.drop(4) }},
		"H7 no sensitive":            {format: "pkix", change: func(v *maker) { v.drop(3) }},
		"H7 no identifier":           {format: "pkix", change: func(v *maker) { v.drop(0) }},
		"H7 value left out":          {format: "pkix", change: func(v *maker) { v.set(5, nil) }},
		"H7 value of another kind":   {format: "pkix", change: func(v *maker) { v.set(5, number(1)) }},
		"H7 boolean that is neither": {format: "pkix", change: func(v *maker) { v.set(5, tagged(2, []byte{7})) }},
		"H7 malformed expiry":        {format: "pkix", change: func(v *maker) { v.claims = append(v.claims, claim{[]int{1, 2, 6}, tagged(3, []byte("soon"))}) }},
		"H8 debugging enabled":       {format: "pkix", change: func(v *maker) { v.more = [][]byte{entity(1, []claim{{[]int{1, 1, 7}, number(0)}})} }},
		"H8 debugging unknown":       {format: "pkix", change: func(v *maker) { v.more = [][]byte{entity(1, []claim{{[]int{1, 1, 7}, number(9)}})} }},
		"H8 debugging negative":      {format: "pkix", change: func(v *maker) { v.more = [][]byte{entity(1, []claim{{[]int{1, 1, 7}, number(0xff)}})} }},
		"H9 expired key":             {format: "pkix", change: func(v *maker) { v.claims = append(v.claims, claim{[]int{1, 2, 6}, tagged(3, []byte(past))}) }},
	} {
		t.Run(name, func(t *testing.T) {
			v := newMaker(t)
			if c.change != nil {
				c.change(v)
			}
			var ev []byte
			if c.format == "pkix" {
				ev = v.evidence(t)
			} else {
				ev = v.yubi(t)
			}
			if c.after != nil {
				ev = c.after(v, ev)
			}
			check, _, _ := strings.Cut(name, " ")
			err := attest.VerifyVendor(c.format, ev, v.spki, v.roots, time.Now())
			if !errors.Is(err, &attest.Refusal{Check: check}) {
				t.Errorf("got %v, want %s", err, check)
			}
		})
	}
	v := newMaker(t)
	ev := v.yubi(t)
	if err := attest.VerifyVendor("yubihsm2", ev, v.spki, v.roots, time.Now().Add(48*time.Hour)); !errors.Is(err, &attest.Refusal{Check: "H2"}) {
		t.Errorf("expired certificates: %v", err)
	}
}

func FuzzVendor(f *testing.F) {
	v := newMaker(f)
	f.Add(v.yubi(f))
	f.Add(v.evidence(f))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_ = attest.VerifyVendor("yubihsm2", b, v.spki, v.roots, time.Now())
		_ = attest.VerifyVendor("pkix", b, v.spki, v.roots, time.Now())
		_ = attest.VerifyVendor("pkix", pem.EncodeToMemory(&pem.Block{Type: "EVIDENCE", Bytes: b}), v.spki, v.roots, time.Now())
	})
}
