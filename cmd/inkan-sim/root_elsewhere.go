package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"inkan/attest"
	"inkan/scope"
	"inkan/signer/client"
	"inkan/simulator"
)

// attackApprover: root asks the approver itself, with the agent's TLS key.
func (r *root) attackApprover(ctx context.Context) error {
	r.w.title("8. Root asks the approver itself")
	statement, _, err := r.honest(ctx)
	if err != nil {
		return err
	}
	nonce := make([]byte, attest.NonceTPMSize)
	nothing := func(*scope.Statement) {}
	for _, a := range []struct {
		name, rule string
		change     func(*scope.Statement)
		request    func(map[string]any)
	}{
		{"a digest instead of a statement", "form", nothing, func(q map[string]any) {
			delete(q, "statement")
			q["digest"] = make([]byte, 32)
		}},
		{"a digest beside another statement", "form", nothing, func(q map[string]any) { q["digest"] = make([]byte, 32) }},
		{"no nonce, to replay it anywhere", "form", nothing, func(q map[string]any) { q["nonce"] = []byte{} }},
		{"a negative expiration, for a ticket", "form", nothing, func(q map[string]any) { q["expiration"] = -3600 }},
		{"an order above the limit", "max_order_notional", func(st *scope.Statement) {
			d, _ := scope.ParseDecimal("4000") // a constant
			st.Order.OrderQty = &d
		}, nil},
		{"a notional that is not the order's", "statement", func(st *scope.Statement) {
			d, _ := scope.ParseDecimal("1")
			st.Decision.Notional.Amount = d
		}, nil},
		{"another agent's name", "statement", func(st *scope.Statement) { st.Agent += "x" }, nil},
		{"an order for tomorrow", "time", func(st *scope.Statement) {
			st.Time.Time = st.Time.Time.Add(24 * time.Hour)
			st.Expires += 24 * 3600
		}, nil},
		{"entries left out", "gap", func(st *scope.Statement) { st.Counter += 5 }, nil},
		{"a second order with an old number", "fork", func(st *scope.Statement) { st.Counter-- }, nil},
		{"an order that follows another record", "fork", func(st *scope.Statement) { st.Previous[0]++ }, nil},
		{"usage that is not true", "usage", func(st *scope.Statement) {
			st.Decision.Utilisation = append(st.Decision.Utilisation, scope.Utilisation{Limit: scope.RuleOrdersWindow, Window: scope.Window{RollingS: 60}, Used: "1", Of: "1000"})
		}, nil},
	} {
		if err := r.w.attack(a.name, "approver", a.rule, func() (bool, string, error) {
			st := statement
			if a.request == nil {
				var err error
				if st, err = r.forged(ctx, a.change); err != nil {
					return false, "", err
				}
			}
			q := r.request(st, nonce)
			if a.request != nil {
				a.request(q)
			}
			_, err := r.ask(q)
			return err == nil, fmt.Sprint(err), nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// elsewhere: other machines, other certificates, and an approver that is not
// on anybody's side.
func (r *root) elsewhere(ctx context.Context) error {
	w := r.w
	w.title("9. Other machines")
	thief, err := simulator.StartTPM(ctx, w.path("thief"))
	if err != nil {
		return err
	}
	defer func() { _ = thief.Kill() }() // it ends with this process anyway
	file, err := os.ReadFile(w.path("state", "mm-07", "action.tss2.pem"))
	if err != nil {
		return err
	}
	if err := w.attack("the key file, on another TPM", "TPM", "TPM_RC_INTEGRITY", func() (bool, string, error) {
		link, err := linuxudstpm.Open(thief.Address)
		if err != nil {
			return false, "", err
		}
		other := &root{w: w, link: link}
		defer other.end()
		_, err = other.load(file)
		return err == nil, code(err), nil
	}); err != nil {
		return err
	}
	// A compromised approver has its key and every record; it has not the TPM.
	if err := w.attack("a compromised approver alone", "TPM", "TPM_RC_INTEGRITY", func() (bool, string, error) {
		link, err := linuxudstpm.Open(thief.Address)
		if err != nil {
			return false, "", err
		}
		other := &root{w: w, link: link}
		defer other.end()
		if _, err := os.Stat(w.path("approver", "approver.key")); err != nil {
			return false, "", err // it has it
		}
		k, err := other.load(file) // even with the host's files
		if err == nil {
			err = other.sign(k, sha256.Sum256(nil), tpm2.PasswordAuth(nil))
		}
		return err == nil, code(err), nil
	}); err != nil {
		return err
	}
	// An approver with a certificate of its own making takes the place of the real one.
	return w.attack("another approver's TLS certificate", "signer", "no_approver", func() (bool, string, error) { return r.swapped(ctx) })
}

// swapped runs the signer against an approver whose TLS certificate is another one.
func (r *root) swapped(ctx context.Context) (bool, string, error) {
	w := r.w
	if _, err := w.run(ctx, "approver", "init", "--dir", w.path("impostor"), "--trust-domain", "example.org", "--ca", w.path("issuer", "ca.pem"), "--crl-url", "http://"+w.addresses.Public+"/crl",
		"--listen", "127.0.0.1:0", "--key", "file:"+w.path("approver", "approver.key"), "--agent", "mm-07"); err != nil {
		return false, "", err
	}
	var ready struct{ Signers string }
	impostor, err := w.startReady("impostor", &ready, "approver", "serve", "--config", w.path("impostor", "approver.yaml"))
	if err != nil {
		return false, "", err
	}
	defer impostor.stop()
	real := w.approverAt
	w.approverAt = []string{ready.Signers} // and the signer still pins approver/tls.pem
	if err := w.restartSigner(); err != nil {
		return false, "", err
	}
	accepted, said, err := w.signs(ctx, w.inkan, order(client.NewID()))
	w.approverAt = real
	return accepted, said, errors.Join(err, w.restartSigner())
}

// restartSigner starts the signer anew with the configuration as it should be now.
func (w *world) restartSigner() error {
	w.signer.stop()
	if err := w.signerConfig(map[string]string{"mm-07": cmp.Or(w.caller, w.inkan)}); err != nil {
		return err
	}
	return w.startSigner()
}
