package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	keyfile "github.com/foxboron/go-tpm-keyfiles"
	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
	"inkan/simulator"
	"inkan/tpm"
)

var selection = []attest.PCRSelection{{Bank: "sha256", Indexes: []int{0, 2, 4, 7}}}

// host is a TPM with a policy key that has approved its state.
type host struct {
	sim      *simulator.TPM
	dev      *tpm.Device
	key      *ecdsa.PrivateKey // policy key
	policies *tpm.Policies
	template []byte
}

func newHost(t testing.TB) *host {
	t.Helper()
	h := &host{sim: simulator.TPMForTest(t)}
	var err error
	if h.dev, err = tpm.Open(h.sim.Address); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.dev.Close() })
	if h.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	area, err := attest.PolicyKeyPublic(&h.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	h.policies = &tpm.Policies{PolicyKey: area, Ref: []byte("test")}
	h.approve(t, "first")
	policy, err := attest.AuthPolicy(area, h.policies.Ref)
	if err != nil {
		t.Fatal(err)
	}
	h.template = attest.KeyTemplate(policy)
	return h
}

// approve approves the state that the host is in.
func (h *host) approve(t testing.TB, name string) {
	t.Helper()
	values, err := h.dev.ReadPCRs(selection)
	if err != nil {
		t.Fatal(err)
	}
	p, err := attest.SignPolicy(h.key, name, values, h.policies.Ref)
	if err != nil {
		t.Fatal(err)
	}
	c := *h.policies
	c.Approved = append([]attest.ApprovedPolicy{*p}, c.Approved...)
	h.policies = &c
}

func (h *host) newKey(t testing.TB) (*tpm.Key, []byte) {
	t.Helper()
	file, _, err := h.dev.CreateKey(h.template)
	if err != nil {
		t.Fatal(err)
	}
	k, err := h.dev.LoadKey(file, h.policies)
	if err != nil {
		t.Fatal(err)
	}
	return k, file
}

// signs makes and verifies a signature.
func signs(k crypto.Signer) error {
	digest := sha256.Sum256([]byte("a statement"))
	sig, err := k.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), digest[:], sig) {
		return errors.New("the signature does not verify")
	}
	return nil
}

func tool(t *testing.T, h *host, name string, args ...string) (string, error) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("%s is missing: apt-get install tpm2-tools", name)
	}
	h.dev.Release()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+h.sim.Address)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestSignUnderApprovedPolicy(t *testing.T) {
	h := newHost(t)
	k, file := h.newKey(t)
	if err := signs(k); err != nil {
		t.Fatal(err)
	}

	// PCR 7 changes: the TPM refuses, and the error says which PCR in words.
	if out, err := tool(t, h, "tpm2_pcrextend", "7:sha256=0101010101010101010101010101010101010101010101010101010101010101"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	err := signs(k)
	if p, ok := errors.AsType[*tpm.PCRError](err); !ok || !strings.Contains(p.Error(), "PCR 7 of bank sha256 (Secure Boot policy)") {
		t.Fatalf("with another PCR 7: %v", err)
	}

	// The new state is approved: the same key signs again.
	h.approve(t, "second")
	k.SetPolicies(h.policies)
	if err := signs(k); err != nil {
		t.Fatalf("after the approval: %v", err)
	}

	// A power cycle brings PCR 7 back: the first approval serves again.
	if err := errors.Join(h.sim.Kill(), h.sim.Restart()); err != nil {
		t.Fatal(err)
	}
	if err := signs(k); err != nil {
		t.Fatalf("after a reset of the TPM: %v", err)
	}

	// Another process loads the file.
	again, err := tpm.Open(h.sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if k, err = again.LoadKey(file, h.policies); err != nil {
		t.Fatal(err)
	}
	if err := signs(k); err != nil {
		t.Error(err)
	}
	k.SetPolicies(&tpm.Policies{PolicyKey: h.policies.PolicyKey, Ref: h.policies.Ref})
	if err := signs(k); !errors.Is(err, tpm.ErrNoPolicy) {
		t.Errorf("without a policy: %v", err)
	}
	k.SetPolicies(nil)
	if err := signs(k); err == nil {
		t.Error("an empty password used a key with a policy")
	}
}

func TestKeyOfAnotherTPM(t *testing.T) {
	a, b := newHost(t), newHost(t)
	_, file := a.newKey(t)
	if _, err := b.dev.LoadKey(file, a.policies); !errors.Is(err, tpm.ErrForeignKey) {
		t.Errorf("got %v, want %v", err, tpm.ErrForeignKey)
	}
}

func TestDigestSize(t *testing.T) {
	h := newHost(t)
	k, _ := h.newKey(t)
	if _, err := k.Sign(nil, make([]byte, 20), crypto.SHA256); !errors.Is(err, tpm.ErrDigestSize) {
		t.Errorf("20 bytes: %v", err)
	}
	if _, err := k.Sign(nil, make([]byte, 48), crypto.SHA384); err == nil {
		t.Error("a SHA-384 digest was signed")
	}
}

func TestConcurrentUseOfManyKeys(t *testing.T) {
	h := newHost(t)
	var wg sync.WaitGroup
	for range 5 { // more than a TPM without a resource manager holds
		k, _ := h.newKey(t)
		for range 2 {
			wg.Go(func() {
				for range 5 {
					if err := signs(k); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	wg.Wait()
}

// loadWithTools loads what a TSS2 PRIVATE KEY file holds by tpm2-tools; the
// context is key.ctx in the directory that it returns.
func loadWithTools(t *testing.T, h *host, file []byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	f, err := keyfile.Decode(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"pub": tpm2.Marshal(f.Pubkey), "priv": tpm2.Marshal(f.Privkey)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// tpm2-tools make the parent as TSS2 PRIVATE KEY files have it.
	for _, args := range [][]string{
		{"tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc256", "-g", "sha256", "-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt", "-c", dir + "/srk.ctx"},
		{"tpm2_flushcontext", "-t"},
		{"tpm2_load", "-Q", "-C", dir + "/srk.ctx", "-u", dir + "/pub", "-r", dir + "/priv", "-c", dir + "/key.ctx"},
		{"tpm2_flushcontext", "-t"},
	} {
		if out, err := tool(t, h, args[0], args[1:]...); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	return dir
}

// TestToolsSeeTheKey lets tpm2-tools judge the action key.
func TestToolsSeeTheKey(t *testing.T) {
	h := newHost(t)
	_, file := h.newKey(t)
	dir := loadWithTools(t, h, file)
	out, err := tool(t, h, "tpm2_readpublic", "-c", dir+"/key.ctx")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	policy, err := attest.AuthPolicy(h.policies.PolicyKey, h.policies.Ref)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"value: fixedtpm|fixedparent|sensitivedataorigin|noda|sign\n", "authorization policy: " + hex(policy)} {
		if !strings.Contains(out, want) {
			t.Errorf("tpm2_readpublic does not show %q:\n%s", want, out)
		}
	}
	if out, err := tool(t, h, "tpm2_flushcontext", "-t"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(dir+"/message", []byte("pay everything to me"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err = tool(t, h, "tpm2_sign", "-c", dir+"/key.ctx", "-g", "sha256", "-o", dir+"/sig", dir+"/message")
	if err == nil || !strings.Contains(out, "0x12F") { // TPM_RC_AUTH_UNAVAILABLE
		t.Errorf("tpm2_sign with an empty password: %v: %s", err, out)
	}
}

func hex(b []byte) string {
	const digits = "0123456789abcdef"
	var out bytes.Buffer
	for _, c := range b {
		out.WriteByte(digits[c>>4])
		out.WriteByte(digits[c&15])
	}
	return out.String()
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := tpm.Open(filepath.Join(dir, "none")); !errors.Is(err, tpm.ErrNoTPM) {
		t.Errorf("no file: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tpm.Open(file); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file: %v", err)
	}
	// A TPM 1.2 answers with its own tag and TPM_BAD_TAG.
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 512))
			_, _ = c.Write([]byte{0x00, 0xc4, 0, 0, 0, 10, 0, 0, 0, 0x1e})
			_ = c.Close()
		}
	}()
	if _, err := tpm.Open(filepath.Join(dir, "s")); !errors.Is(err, tpm.ErrTPM12) {
		t.Errorf("a TPM 1.2: %v", err)
	}
}

func TestHierarchyAuth(t *testing.T) {
	h := newHost(t)
	if out, err := tool(t, h, "tpm2_changeauth", "-c", "o", "secret"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, _, err := h.dev.CreateKey(h.template); !errors.Is(err, tpm.ErrHierarchyAuth) {
		t.Errorf("without the owner's authorization: %v", err)
	}
	d, err := tpm.OpenWith(h.sim.Address, tpm.Options{OwnerAuth: []byte("secret")})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, _, err := d.CreateKey(h.template); err != nil {
		t.Errorf("with it: %v", err)
	}
}

// TestEvidence runs the host's half and the issuer's half of an enrolment.
func TestEvidence(t *testing.T) {
	h := newHost(t)
	roots, err := h.sim.EKRoots()
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(h.sim.IntermediatesFile())
	if err != nil {
		t.Fatal(err)
	}
	eks, err := h.dev.EKs()
	if err != nil {
		t.Fatal(err)
	}
	certified := 0
	for _, ek := range eks {
		if ek.Certificate == nil {
			continue
		}
		certified++
		t.Run(ek.Algorithm(), func(t *testing.T) { enrol(t, h, ek, roots, pem) })
	}
	if certified != 2 {
		t.Errorf("%d endorsement keys with a certificate, want RSA and ECC", certified)
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func enrol(t *testing.T, h *host, ek tpm.EK, roots *x509.CertPool, intermediates []byte) {
	ak, srk := must(h.dev.AKPublic())(t), must(h.dev.SRKPublic())(t)
	hello := &attest.Hello{Agent: "a", EKPublic: ek.Public, EKCertificate: ek.Certificate, EKChain: ek.Chain, AKPublic: ak, SRKPublic: srk}
	e := must(attest.VerifyEK(hello, attest.EKOptions{Roots: roots, Intermediates: must(attest.ParseCertificates(intermediates))(t), Now: time.Now()}))(t)
	name := must(attest.CheckAK(ak))(t)
	secret := make([]byte, attest.SecretSize)
	_, _ = rand.Read(secret)
	credential := must(attest.MakeCredential(e, name, secret, rand.Reader))(t)
	c := &attest.Challenge{Session: make([]byte, 16), Nonce: make([]byte, 32), Credential: credential, PCRs: selection,
		Keys: []attest.KeyRequest{{Purpose: attest.PurposeAction, Template: h.template}}, PolicyKey: h.policies.PolicyKey, PolicyRef: h.policies.Ref, Policies: h.policies.Approved}
	binding := make([]byte, 32)

	opened := must(h.dev.ActivateCredential(&ek, credential))(t)
	if !bytes.Equal(opened, secret) {
		t.Fatal("the TPM opened another secret")
	}
	k, _ := h.newKey(t)
	csr := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k))(t)
	q := attest.KeyQualifyingData(c.Session, c.Nonce, binding, csr)
	certify := must(h.dev.Certify(k, q[:]))(t)
	ev := &attest.Evidence{Session: c.Session, Secret: opened, PCRs: must(h.dev.ReadPCRs(selection))(t),
		Keys: []attest.KeyEvidence{{Purpose: attest.PurposeAction, Public: k.PublicArea(), CSR: csr, Certify: &certify}}}
	qq := must(attest.QuoteQualifyingData(c.Session, c.Nonce, binding, ev.Keys))(t)
	ev.Quote = must(h.dev.Quote(selection, qq[:]))(t)
	policy := must(attest.AuthPolicy(h.policies.PolicyKey, h.policies.Ref))(t)
	r, err := attest.Appraise(&attest.Expectation{Challenge: c, Binding: binding, Secret: secret, Endorsement: e, SRK: srk, AK: ak, AuthPolicies: map[string][]byte{attest.ModeLocal: policy}, AppraisalNow: time.Now()}, ev)
	if err != nil {
		t.Fatal(err)
	}
	if r.Policy() != "first" || r.Endorsement() != attest.Certified || len(r.Keys()) != 1 {
		t.Errorf("result = %+v", r)
	}
}

func BenchmarkSign(b *testing.B) {
	h := newHost(b)
	file, _, err := h.dev.CreateKey(tpm.SigningTemplate())
	if err != nil {
		b.Fatal(err)
	}
	raw, err := h.dev.LoadKey(file, nil)
	if err != nil {
		b.Fatal(err)
	}
	policy, _ := h.newKey(b)
	for name, k := range map[string]*tpm.Key{"password": raw, "policy": policy} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err := signs(k); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
