package approver_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/approver/client"
	"inkan/attest"
	"inkan/simulator"
)

// token is a token whose configuration the processes of the test find, and the URI of it.
func token(t *testing.T) string {
	t.Helper()
	s := simulator.SoftHSMForTest(t)
	t.Setenv("SOFTHSM2_CONF", s.Config)
	return "pkcs11:token=" + s.Label + "?module-path=" + s.Module + "&pin-source=file:" + s.PINFile
}

// TestKeyInAFileATPMAndAToken: an approver's key may be in each, and a host's TPM
// takes what it authorizes.
func TestKeyInAFileATPMAndAToken(t *testing.T) {
	d := newDesk(t)
	h := newHouse(t, d.ca)
	other := simulator.TPMForTest(t) // the approver's own
	run(t, "tpm", "keygen", "--tpm", other.Address, "--out", h.path("approver.tss2.pem"))
	keys := map[string]string{
		"a file":  "",
		"a TPM":   "tpm:" + other.Address + "?key=" + h.path("approver.tss2.pem"),
		"a token": strings.TrimSpace(run(t, "hsm", "keygen", "--token", token(t))),
	}
	approvers := make(map[string]*process)
	var groups [][]*ecdsa.PublicKey
	for name, uri := range keys {
		var more []string
		if uri != "" {
			more = []string{"--key", uri}
		}
		p := h.approverWith(t, strings.ReplaceAll(name, " ", "-"), []string{"mm-07"}, more...)
		approvers[name] = p
		groups = append(groups, []*ecdsa.PublicKey{p.key})
	}
	x := newTradingOf(t, d, groups...)
	for name, p := range approvers {
		roots := x509.NewCertPool()
		b, err := os.ReadFile(filepath.Join(p.dir, "tls.pem"))
		if err != nil || !roots.AppendCertsFromPEM(b) {
			t.Fatalf("%s: %v", name, err)
		}
		g := client.New([]client.Member{{URL: p.at, Roots: roots}}, func() (*tls.Certificate, error) { return &x.tls, nil }, time.Second, 20*time.Second)
		for range 2 {
			if _, err := x.sign(t.Context(), g, x.order(t, nil)); err != nil {
				t.Errorf("an approver with its key in %s: %v", name, err)
			}
		}
	}
}

// TestIssuerKeysInAToken: the CA key and the policy key may be in a token: the
// revocation list and the approval are theirs.
func TestIssuerKeysInAToken(t *testing.T) {
	uri := token(t)
	ca := strings.TrimSpace(run(t, "hsm", "keygen", "--token", uri, "--label", "ca"))
	policy := strings.TrimSpace(run(t, "hsm", "keygen", "--token", uri, "--label", "policy"))
	dir := filepath.Join(t.TempDir(), "issuer")
	args := []string{"issuer", "init", "--dir", dir, "--trust-domain", "example.org", "--ca-key", ca, "--policy-key", policy}
	for _, flag := range []string{"--agent-listen", "--admin-listen", "--public-listen"} {
		args = append(args, flag, simulator.FreePortForTest(t))
	}
	run(t, args...)
	var at struct{ Public string }
	start(t, &at, "issuer", "serve", "--dir", dir)

	b, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.Get("http://" + at.Public + "/crl")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	der, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := crl.CheckSignatureFrom(certificate); err != nil {
		t.Errorf("the revocation list: %v", err)
	}

	pcrs := filepath.Join(t.TempDir(), "pcrs.json")
	tpm := simulator.TPMForTest(t)
	if err := os.WriteFile(pcrs, []byte(run(t, "tpm", "pcrs", "--tpm", tpm.Address, "--pcr", "sha256:0,7", "--json")), 0o600); err != nil {
		t.Fatal(err)
	}
	var approved attest.ApprovedPolicy
	if err := json.Unmarshal([]byte(run(t, "issuer", "policy", "approve", "--dir", dir, "--name", "p", "--pcrs", pcrs, "--json")), &approved); err != nil {
		t.Fatal(err)
	}
	area, err := attest.PolicyKeyPublic(tokenKey(t, policy))
	if err != nil {
		t.Fatal(err)
	}
	if err := attest.VerifyPolicy(area, policyRef, &approved); err != nil {
		t.Errorf("the approval: %v", err)
	}

	// Two of three, whose keys are in files.
	h := newHouse(t, newDesk(t).ca)
	more := []string{"issuer", "policy", "approve", "--dir", dir, "--name", "q", "--pcrs", pcrs, "--of", "2", "--json"}
	for _, name := range []string{"a", "b", "c"} {
		run(t, "approver", "init", "--dir", h.path(name), "--trust-domain", "example.org", "--ca", h.path("ca.pem"), "--crl-url", h.crl, "--agent", "mm-07")
		more = append(more, "--approver", filepath.Join(h.path(name), "approver.pub.pem"))
	}
	var pairs []attest.ApprovedPolicy
	if err := json.Unmarshal([]byte(run(t, more...)), &pairs); err != nil || len(pairs) != 3 {
		t.Fatalf("%d approvals: %v", len(pairs), err)
	}
	for _, p := range pairs {
		if err := attest.VerifyPolicy(area, policyRef, &p); err != nil || len(p.Approvers) != 2 || !strings.HasPrefix(p.Name, "q.") {
			t.Errorf("approval %s with %d approvers: %v", p.Name, len(p.Approvers), err)
		}
	}
	if out := run(t, "issuer", "policy", "list", "--dir", dir); strings.Count(out, "approver") != 3 {
		t.Errorf("the issuer lists %s", out)
	}
}

// tokenKey reads the public key of a key in a token.
func tokenKey(t *testing.T, uri string) *ecdsa.PublicKey {
	t.Helper()
	var out struct {
		Key struct {
			SPKI []byte `json:"spki"`
		} `json:"key"`
	}
	if err := json.Unmarshal([]byte(run(t, "hsm", "check", "--token", uri, "--json")), &out); err != nil {
		t.Fatal(err)
	}
	k, err := x509.ParsePKIXPublicKey(out.Key.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	return k.(*ecdsa.PublicKey)
}
