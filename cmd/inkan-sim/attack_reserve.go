package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/tpm"
)

// reserveFor is how long a consent serves.
const reserveFor = 15 * time.Second

// reserveYAML has a fifth of the agent's limit for an order. What the agent does
// otherwise counts too: after one large order, two small ones have room in an hour.
var reserveYAML = strings.Replace(scopeYAML, `amount: "25000"`, `amount: "5000"`, 1) + `max_notional_per_window:
  - {currency: EUR, amount: "35000", window: {rolling_s: 3600}}
`

// small is an order inside the reserve's scope, of 4,899.20 EUR.
func small() string { return order(client.NewID(), `"400"`, `"80"`) }

// attackReserve is the family reserve: an agent whose approver goes away.
func attackReserve(ctx context.Context, w *world) error {
	w.withApprover, w.reserve = true, reserveYAML
	if err := w.bringUp(ctx); err != nil {
		return err
	}
	x := &reserved{w}
	if err := x.goesThrough(ctx, order(client.NewID()), certext.ModeApprover); err != nil {
		return err
	}
	w.say("   with the approver, an order of 24,496 EUR: signed and accepted")
	for _, step := range []func(context.Context) error{x.gone, x.back, x.asRoot, x.killed} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

type reserved struct{ *world }

func (x *reserved) approver() *process {
	for i := len(x.procs) - 1; i >= 0; i-- {
		if x.procs[i].name == "approver" {
			return x.procs[i]
		}
	}
	return nil
}

// goesThrough has an order signed by a key of a mode, and the venue accept it.
func (x *reserved) goesThrough(ctx context.Context, order, mode string) error {
	signed, err := x.try(ctx, order, "sign", "--socket", x.socket(), "--action", "-")
	if err != nil || signed.code != 0 {
		return errors.Join(err, fmt.Errorf("an order is not signed: %s", signed.stderr))
	}
	if got, err := modeOf(signed.stdout); err != nil || got != mode {
		return errors.Join(err, fmt.Errorf("the order was signed by a key in mode %s, %s is expected", got, mode))
	}
	if ok, said, err := x.verifies(ctx, signed.stdout); err != nil || !ok {
		return errors.Join(err, fmt.Errorf("the venue refuses an order: %s", said))
	}
	return nil
}

// modeOf is the mode of the key that signed, from the certificate in the JWS.
func modeOf(text string) (string, error) {
	m, err := jws.Split([]byte(strings.TrimSpace(text)))
	if err != nil {
		return "", err
	}
	h, err := m.Header()
	if err != nil {
		return "", err
	}
	if len(h.X5C) == 0 {
		return "", errors.New("the JWS has no certificate")
	}
	der, err := base64.StdEncoding.DecodeString(h.X5C[0])
	if err != nil {
		return "", err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return "", err
	}
	a, err := certext.ParseAction(leaf)
	if err != nil {
		return "", err
	}
	return a.Attestation.Mode, nil
}

// gone: the approver does not answer any more.
func (x *reserved) gone(ctx context.Context) error {
	w := x.world
	x.approver().stop()
	// The first order finds out, and is refused, unless the signer has found out by itself.
	if ok, said, err := w.signs(ctx, w.inkan, order(client.NewID(), `"400"`, `"1"`)); err != nil || !ok && !strings.Contains(said, "no_approver") {
		return errors.Join(err, fmt.Errorf("the first order without the approver: %s", said))
	}
	for range 2 {
		if err := x.goesThrough(ctx, small(), certext.ModeReserve); err != nil {
			return err
		}
	}
	w.say("   the next two, of 4,899.20 EUR each, were signed with the reserve's key, and the venue accepts them")
	if err := w.attack("an order above the reserve's limit", "signer", "max_order_notional", func() (bool, string, error) {
		return w.signs(ctx, w.inkan, order(client.NewID()))
	}); err != nil {
		return err
	}
	if err := w.attack("one more small order than the reserve's hour has room for", "signer", "max_notional_per_window", func() (bool, string, error) {
		return w.signs(ctx, w.inkan, small())
	}); err != nil {
		return err
	}
	time.Sleep(reserveFor) // the TPM's clock says when it ends
	return w.attack("an order after the last consent ended", "signer", "no_approver", func() (bool, string, error) {
		return w.signs(ctx, w.inkan, order(client.NewID(), `"400"`, `"1"`))
	})
}

// back: the approver answers again, and sees what was signed without it.
func (x *reserved) back(ctx context.Context) error {
	if _, err := x.serveApprover(); err != nil {
		return err
	}
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if err = x.goesThrough(ctx, order(client.NewID()), certext.ModeApprover); err == nil {
			x.say("   the approver is back: an order of 24,496 EUR is signed under its authorization")
			return nil
		}
	}
	return err
}

// asRoot: with the agent's files, its TLS key and the TPM, root gets a consent
// as the signer does, and has the reserve's key sign what it likes.
func (x *reserved) asRoot(ctx context.Context) error {
	w := x.world
	k, err := w.stealReserve()
	if err != nil {
		return err
	}
	defer k.close()
	until, err := k.key.Reserve(k)
	if err != nil {
		return fmt.Errorf("root gets no consent: %w", err)
	}
	w.say("   root has the approver's consent to the reserve until %s, and its key", until.UTC().Format("15:04:05"))
	for _, a := range []struct{ name, qty, notional, reason string }{
		{"root has the reserve's key sign an order above its limit", "400", "24496", "max_order_notional"},
		{"root has it sign more small orders than an hour has room for", "80", "4899.2", "max_notional_per_window"},
	} {
		if err := w.attack(a.name, "venue", a.reason, func() (bool, string, error) {
			text, err := k.sign(ctx, a.qty, a.notional)
			if err != nil {
				return false, "", err
			}
			return w.verifies(ctx, text)
		}); err != nil {
			return err
		}
	}
	return nil
}

// killed: an agent that is stopped gets no consent.
func (x *reserved) killed(ctx context.Context) error {
	w := x.world
	if _, err := w.run(ctx, "kill", "--socket", w.socket(), "--agent", "mm-07", "--reason", "runs wild"); err != nil {
		return err
	}
	// The approver learns it with the next request.
	if signed, err := w.try(ctx, cancelOrder(), "sign", "--socket", w.socket(), "--action", "-"); err != nil || signed.code != 0 {
		return errors.Join(err, fmt.Errorf("a cancel: %s", signed.stderr))
	}
	k, err := w.stealReserve()
	if err != nil {
		return err
	}
	defer k.close()
	return w.attack("root asks for a consent after the kill", "approver", "kill", func() (bool, string, error) {
		_, err := k.key.Reserve(k)
		return err == nil, code(err), nil
	})
}

// reserveKey is the reserve's key in root's hands.
type reserveKey struct {
	r     *root
	d     *tpm.Device
	key   *tpm.Key
	chain []*x509.Certificate
	ahead uint64 // statements that root made up
}

func (w *world) stealReserve() (*reserveKey, error) {
	r, err := w.newRoot()
	if err != nil {
		return nil, err
	}
	if err := r.quiet(); err != nil {
		return nil, err
	}
	state, err := signer.OpenState(r.w.path("state"), "mm-07")
	if err != nil {
		return nil, err
	}
	keys, err := state.Keys(attest.PurposeReserve)
	if err != nil {
		return nil, err
	}
	k := &reserveKey{r: r}
	if k.chain, err = state.Chain(attest.PurposeReserve); err != nil {
		return nil, err
	}
	if k.d, err = tpm.Open(r.w.tpm.Address); err != nil {
		return nil, err
	}
	k.key, err = k.d.LoadKey(keys[attest.PurposeReserve], &r.policies)
	return k, err
}

func (k *reserveKey) close() { _ = k.d.Close() }

// HashFunc implements crypto.SignerOpts.
func (*reserveKey) HashFunc() crypto.Hash { return crypto.SHA256 }

// Authorize asks the approver for a consent with the agent's TLS key.
func (k *reserveKey) Authorize(nonce []byte, accept func(string, int32, []byte) (bool, error)) error {
	var chain [][]byte
	for _, c := range k.chain {
		chain = append(chain, c.Raw)
	}
	a, err := k.r.askAt("/v1/consents", map[string]any{"chain": chain, "nonce": nonce})
	if err != nil {
		return err
	}
	_, err = accept(a.Approver, a.Expiration, a.Signature)
	return err
}

// sign makes up a statement under the reserve's certificate and signs it.
func (k *reserveKey) sign(ctx context.Context, qty, notional string) (string, error) {
	quantity, err := scope.ParseDecimal(qty)
	if err != nil {
		return "", err
	}
	amount, err := scope.ParseDecimal(notional)
	if err != nil {
		return "", err
	}
	return k.r.forges(ctx, k.key, k.chain, func(st *scope.Statement) {
		k.ahead++
		st.Counter += scope.Counter(k.ahead)
		st.Order.OrderQty, st.Decision.Notional, st.Decision.Utilisation = &quantity, &scope.Amount{Amount: amount, Currency: "EUR"}, nil
	})
}
