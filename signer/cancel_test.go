package signer_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
)

// TestKeyForCancels: cancels are signed with a key of their own, everything else
// with the agent's; a certificate that allows more than cancels is not taken for it.
func TestKeyForCancels(t *testing.T) {
	full, err := scope.Parse([]byte(scopeJSON))
	if err != nil {
		t.Fatal(err)
	}
	only, err := full.CancelsOnly()
	if err != nil {
		t.Fatal(err)
	}
	ca := testca.New(t)
	action, cancel, wide := ca.Agent(t, "a", full.Canonical(), nil), ca.Agent(t, "a", only.Canonical(), nil), ca.Agent(t, "a", full.Canonical(), nil)
	open := func(key, certificate *testca.Agent) (*signer.Signer, error) {
		dir := t.TempDir()
		config, err := signer.ParseConfig(fmt.Appendf(nil, "socket: run/s\nstate_dir: state\ntpm: none\nissuer: {url: 'https://localhost', ca: none}\nagents:\n%s    cancel_without_approver: true\n", agent("a", "/bin/true")), dir)
		if err != nil {
			t.Fatal(err)
		}
		return signer.Open(t.Context(), config, map[string]signer.Credentials{"a": {Key: action.Key, Chain: action.Chain,
			Cancel: &signer.CancelCredentials{Key: key.Key, Chain: func() ([]*x509.Certificate, error) { return certificate.Chain, nil }}}}, nil, slog.New(slog.DiscardHandler))
	}
	if _, err := open(wide, wide); err == nil || !strings.Contains(err.Error(), "allows more than cancels") {
		t.Errorf("a certificate for everything: %v", err)
	}
	if _, err := open(cancel, wide); err == nil || !strings.Contains(err.Error(), "not for the agent's key") {
		t.Errorf("a certificate for another key: %v", err)
	}
	s, err := open(cancel, cancel)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for body, by := range map[string]*testca.Agent{
		string(order(client.NewID())): action,
		fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"C-1","OrigClOrdID":"A-1"}}`, client.NewID()): cancel,
	} {
		signed, err := s.Agent("a").Act(t.Context(), []byte(body), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := jws.Split([]byte(signed.JWS))
		if err != nil {
			t.Fatal(err)
		}
		if err := jws.Verify(by.Chain[0].PublicKey, "ES256", m.SigningInput, m.Signature); err != nil {
			t.Errorf("%s: by another key: %v", body, err)
		}
		st, err := scope.ParseStatement(m.Payload)
		if err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(by.Chain[0].Raw); !bytes.Equal(st.Decision.Certificate[:], sum[:]) {
			t.Errorf("%s: it names another certificate", body)
		}
	}
}
