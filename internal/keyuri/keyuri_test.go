package keyuri_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/internal/keyuri"
	"inkan/simulator"
	"inkan/tpm"
)

func signs(t *testing.T, uri string) {
	t.Helper()
	k, closer, err := keyuri.Open(uri)
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	sum := sha256.Sum256([]byte("a certificate"))
	sig, err := k.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), sum[:], sig) {
		t.Errorf("%s does not sign: %v", uri, err)
	}
}

func TestFile(t *testing.T) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	signs(t, "file:"+path)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, _, err := keyuri.Open("file:" + path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that others may read: %v", err)
	}
}

func TestTPM(t *testing.T) {
	s := simulator.TPMForTest(t)
	d, err := tpm.Open(s.Address)
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := d.CreateKey(tpm.SigningTemplate())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca.tss2.pem")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	signs(t, "tpm:"+s.Address+"?key="+path)
}

func TestBadURIs(t *testing.T) {
	for uri, want := range map[string]string{
		"/etc/ca.key":        "a URI is expected",
		"http://x":           "file, tpm or pkcs11",
		"tpm:/dev/tpmrm0":    "tpm:ADDRESS?key=FILE",
		"file:/nowhere":      "no such file",
		"pkcs11:token=T":     "id= is missing",
		"pkcs11:token=T;x=1": "",
	} {
		if _, _, err := keyuri.Open(uri); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want something about %q", uri, err, want)
		}
	}
}
