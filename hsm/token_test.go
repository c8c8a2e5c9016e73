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
