package main

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/attest"
	"inkan/internal/keyuri"
	"inkan/internal/testca"
	"inkan/signer"
)

// TestStartWithoutIssuer: a signer whose issuer is away starts, and serves the
// agents that have certificates. One whose certificate is over is refused.
func TestStartWithoutIssuer(t *testing.T) {
	_, uri := token(t)
	dir, err := os.MkdirTemp("", "inkan") // short, for the socket's sake
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := func(name string) string { return filepath.Join(dir, name) }
	const scope = `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`
	ca := testca.New(t)
	config := "socket: s\nstate_dir: state\nissuer: {url: 'https://127.0.0.1:1', ca: ca.pem}\nagents:\n"
	for name, end := range map[string]time.Duration{"over": -time.Minute, "good": time.Hour} {
		key := keygen(t, "hsm", "keygen", "--token", uri, "--label", name)
		k, closer, err := keyuri.Open(key)
		if err != nil {
			t.Fatal(err)
		}
		a := ca.AgentWithKey(t, name, []byte(scope), k, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = c.NotBefore.Add(-time.Hour), time.Now().Add(end) })
		if err := closer.Close(); err != nil {
			t.Fatal(err)
		}
		state, err := signer.OpenState(path("state"), name)
		if err != nil {
			t.Fatal(err)
		}
		if err := state.SaveChain(attest.PurposeAction, a.Chain); err != nil {
			t.Fatal(err)
		}
		user := os.Getuid()
		if name == "over" {
			user = 65534
		}
		config += fmt.Sprintf("  - {name: %s, key: %q, callers: [{user: \"%d\"}]}\n", name, key, user)
	}
	for name, text := range map[string]string{"signer.yaml": config, "ca.pem": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate.Raw})),
		"order.json": `{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"61.24","OrderQty":"400","Currency":"EUR","TimeInForce":"0"}}`} {
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	startCommand(t, new(struct{ Socket string }), "signer", "serve", "--config", path("signer.yaml"))
	if code, _, errs := call("", "sign", "--socket", path("s"), "--action", path("order.json")); code != 0 {
		t.Errorf("the other agent: exit code %d: %s", code, errs)
	}
	if code, out, errs := call("", "status", "--socket", path("s")); code != 0 || strings.Count(out, "SIGNS NOTHING: the certificate has expired") != 1 {
		t.Errorf("status: exit code %d: %s%s", code, out, errs)
	}
}
