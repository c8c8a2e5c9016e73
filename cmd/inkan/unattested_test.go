package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/internal/certext"
	"inkan/simulator"
)

// TestWithoutTPM: a host that has a token and no TPM is certified only where the
// inventory says so and for the key that it pins, and the certificate shows it.
func TestWithoutTPM(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	t.Setenv("SOFTHSM2_CONF", s.Config)
	dir, err := os.MkdirTemp("", "inkan") // short, for the socket's sake
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := func(name string) string { return filepath.Join(dir, name) }
	must := func(args ...string) string {
		t.Helper()
		code, out, errs := call("", args...)
		if code != 0 {
			t.Fatalf("%v: %s", args, errs)
		}
		return out
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	args := []string{"issuer", "init", "--dir", path("issuer"), "--trust-domain", "example.org"}
	for _, flag := range []string{"--agent-listen", "--admin-listen", "--public-listen"} {
		args = append(args, flag, simulator.FreePortForTest(t))
	}
	must(args...)
	var at struct{ Agent, Admin, Public string }
	startCommand(t, &at, "issuer", "serve", "--dir", path("issuer"))

	token := fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", s.Label, s.Module, s.PINFile)
	pinOf := func(uri string) string {
		var checked struct {
			SPKI string `json:"spki_sha256"`
		}
		if err := json.Unmarshal([]byte(must("hsm", "check", "--token", uri, "--json")), &checked); err != nil {
			t.Fatal(err)
		}
		return checked.SPKI
	}
	key, other := strings.TrimSpace(must("hsm", "keygen", "--token", token, "--label", "mm-07")), strings.TrimSpace(must("hsm", "keygen", "--token", token, "--label", "other"))
	write("scope.json", `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`)
	must("issuer", "device", "add", "--dir", path("issuer"), "--id", "cloud1", "--without-tpm", pinOf(key))
	must("issuer", "agent", "add", "--dir", path("issuer"), "--name", "mm-07", "--device", "cloud1", "--scope", path("scope.json"), "--hsm")

	config := func(name, uri string) string {
		write(name, fmt.Sprintf("socket: %s\nstate_dir: %s\nissuer: {url: \"https://%s\", ca: %s}\nagents:\n  - name: mm-07\n    key: \"%s\"\n    callers: [{user: \"%d\"}]\n",
			path("s"), path("state"), at.Agent, path("issuer/ca.pem"), uri, os.Getuid()))
		return path(name)
	}
	if code, _, errs := call("", "signer", "enrol", "--config", config("other.yaml", other)); code == 0 || !strings.Contains(errs, "U1") {
		t.Errorf("another key in the token: exit code %d: %s", code, errs)
	}
	if code, _, errs := call("", "signer", "check", "--config", config("none.yaml", "")); code == 0 || !strings.Contains(errs, "without a tpm") {
		t.Errorf("a key in a TPM that is not there: exit code %d: %s", code, errs)
	}

	good := config("signer.yaml", key)
	must("signer", "enrol", "--config", good)
	startCommand(t, new(struct{ Socket string }), "signer", "serve", "--config", good)
	order := `{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"61.24","OrderQty":"400","Currency":"EUR","TimeInForce":"0"}}`
	write("order.json", order)
	write("order.jws", must("sign", "--socket", path("s"), "--action", path("order.json")))
	must("verify", "--ca", path("issuer/ca.pem"), "--audience", "XPAR", "--crl-url", "http://"+at.Public+"/crl", "--jws", path("order.jws"))
	list, err := readCertificates(path("state/mm-07/action.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if a, err := certext.ParseAttestation(list[0]); err != nil || a.Protection != certext.ProtectionHSMDeclared || a.EK != certext.EKNone || a.Policy != "" || a.Device != "cloud1" {
		t.Errorf("the certificate says %+v, %v", a, err)
	}
	if status := must("status", "--socket", path("s")); !strings.Contains(status, "not protected") {
		t.Errorf("status does not show that the record is bound to nothing: %s", status)
	}
	if _, out, _ := call("", "doctor", "--config", good); !strings.Contains(out, "has no TPM") {
		t.Errorf("the doctor does not say that there is no TPM: %s", out)
	}
	must("audit", "checkpoint", "--socket", path("s"))
	must("audit", "verify", "--log", path("state/mm-07/log.db"), "--ca", path("issuer/ca.pem"))
}
