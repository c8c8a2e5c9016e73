package main

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// TestClearedTPM: a TPM that was cleared is another device, which an operator must
// say; then the host enrols with keys made anew, whatever files the old ones left.
func TestClearedTPM(t *testing.T) {
	h := newHost(t, gateScope)
	config, err := os.ReadFile(h.path("signer.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	at := regexp.MustCompile(`tpm: (\S+)`).FindStringSubmatch(string(config))[1]
	before, err := os.ReadFile(h.path("state/mm-07/action.tss2.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("tpm2_clear", "-T", "swtpm:path="+at, "-c", "p").CombinedOutput(); err != nil {
		t.Fatalf("tpm2_clear: %v: %s", err, out)
	}
	enrol := []string{"signer", "enrol", "--config", h.path("signer.yaml")}
	if code, _, errs := call("", enrol...); code == 0 || !strings.Contains(errs, "E9") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	dir := []string{"--dir", h.path("issuer")}
	h.must(t, append([]string{"issuer", "agent", "retire", "--name", "mm-07"}, dir...)...)
	h.must(t, append([]string{"issuer", "device", "remove", "--id", "host1"}, dir...)...)
	h.must(t, "tpm", "info", "--tpm", at, "--ek-certificate-out", h.path("ek2.pem"))
	ek := fromJSON[struct {
		Keys []struct {
			SHA256 string `json:"spki_sha256"`
			Used   bool
		} `json:"endorsement_keys"`
	}](t, h.must(t, "tpm", "info", "--tpm", at, "--json"))
	h.must(t, append([]string{"issuer", "device", "add", "--id", "host1", "--ek-pin", ek.Keys[0].SHA256}, dir...)...)
	h.must(t, append([]string{"issuer", "agent", "add", "--name", "mm-07", "--device", "host1", "--scope", h.path("scope.json")}, dir...)...)
	h.must(t, enrol...)
	after, err := os.ReadFile(h.path("state/mm-07/action.tss2.pem"))
	if err != nil || string(after) == string(before) {
		t.Errorf("the key of the TPM as it was is still there: %v", err)
	}
	for n, k := range ek.Keys {
		if k.Used != (n == 0) {
			t.Errorf("endorsement key %d: used %v", n, k.Used)
		}
	}
	startCommand(t, &struct{ Socket string }{}, "signer", "serve", "--config", h.path("signer.yaml"))
	h.verifies(t, h.must(t, h.sign(h.order(t, 1))...))
}

// TestCertificateOfAnotherKey: what a kill leaves between a new key and its
// certificate, or a key that was exchanged in the configuration, is enrolled at the start.
func TestCertificateOfAnotherKey(t *testing.T) {
	h := newHost(t, gateScope)
	old, err := os.ReadFile(h.path("state/mm-07/action.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(h.path("state/mm-07/action.tss2.pem")); err != nil {
		t.Fatal(err)
	}
	h.must(t, "signer", "enrol", "--config", h.path("signer.yaml"))
	h.write(t, "state/mm-07/action.pem", string(old))
	startCommand(t, &struct{ Socket string }{}, "signer", "serve", "--config", h.path("signer.yaml"))
	h.verifies(t, h.must(t, h.sign(h.order(t, 1))...))
}
