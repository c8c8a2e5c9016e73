package attest_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"testing"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
)

// TestDeclaredKind: a declared key is of the kinds that any key in an HSM is.
func TestDeclaredKind(t *testing.T) {
	other, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	channel := bytes.Repeat([]byte{7}, attest.BindingSize)
	for _, key := range []crypto.Signer{other, weak} {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: certext.OIDChannel, Value: channel}}}, key)
		if err != nil {
			t.Fatal(err)
		}
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		pin := sha256.Sum256(spki)
		if _, err := attest.Accept(&attest.Declaration{Agent: "a", CSR: der}, pin[:], channel, time.Now()); !errors.Is(err, &attest.Refusal{Check: "K3"}) {
			t.Errorf("%s: %v", key.Public().(*ecdsa.PublicKey).Params().Name, err)
		}
	}
}

// TestU: a declaration is accepted for the pinned key, over its channel, signed.
func TestU(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	pin, channel := sha256.Sum256(spki), bytes.Repeat([]byte{7}, attest.BindingSize)
	request := func(extensions ...pkix.Extension) []byte {
		der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "a"}, ExtraExtensions: extensions}, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	good := request(pkix.Extension{Id: certext.OIDChannel, Value: channel})
	if d, err := attest.Accept(&attest.Declaration{Agent: "a", CSR: good}, pin[:], channel, time.Now()); err != nil || !d.Valid() || !key.PublicKey.Equal(d.Key()) {
		t.Fatalf("%+v, %v", d, err)
	}
	changed := bytes.Clone(good)
	changed[len(changed)-1] ^= 1
	elsewhere := bytes.Repeat([]byte{8}, attest.BindingSize)
	for name, c := range map[string]struct {
		csr, pin, channel []byte
		check             string
	}{
		"U1 another key":                      {good, elsewhere, channel, "U1"},
		"U1 no key is pinned":                 {good, nil, channel, "U1"},
		"U2 another channel":                  {good, pin[:], elsewhere, "U2"},
		"U2 no channel in the request":        {request(), pin[:], channel, "U2"},
		"U2 a signature that does not verify": {changed, pin[:], channel, "U2"},
		"U2 no request":                       {[]byte("x"), pin[:], channel, "U2"},
		"U2 too large":                        {make([]byte, 5<<10), pin[:], channel, "U2"},
	} {
		d, err := attest.Accept(&attest.Declaration{Agent: "a", CSR: c.csr}, c.pin, c.channel, time.Now())
		if r, ok := errors.AsType[*attest.Refusal](err); !ok || r.Check != c.check || d.Valid() {
			t.Errorf("%s: %v", name, err)
		}
	}
}
