//go:build cgo

package hsm_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/hsm"
	"inkan/simulator"
)

// TestPINIsForOneToken: the PIN goes to the one token that all of the URI names,
// and to no other that shares its label or serial number: tokens count wrong PINs, and lock.
func TestPINIsForOneToken(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	env := []string{"SOFTHSM2_CONF=" + s.Config}
	flags := func() string { return tool(t, env, "pkcs11-tool", "--module", s.Module, "--list-slots") }
	var serial string
	for line := range strings.Lines(flags()) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "serial num" && serial == "" {
			serial = strings.TrimSpace(value)
		}
	}
	tool(t, env, "softhsm2-util", "--init-token", "--free", "--label", s.Label, "--so-pin", "12345678", "--pin", "another one")
	tool(t, env, "softhsm2-util", "--init-token", "--free", "--label", "alone", "--so-pin", "12345678", "--pin", "another one")
	wrong := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(wrong, []byte("not the PIN\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, u := range map[string]hsm.URI{
		"two tokens with the label":           {Token: s.Label},
		"another maker":                       {Token: "alone", Manufacturer: "Somebody else"},
		"another model":                       {Token: "alone", Model: "another"},
		"label and serial of different ones":  {Token: "alone", Serial: serial},
		"serial and label of different ones ": {Serial: serial, Token: "nothing"},
	} {
		u.Module, u.PINSource = s.Module, "file:"+wrong
		token, err := hsm.Open(u.String(), options(s))
		if err == nil {
			_ = token.Close()
		}
		if err == nil || errors.Is(err, hsm.ErrPIN) || !strings.Contains(err.Error(), "tokens match the URI") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list := flags(); strings.Contains(list, "count low") || strings.Contains(list, "final user PIN try") {
		t.Errorf("a token has seen a wrong PIN:\n%s", list)
	}
	// The same label, and the serial number says which.
	right := hsm.URI{Token: s.Label, Serial: serial, Module: s.Module, PINSource: "file:" + s.PINFile}
	token, err := hsm.Open(right.String(), options(s))
	if err != nil {
		t.Fatal(err)
	}
	defer token.Close()
	for _, a := range []hsm.Algorithm{hsm.P256, hsm.RSA2048} {
		if _, err := token.GenerateKey(a, "test", nil); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
}

// TestNoCore: a worker that crashes leaves no file with the PIN in it.
func TestNoCore(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	token := open(t, s, options(s))
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", token.Stats().WorkerPID))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Join(strings.Fields(rest), " ") != "0 0 bytes" {
			t.Errorf("the worker's limit is %s", rest)
		}
	}
}

// TestAmbiguousKeys: of two keys under one CKA_ID none is used, nor one whose public
// key is not there; and the list says why, in place of leaving them out.
func TestAmbiguousKeys(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	b, err := os.ReadFile(s.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	p11 := func(args ...string) {
		t.Helper()
		tool(t, []string{"SOFTHSM2_CONF=" + s.Config}, "pkcs11-tool", append([]string{"--module", s.Module, "--token-label", s.Label, "--login", "--pin", strings.TrimSpace(string(b))}, args...)...)
	}
	for _, id := range []string{"01", "02", "02", "03"} {
		p11("--keypairgen", "--key-type", "EC:prime256v1", "--sensitive", "--id", id)
	}
	p11("--delete-object", "--type", "pubkey", "--id", "03")
	token := open(t, s, options(s))
	list, err := token.List()
	if err != nil || len(list) != 4 {
		t.Errorf("%d keys, %v", len(list), err)
	}
	for _, a := range list {
		err := a.Check()
		if want := map[byte]string{2: "2 private keys have this CKA_ID", 3: "0 public keys have"}[a.ID[0]]; (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("key %x: %v, want %q", a.ID, err, want)
		}
	}
	for id, want := range map[byte]error{1: nil, 2: hsm.ErrNotFound, 3: hsm.ErrNotFound} {
		if _, err := token.Key([]byte{id}); !errors.Is(err, want) {
			t.Errorf("key %d: %v", id, err)
		}
	}
}
