package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"inkan/simulator"
)

// TestMain lets the test binary be the worker of a PKCS#11 module, and a daemon
// that confines itself.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "hsm-worker" || os.Getenv("INKAN_TEST_COMMAND") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// examine returns the findings by area and what.
func examine(t *testing.T, wantCode int, args ...string) map[string]finding {
	t.Helper()
	code, out, errs := call("", append([]string{"doctor", "--json"}, args...)...)
	if code != wantCode {
		t.Fatalf("exit code %d, want %d: %s%s", code, wantCode, errs, out)
	}
	var report struct{ Findings []finding }
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatal(err)
	}
	all := make(map[string]finding)
	for _, f := range report.Findings {
		area, _, _ := strings.Cut(f.Area, " ")
		all[area+": "+f.What] = f
	}
	return all
}

func TestDoctorOfATPM(t *testing.T) {
	sim := simulator.TPMForTest(t)
	all := examine(t, 0, "--tpm", sim.Address)
	for what, want := range map[string]string{
		"this: kernel": "Linux", "TPM: what it is": "IBM SW   TPM", "TPM: abilities": "missing: nothing", "TPM: PCR banks": "sha256",
		"TPM: endorsement key RSA-2048": "certificate: true", "TPM: a signature": " ms with a key made for this", "TPM: command audit": "true", "TPM: hierarchies": "owner: false",
	} {
		want = strings.Join(strings.Fields(want), " ")
		if f, ok := all[what]; !ok || f.State != stateOK || !strings.Contains(f.Found, want) {
			t.Errorf("%s: %+v, want something about %q", what, f, want)
		}
	}
	// What it found out it left as it was.
	if again := examine(t, 0, "--tpm", sim.Address); again["TPM: room"] != all["TPM: room"] {
		t.Errorf("room before %v, after %v", all["TPM: room"], again["TPM: room"])
	}
	none := filepath.Join(t.TempDir(), "none")
	if f := examine(t, exitError, "--tpm", none)["TPM: opens"]; f.State != stateRefused || f.Next == "" {
		t.Errorf("no TPM: %+v", f)
	}
	if f := examine(t, exitError, "--config", none)["signer's: is valid"]; f.State != stateRefused {
		t.Errorf("no configuration: %+v", f)
	}
}

func TestDoctorOfAToken(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	t.Setenv("SOFTHSM2_CONF", s.Config)
	uri := fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", s.Label, s.Module, s.PINFile)
	if f := examine(t, 0, "--token", uri)["token: keys"]; f.State != stateNote || f.Found != "none that is good" {
		t.Errorf("a token without keys: %+v", f)
	}
	if code, _, errs := call("", "hsm", "keygen", "--token", uri, "--label", "mm-07"); code != 0 {
		t.Fatal(errs)
	}
	all := examine(t, 0, "--token", uri)
	for what, want := range map[string]string{
		"token: module": "PKCS11 2.6", "token: what it is": "SoftHSM project", "token: signs by": "CKM_ECDSA", "token: makes keys": "EC", "token: PIN": "last try: false", "token: a signature": " ms with key",
	} {
		if f, ok := all[what]; !ok || f.State != stateOK || !strings.Contains(f.Found, want) {
			t.Errorf("%s: %+v, want something about %q", what, f, want)
		}
	}
	wrong := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(wrong, []byte("000000"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := examine(t, exitError, "--token", strings.Replace(uri, s.PINFile, wrong, 1))["token: opens"]
	if f.State != stateRefused || !strings.Contains(f.Next, "tokens lock") || strings.Contains(fmt.Sprint(f), "000000") {
		t.Errorf("a wrong PIN: %+v", f)
	}
	// Somebody's wrong PIN shows to the next who looks.
	if f := examine(t, 0, "--token", uri)["token: PIN"]; f.State != stateOK && f.State != stateNote {
		t.Errorf("after a wrong PIN: %+v", f)
	}
}

// TestDoctorOfAChangedHost: the host's state, what the issuer has approved and what
// the host has of that are three things.
func TestDoctorOfAChangedHost(t *testing.T) {
	h := newHost(t, gateScope)
	examine := func(want int, what, state string) {
		t.Helper()
		code, out, errs := call("", "doctor", "--config", h.path("signer.yaml"), "--json")
		report := fromJSON[struct{ Findings []finding }](t, out)
		i := slices.IndexFunc(report.Findings, func(f finding) bool { return f.What == what })
		if i < 0 || report.Findings[i].State != state || code != want {
			t.Errorf("exit code %d: %s is not %s in %s%s", code, what, state, out, errs)
		}
	}
	examine(0, "approvals on this host", stateOK)
	if err := h.tpm.ExtendPCR(7, []byte("an update")); err != nil {
		t.Fatal(err)
	}
	examine(exitError, "approved state", stateRefused)
	pcrs := h.write(t, "updated.json", h.must(t, "tpm", "pcrs", "--tpm", h.tpm.Address, "--json"))
	h.must(t, "issuer", "policy", "approve", "--dir", h.path("issuer"), "--name", "updated", "--pcrs", pcrs)
	examine(exitError, "approved state", stateOK)
	examine(exitError, "approvals on this host", stateRefused)
	h.must(t, "signer", "enrol", "--config", h.path("signer.yaml"))
	examine(0, "approvals on this host", stateOK)
}
