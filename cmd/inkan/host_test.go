package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"inkan/signer/client"
	"inkan/simulator"
)

// attestedHost is a host with a TPM, an issuer that knows it, and an agent mm-07 there.
type attestedHost struct {
	dir    string
	tpm    *simulator.TPM
	issuer struct{ Agent, Admin, Public string }
}

const hostAgent = "spiffe://example.org/agent/mm-07"

func newHost(t *testing.T, scope string) *attestedHost {
	t.Helper()
	dir, err := os.MkdirTemp("", "inkan") // short, for the socket's sake
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := &attestedHost{dir: dir}
	sim := simulator.TPMForTest(t)
	h.tpm = sim
	args := []string{"issuer", "init", "--dir", h.path("issuer"), "--trust-domain", "example.org"}
	for _, flag := range []string{"--agent-listen", "--admin-listen", "--public-listen"} {
		args = append(args, flag, simulator.FreePortForTest(t))
	}
	h.must(t, args...)
	startCommand(t, &h.issuer, "issuer", "serve", "--dir", h.path("issuer"))
	h.must(t, "tpm", "info", "--tpm", sim.Address, "--ek-certificate-out", h.path("ek.pem"))
	h.must(t, "issuer", "device", "add", "--dir", h.path("issuer"), "--id", "host1", "--ek-certificate", h.path("ek.pem"), "--ek-root", sim.RootsFile(), "--ek-intermediate", sim.IntermediatesFile())
	pcrs := h.write(t, "pcrs.json", h.must(t, "tpm", "pcrs", "--tpm", sim.Address, "--pcr", "sha256:0,2,4,7", "--json"))
	h.must(t, "issuer", "policy", "approve", "--dir", h.path("issuer"), "--name", "first", "--pcrs", pcrs)
	h.must(t, "issuer", "agent", "add", "--dir", h.path("issuer"), "--name", "mm-07", "--device", "host1", "--scope", h.write(t, "scope.json", scope))
	h.write(t, "signer.yaml", fmt.Sprintf("socket: s\nstate_dir: state\ntpm: %s\nissuer: {url: \"https://%s\", ca: issuer/ca.pem}\nagents:\n  - name: mm-07\n    callers: [{user: \"%d\"}]\n", sim.Address, h.issuer.Agent, os.Getuid()))
	h.must(t, "signer", "enrol", "--config", h.path("signer.yaml"))
	return h
}

func (h *attestedHost) path(name string) string { return filepath.Join(h.dir, name) }

func (h *attestedHost) write(t *testing.T, name, text string) (path string) {
	t.Helper()
	return writeFile(t, h.path(name), []byte(text))
}

// must runs the command, which must succeed, and returns what it prints.
func (h *attestedHost) must(t *testing.T, args ...string) string {
	t.Helper()
	code, out, errs := call("", args...)
	if code != 0 {
		t.Fatalf("%v: exit code %d: %s", args, code, errs)
	}
	return out
}

// refused runs the command, which must end refused with some text.
func (h *attestedHost) refused(t *testing.T, what, text string, args ...string) {
	t.Helper()
	if code, _, errs := call("", args...); code != exitRefused || !strings.Contains(errs, text) {
		t.Errorf("%s: exit code %d: %s; %d with %s is expected", what, code, errs, exitRefused, text)
	}
}

// order writes an order for some shares at 50 into a file.
func (h *attestedHost) order(t *testing.T, shares int) (path string) {
	t.Helper()
	id := client.NewID()
	return h.write(t, "order-"+id, fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.new","ord":{"ClOrdID":%q,"SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"50","OrderQty":"%d","Currency":"EUR","TimeInForce":"0"}}`, id, id[:10], shares))
}

func (h *attestedHost) sign(action string, more ...string) []string {
	return append([]string{"sign", "--socket", h.path("s"), "--action", action}, more...)
}

// verifies has a venue verify what sign prints.
func (h *attestedHost) verifies(t *testing.T, jws string, more ...string) {
	t.Helper()
	h.must(t, append([]string{"verify", "--ca", h.path("issuer/ca.pem"), "--audience", "XPAR", "--crl-url", "http://" + h.issuer.Public + "/crl", "--jws", h.write(t, "jws", jws)}, more...)...)
}

// fromJSON reads what a command prints with --json.
func fromJSON[T any](t *testing.T, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}
