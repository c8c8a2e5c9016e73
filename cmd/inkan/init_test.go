package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/simulator"
)

// TestInit: what is refused leaves nothing behind, so that the command can be
// given again; twice makes nothing anew; and a configuration is one that a
// person can add a line to.
func TestInit(t *testing.T) {
	dir := t.TempDir()
	issuer, approver := filepath.Join(dir, "issuer"), filepath.Join(dir, "approver")
	start := []string{"issuer", "init", "--dir", issuer, "--trust-domain"}
	if code, _, errs := call("", append(start, "not a domain")...); code != exitError || !strings.Contains(errs, "a name such as example.org is expected") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if code, _, errs := call("", append(start, "example.org")...); code != 0 {
		t.Fatalf("a second try: exit code %d: %s", code, errs)
	}
	if code, _, errs := call("", append(start, "example.org")...); code != exitError || !strings.Contains(errs, "has an issuer already") {
		t.Errorf("twice: exit code %d: %s", code, errs)
	}

	ca := filepath.Join(issuer, "ca.pem")
	begin := func(domain, ca string) []string {
		return []string{"approver", "init", "--dir", approver, "--trust-domain", domain, "--ca", ca, "--crl-url", "http://127.0.0.1/crl", "--agent", "mm-07"}
	}
	for _, c := range []struct{ domain, ca, want string }{
		{"not a domain", ca, "trust_domain"},
		{"example.org", filepath.Join(dir, "none.pem"), "none.pem"},
		{"example.org", filepath.Join(issuer, "policy.pub.pem"), "policy.pub.pem"},
	} {
		if code, _, errs := call("", begin(c.domain, c.ca)...); code != exitError || !strings.Contains(errs, c.want) {
			t.Errorf("%s, %s: exit code %d: %s", c.domain, c.ca, code, errs)
		}
	}
	if code, _, errs := call("", begin("example.org", ca)...); code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}

	config := filepath.Join(approver, "approver.yaml")
	for line, want := range map[string]int{"metrics_listen: 127.0.0.1:1\n": 0, "metrics: 127.0.0.1:1\n": exitError} {
		b, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		changed := filepath.Join(approver, "changed.yaml")
		if err := os.WriteFile(changed, append(b, line...), 0o600); err != nil {
			t.Fatal(err)
		}
		if code, _, errs := call("", "approver", "check", "--config", changed); code != want {
			t.Errorf("with %q at the end: exit code %d: %s", line, code, errs)
		}
	}
}

// TestKeyOfACA: a key in a TPM is named so that the server finds it from
// wherever it is started, and is not overwritten.
func TestKeyOfACA(t *testing.T) {
	s := simulator.TPMForTest(t)
	dir := t.TempDir()
	t.Chdir(dir)
	keygen := []string{"tpm", "keygen", "--tpm", s.Address, "--out", "ca.tss2.pem"}
	want := "tpm:" + s.Address + "?key=" + filepath.Join(dir, "ca.tss2.pem")
	code, out, errs := call("", keygen...)
	if code != 0 || strings.TrimSpace(out) != want {
		t.Fatalf("exit code %d: %s%s", code, out, errs)
	}
	if code, _, errs := call("", keygen...); code != exitError || !strings.Contains(errs, "not overwritten") {
		t.Errorf("twice: exit code %d: %s", code, errs)
	}
	if code, _, errs := call("", "issuer", "init", "--dir", "issuer", "--trust-domain", "example.org", "--ca-key", "tpm:"+s.Address+"?key=ca.tss2.pem"); code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	b, err := os.ReadFile(filepath.Join(dir, "issuer", "issuer.yaml"))
	if err != nil || !strings.Contains(string(b), "ca_key: "+want+"\n") {
		t.Errorf("%s, %v", b, err)
	}
}
