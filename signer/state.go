package signer

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"inkan/internal/durable"
)

// Names of files in an agent's state directory.
const (
	LogFile      = "log.db"
	PoliciesFile = "policies.json"
)

// AgentDir is an agent's directory below the state directory.
func AgentDir(stateDir, agent string) string { return filepath.Join(stateDir, agent) }

// State reads and writes an agent's files: keys as TSS2 PRIVATE KEY files,
// certificate chains, and the policies that the keys work under.
type State struct{ dir string }

// OpenState returns an agent's state; its directory is made if need be.
func OpenState(stateDir, agent string) (*State, error) {
	dir := AgentDir(stateDir, agent)
	return &State{dir}, os.MkdirAll(dir, 0o700)
}

// ReadState returns an agent's state for reading: nothing is made.
func ReadState(stateDir, agent string) *State { return &State{AgentDir(stateDir, agent)} }

func (s *State) path(purpose, kind string) string {
	return filepath.Join(s.dir, purpose+kind)
}

// Keys returns the key files by purpose.
func (s *State) Keys(purposes ...string) (map[string][]byte, error) {
	out := make(map[string][]byte)
	for _, p := range purposes {
		b, err := os.ReadFile(s.path(p, ".tss2.pem"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[p] = b
	}
	return out, nil
}

// SaveKeys writes key files by purpose.
func (s *State) SaveKeys(keys map[string][]byte) error {
	for p, b := range keys {
		if err := durable.WriteFile(s.path(p, ".tss2.pem"), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// SaveChain writes a certificate chain, leaf first.
func (s *State) SaveChain(purpose string, chain []*x509.Certificate) error {
	var b []byte
	for _, c := range chain {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return durable.WriteFile(s.path(purpose, ".pem"), b, 0o644)
}

// Chain returns a certificate chain; it is empty where there is none.
func (s *State) Chain(purpose string) ([]*x509.Certificate, error) {
	b, err := os.ReadFile(s.path(purpose, ".pem"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for rest := b; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return out, nil
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
}

// SavePolicies writes what the keys work under.
func (s *State) SavePolicies(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(s.dir, PoliciesFile), b, 0o600)
}

// Policies reads what SavePolicies wrote; ok is false where there is nothing.
func (s *State) Policies(v any) (ok bool, err error) {
	b, err := os.ReadFile(filepath.Join(s.dir, PoliciesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, json.Unmarshal(b, v)
}
