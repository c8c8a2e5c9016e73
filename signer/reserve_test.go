package signer_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	approvers "inkan/approver/client"
	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
)

// approved is a key that asks as a TPM's key in approver mode does.
type approved struct{ *ecdsa.PrivateKey }

func (k approved) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	a, ok := opts.(interface {
		Authorize(nonce []byte, accept func(string, int32, []byte) (bool, error)) error
	})
	if !ok {
		return nil, errors.New("nobody is asked")
	}
	if err := a.Authorize(make([]byte, 32), func(string, int32, []byte) (bool, error) { return true, nil }); err != nil {
		return nil, err
	}
	return k.PrivateKey.Sign(rand, digest, crypto.SHA256)
}

// TestReserve: while no approver answers and a consent is in force, actions are
// signed with the reserve's key, in its own scope; else they are refused.
func TestReserve(t *testing.T) {
	ca := testca.New(t)
	in := func(mode string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			x, err := certext.AttestationExtension(certext.Attestation{Policy: "test", EvidenceSHA256: "00", Time: time.Now().UTC().Truncate(time.Second), Protection: certext.ProtectionTPM, Mode: mode, EK: certext.EKPinned, Device: "test"})
			if err != nil {
				t.Fatal(err)
			}
			c.ExtraExtensions[1] = x
		}
	}
	narrow, err := scope.Parse([]byte(strings.Replace(scopeJSON, `"25000"`, `"5000"`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	full, err := scope.Parse([]byte(scopeJSON))
	if err != nil {
		t.Fatal(err)
	}
	action, reserve := ca.Agent(t, "a", full.Canonical(), in(certext.ModeApprover)), ca.Agent(t, "a", narrow.Canonical(), in(certext.ModeReserve))
	var until time.Time
	group := approvers.New([]approvers.Member{{URL: "https://127.0.0.1:1", Roots: ca.Roots}}, func() (*tls.Certificate, error) { return nil, errors.New("none") }, time.Second, time.Second)
	open := func(certificate *testca.Agent) (*signer.Signer, error) {
		config, err := signer.ParseConfig(fmt.Appendf(nil, "socket: run/s\nstate_dir: state\ntpm: none\nissuer: {url: 'https://localhost', ca: none}\nagents:\n%s    reserve: true\n", agent("a", "/bin/true")), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		return signer.Open(t.Context(), config, map[string]signer.Credentials{"a": {Key: approved{action.Key.(*ecdsa.PrivateKey)}, Chain: action.Chain, Approvers: group,
			Reserve: &signer.ReserveCredentials{Key: certificate.Key, Chain: func() ([]*x509.Certificate, error) { return certificate.Chain, nil },
				Renew: func(crypto.SignerOpts) (time.Time, error) { return time.Time{}, errors.New("not here") }, Until: func() time.Time { return until }}}}, nil, slog.New(slog.DiscardHandler))
	}
	if _, err := open(ca.Agent(t, "a", narrow.Canonical(), nil)); err == nil || !strings.Contains(err.Error(), `mode "local"`) {
		t.Errorf("a certificate for a key in local mode: %v", err)
	}
	s, err := open(reserve)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	body := func(qty string) []byte {
		return []byte(strings.Replace(string(order(client.NewID())), `"OrderQty":"100"`, `"OrderQty":"`+qty+`"`, 1))
	}
	act := func(b []byte) (*signer.Signed, error) { return s.Agent("a").Act(t.Context(), b, nil, nil) }
	first := body("10")
	if _, err := act(first); !errors.Is(err, &scope.Refusal{Rule: signer.RuleNoApprover}) || strings.Contains(err.Error(), "reserve") {
		t.Errorf("without a consent: %v", err)
	}
	until = time.Now().Add(time.Minute)
	signed, err := act(body("10"))
	if err != nil {
		t.Fatalf("with a consent: %v", err)
	}
	m, err := jws.Split([]byte(signed.JWS))
	if err != nil {
		t.Fatal(err)
	}
	if err := jws.Verify(reserve.Chain[0].PublicKey, "ES256", m.SigningInput, m.Signature); err != nil {
		t.Errorf("by another key than the reserve's: %v", err)
	}
	st, err := scope.ParseStatement(m.Payload)
	if err != nil {
		t.Fatal(err)
	}
	if [32]byte(st.Decision.Certificate) != sha256.Sum256(reserve.Chain[0].Raw) || [32]byte(st.Decision.Scope) != narrow.Hash() {
		t.Error("the statement names another certificate or scope")
	}
	if _, err := act(body("200")); !errors.Is(err, &scope.Refusal{Rule: scope.RuleOrderNotional}) {
		t.Errorf("an order outside the reserve's scope: %v", err)
	}
	// What stands in the record under the agent's own certificate is not signed with another key.
	if _, err := act(first); !errors.Is(err, &scope.Refusal{Rule: signer.RuleUnsigned}) {
		t.Errorf("the first one again: %v", err)
	}
	until = time.Now().Add(-time.Second)
	if _, err := act(body("10")); !errors.Is(err, &scope.Refusal{Rule: signer.RuleNoApprover}) {
		t.Errorf("after the consent: %v", err)
	}
}
