package testca

import (
	"crypto"
	"encoding/pem"
	"os"
	"path/filepath"
)

// State writes what a signer keeps of an agent and package wire reads: both certificates
// and policies, in JSON. The action key is a software key, which is returned.
func (ca *CA) State(tb TB, dir, name string, scope []byte, tlsKey crypto.PublicKey, policies []byte) *Agent {
	tb.Helper()
	a := ca.Agent(tb, name, scope, nil)
	t := ca.TLS(tb, a.ID, tlsKey, nil, nil)
	WriteFile(tb, dir, "action.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Chain[0].Raw}))
	WriteFile(tb, dir, "tls.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: t.Raw}))
	WriteFile(tb, dir, "policies.json", policies)
	return a
}

// WriteFile replaces a file at once, as a signer does.
func WriteFile(tb TB, dir, name string, b []byte) string {
	tb.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		tb.Fatal(err)
	}
	return path
}
