package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/internal/testca"
	"inkan/simulator"
)

// TestAdministrators: who has the issuer's directory and CA key certifies
// administrators, the first again before the year is over, and others; the server takes
// them at once.
func TestAdministrators(t *testing.T) {
	dir, theirs := filepath.Join(t.TempDir(), "issuer"), t.TempDir()
	must := func(args ...string) string {
		t.Helper()
		code, out, errs := call("", args...)
		if code != 0 {
			t.Fatalf("%v: exit code %d: %s", args, code, errs)
		}
		return out
	}
	args := []string{"issuer", "init", "--dir", dir, "--trust-domain", "example.org"}
	for _, flag := range []string{"--agent-listen", "--admin-listen", "--public-listen"} {
		args = append(args, flag, simulator.FreePortForTest(t))
	}
	must(args...)
	var at struct{ Agent, Admin, Public string }
	startCommand(t, &at, "issuer", "serve", "--dir", dir)
	read := func(path string) *x509.Certificate {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(b)
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	old := read(filepath.Join(dir, "admin.pem"))
	must("issuer", "admin", "--dir", dir)
	renewed := read(filepath.Join(dir, "admin.pem"))
	if renewed.SerialNumber.Cmp(old.SerialNumber) == 0 || time.Until(renewed.NotAfter) < 364*24*time.Hour {
		t.Errorf("it was not renewed: until %s", renewed.NotAfter)
	}
	must("issuer", "certificate", "revoke", "--dir", dir, "--serial", strings.ToUpper(old.SerialNumber.Text(16)), "--reason", "superseded")
	must("issuer", "device", "list", "--dir", dir)

	// Another one, whose key was made elsewhere.
	path := func(name string) string { return filepath.Join(theirs, name) }
	for _, a := range [][]string{{"genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path("admin.key")}, {"pkey", "-in", path("admin.key"), "-pubout", "-out", path("alice.pub")}} {
		if out, err := exec.Command("openssl", a...).CombinedOutput(); err != nil {
			t.Fatalf("openssl: %s", out)
		}
	}
	if code, _, errs := call("", "issuer", "admin", "--dir", dir, "--public-key", path("alice.pub")); code != exitUsage || !strings.Contains(errs, "--out") {
		t.Errorf("another's key over one's own certificate: exit code %d: %s", code, errs)
	}
	must("issuer", "admin", "--dir", dir, "--name", "alice", "--public-key", path("alice.pub"), "--out", path("admin.pem"))
	if c := read(path("admin.pem")); c.Subject.CommonName != "alice" {
		t.Errorf("the certificate is %s's", c.Subject)
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, path("ca.pem"), ca)
	must("issuer", "device", "list", "--dir", theirs, "--admin-url", "https://"+at.Admin)
	if code, _, errs := call("", "issuer", "admin", "--dir", dir, "--name", "Alice!"); code != exitError || !strings.Contains(errs, "lower-case") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

// TestAdministratorsEnd: the commands say in time that the certificate ends.
func TestAdministratorsEnd(t *testing.T) {
	ca, dir := testca.New(t), t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, der []byte) {
		writeFile(t, filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	write("ca.pem", "CERTIFICATE", ca.Certificate.Raw)
	write("admin.key", "PRIVATE KEY", der)
	for left, want := range map[time.Duration]string{
		-time.Minute: "certificate ended at", 10 * 24 * time.Hour: "certificate ends at", 100 * 24 * time.Hour: "asking the issuer",
	} {
		c := ca.TLS(t, "", &key.PublicKey, nil, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(left) })
		write("admin.pem", "CERTIFICATE", c.Raw)
		code, _, errs := call("", "issuer", "device", "list", "--dir", dir, "--admin-url", "https://127.0.0.1:1")
		if code != exitError || !strings.Contains(errs, want) || strings.Contains(errs, "inkan issuer admin") != (left < adminNotice) {
			t.Errorf("%s left: exit code %d: %s", left, code, errs)
		}
	}
}
