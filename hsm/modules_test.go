//go:build cgo

package hsm_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"inkan/hsm"
	"inkan/simulator"
)

const libraries = "/usr/lib/x86_64-linux-gnu/"

// needs fails the test where a file is missing, and says what installs it.
func needs(t *testing.T, path, packages string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is missing: apt-get install %s", path, packages)
	}
}

// tool runs one of the tools of a module to its end.
func tool(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// signsBy makes a key, finds it again and signs with it in each way; each
// signature is verified inside.
func signsBy(t *testing.T, token *hsm.Token, a hsm.Algorithm, opts ...crypto.SignerOpts) *hsm.Key {
	t.Helper()
	made, err := token.GenerateKey(a, "test", nil)
	if err != nil {
		t.Errorf("%s: %v", a, err)
		return nil
	}
	k, err := token.Key(made.Attributes().ID)
	if err != nil {
		t.Errorf("%s: %v", a, err)
		return nil
	}
	for _, o := range opts {
		in := make([]byte, 32)
		if h := o.HashFunc(); h != 0 {
			in = make([]byte, h.Size())
		}
		if _, err := k.Sign(rand.Reader, in, o); err != nil {
			t.Errorf("%s by %v: %v", a, o, err)
		}
	}
	return k
}

// lacks fails the test unless the token refuses to make a key, with a code of its own.
func lacks(t *testing.T, token *hsm.Token, a hsm.Algorithm, code uint) {
	t.Helper()
	_, err := token.GenerateKey(a, "test", nil)
	if c, ok := errors.AsType[*hsm.CodeError](err); !ok || c.Code != code {
		t.Errorf("%s: %v, the code %#x is expected", a, err, code)
	}
}

// TestTPM2PKCS11: keys in a TPM behind a PKCS#11 module. Each kind has a TPM of
// its own, since the module leaves keys loaded and there is no resource manager.
func TestTPM2PKCS11(t *testing.T) {
	const module = libraries + "pkcs11/libtpm2_pkcs11.so"
	needs(t, module, "libtpm2-pkcs11-1")
	needs(t, "/usr/bin/pkcs11-tool", "opensc")
	open := func(t *testing.T) *hsm.Token {
		s, dir := simulator.TPMForTest(t), t.TempDir()
		env := []string{"TPM2_PKCS11_STORE=" + dir, "TPM2_PKCS11_TCTI=swtpm:path=" + s.Address, "TSS2_LOG=all+NONE"}
		tool(t, env, "pkcs11-tool", "--module", module, "--init-token", "--slot", "1", "--label", "inkan", "--so-pin", "so-12345")
		tool(t, env, "pkcs11-tool", "--module", module, "--init-pin", "--token-label", "inkan", "--so-pin", "so-12345", "--pin", "user-12345")
		pin := filepath.Join(dir, "pin")
		if err := os.WriteFile(pin, []byte("user-12345\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		token, err := hsm.Open("pkcs11:token=inkan?module-path="+module+"&pin-source=file:"+pin, hsm.Options{Env: env, Sessions: 2, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = token.Close() })
		return token
	}
	t.Run("P-256", func(t *testing.T) { signsBy(t, open(t), hsm.P256, crypto.SHA256) })
	t.Run("P-384", func(t *testing.T) { signsBy(t, open(t), hsm.P384, crypto.SHA384) })
	t.Run("RSA-2048", func(t *testing.T) { signsBy(t, open(t), hsm.RSA2048, crypto.SHA256) })
	t.Run("others", func(t *testing.T) {
		token := open(t)
		lacks(t, token, hsm.RSA4096, 0x13)
		lacks(t, token, hsm.Ed25519, 0x70)
	})
}

// TestNSS: NSS's softokn, which takes its place of storage in an argument that
// no other module has, so p11-kit's proxy loads it.
func TestNSS(t *testing.T) {
	const proxy, softokn = libraries + "p11-kit-proxy.so", libraries + "libsoftokn3.so"
	needs(t, proxy, "p11-kit libp11-kit0")
	needs(t, softokn, "libnss3")
	needs(t, "/usr/bin/certutil", "libnss3-tools")
	dir, err := os.MkdirTemp("", "nss") // another user can get at it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	db, conf := filepath.Join(dir, "db"), filepath.Join(dir, "pkcs11", "modules")
	if err := errors.Join(os.MkdirAll(db, 0o755), os.MkdirAll(conf, 0o755), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	pin := filepath.Join(dir, "pin")
	for path, text := range map[string]string{
		pin:                               "user-12345\n",
		filepath.Join(conf, "nss.module"): "module: " + softokn + "\nx-init-reserved: configdir='sql:" + db + "' certPrefix='' keyPrefix='' secmod='' flags=\n",
		filepath.Join(dir, "pkcs11", "pkcs11.conf"): "user-config: only\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tool(t, nil, "certutil", "-N", "-d", "sql:"+db, "-f", pin)
	o := hsm.Options{Module: proxy, Sessions: 2, Timeout: time.Minute, Env: []string{"HOME=" + dir, "XDG_CONFIG_HOME=" + dir}}
	if os.Getuid() == 0 {
		o.Worker = asNobody(t, dir)
	}
	token, err := hsm.Open("pkcs11:token=NSS%20Certificate%20DB?pin-source=file:"+pin, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = token.Close() })
	k := signsBy(t, token, hsm.P256, crypto.SHA256)
	signsBy(t, token, hsm.P384, crypto.SHA384)
	signsBy(t, token, hsm.RSA2048, crypto.SHA256, &rsa.PSSOptions{Hash: crypto.SHA256})
	lacks(t, token, hsm.Ed25519, 0x70)
	if k != nil {
		if local := k.Attributes().Local; local == nil || *local {
			t.Errorf("CKA_LOCAL is %v: docs/hsm.md says that NSS does not set it", local)
		}
	}
}

// asNobody is the command of a worker that runs as another user: p11-kit reads
// no user's configuration as root.
func asNobody(t *testing.T, dir string) []string {
	t.Helper()
	needs(t, "/usr/bin/setpriv", "util-linux")
	self, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	worker := filepath.Join(dir, "worker")
	copied, err := os.OpenFile(worker, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(copied, self)
	if err := errors.Join(err, copied.Close()); err != nil {
		t.Fatal(err)
	}
	tool(t, nil, "chown", "-R", "nobody:nogroup", filepath.Join(dir, "db"), filepath.Join(dir, "pkcs11"))
	return []string{"/usr/bin/setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", worker, "hsm-worker"}
}

// TestKeyStaysInside: what other tools see of a key, and what the token answers to whoever has the PIN and asks for it.
func TestKeyStaysInside(t *testing.T) {
	needs(t, "/usr/bin/pkcs11-tool", "opensc")
	s := simulator.SoftHSMForTest(t)
	token := open(t, s, options(s))
	k, err := token.GenerateKey(hsm.P256, "inkan", []byte{0x42})
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(k); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(s.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	pin := strings.TrimSpace(string(b))
	out := tool(t, []string{"SOFTHSM2_CONF=" + s.Config}, "pkcs11-tool", "--module", s.Module, "--token-label", s.Label, "--login", "--pin", pin, "--list-objects", "--type", "privkey")
	if !strings.Contains(out, "Access:     sensitive, always sensitive, never extractable, local") {
		t.Errorf("pkcs11-tool shows %s", out)
	}

	p := pkcs11.New(s.Module)
	if p == nil {
		t.Fatal("the module cannot be loaded")
	}
	defer p.Destroy()
	t.Setenv("SOFTHSM2_CONF", s.Config)
	if err := p.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer p.Finalize()
	slots, err := p.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	session, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Login(session, pkcs11.CKU_USER, pin); err != nil {
		t.Fatal(err)
	}
	if err := p.FindObjectsInit(session, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{0x42})}); err != nil {
		t.Fatal(err)
	}
	found, _, err := p.FindObjects(session, 2)
	if err != nil || len(found) != 1 {
		t.Fatalf("%d keys: %v", len(found), err)
	}
	if err := p.FindObjectsFinal(session); err != nil {
		t.Fatal(err)
	}
	key := found[0]
	wrapping, err := p.GenerateKey(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false)})
	if err != nil {
		t.Fatal(err)
	}
	set := func(attr uint, v bool) func() error {
		return func() error {
			return p.SetAttributeValue(session, key, []*pkcs11.Attribute{pkcs11.NewAttribute(attr, v)})
		}
	}
	for _, x := range []struct {
		name string
		code pkcs11.Error
		do   func() error
	}{
		{"reading CKA_VALUE", pkcs11.CKR_ATTRIBUTE_SENSITIVE, func() error {
			_, err := p.GetAttributeValue(session, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
			return err
		}},
		{"wrapping it", pkcs11.CKR_KEY_UNEXTRACTABLE, func() error {
			_, err := p.WrapKey(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil)}, wrapping, key)
			return err
		}},
		{"making it extractable", pkcs11.CKR_ACTION_PROHIBITED, set(pkcs11.CKA_EXTRACTABLE, true)},
		{"making it not sensitive", pkcs11.CKR_ACTION_PROHIBITED, set(pkcs11.CKA_SENSITIVE, false)},
		{"copying it with other attributes", pkcs11.CKR_ACTION_PROHIBITED, func() error {
			_, err := p.CopyObject(session, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)})
			return err
		}},
	} {
		if err := x.do(); !errors.Is(err, x.code) {
			t.Errorf("%s: %v, %v is expected", x.name, err, x.code)
		}
	}
}
