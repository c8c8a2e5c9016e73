package main

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/tpm"
)

// alone: no approver answers. Orders are refused, cancels go out with a key of
// their own, and root can do no more with that key than cancel.
func (r *root) alone(ctx context.Context, approver *process) error {
	w := r.w
	// The approver has not seen a cancel before: the next order tells it.
	if err := w.cancels(ctx); err != nil {
		return err
	}
	if err := w.frontDoor(ctx); err != nil {
		return err
	}
	approver.stop()
	if err := w.cancels(ctx); err != nil {
		return err
	}
	w.say("   a cancel was signed with the key for cancels, and the venue accepts it")
	if err := w.attack("an order, with no approver", "signer", "no_approver", func() (bool, string, error) {
		return w.signs(ctx, w.inkan, order(client.NewID()))
	}); err != nil {
		return err
	}
	if err := r.quiet(); err != nil {
		return err
	}
	return w.attack("an order under the key for cancels", "venue", "allowed_actions", func() (bool, string, error) {
		text, err := r.withCancelKey(ctx)
		if err != nil {
			return false, "", err
		}
		return w.verifies(ctx, text)
	})
}

func cancelOrder() string {
	return fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"C-991","OrigClOrdID":"A-991"}}`, client.NewID())
}

// cancels has a cancel signed, which the venue must accept.
func (w *world) cancels(ctx context.Context) error {
	signed, err := w.try(ctx, cancelOrder(), "sign", "--socket", w.socket(), "--action", "-")
	if err != nil || signed.code != 0 {
		return errors.Join(err, fmt.Errorf("a cancel: %s", signed.stderr))
	}
	if ok, said, err := w.verifies(ctx, signed.stdout); err != nil || !ok {
		return errors.Join(err, fmt.Errorf("the venue refuses a cancel: %s", said))
	}
	return nil
}

// withCancelKey signs an order as root can: the key for cancels is in local mode.
func (r *root) withCancelKey(ctx context.Context) (string, error) {
	state, err := signer.OpenState(r.w.path("state"), "mm-07")
	if err != nil {
		return "", err
	}
	var p tpm.Policies
	if _, err := state.Policies(&p); err != nil {
		return "", err
	}
	keys, err := state.Keys(attest.PurposeCancel)
	if err != nil {
		return "", err
	}
	chain, err := state.Chain(attest.PurposeCancel)
	if err != nil {
		return "", err
	}
	d, err := tpm.Open(r.w.tpm.Address)
	if err != nil {
		return "", err
	}
	defer d.Close()
	k, err := d.LoadKey(keys[attest.PurposeCancel], &p)
	if err != nil {
		return "", err
	}
	return r.forges(ctx, k, chain, func(*scope.Statement) {})
}

// forges makes up a statement under a certificate and signs it with its key.
func (r *root) forges(ctx context.Context, k crypto.Signer, chain []*x509.Certificate, change func(*scope.Statement)) (string, error) {
	header, err := jws.NewHeader("ES256", chain, true)
	if err != nil {
		return "", err
	}
	action, err := certext.ParseAction(chain[0])
	if err != nil {
		return "", err
	}
	statement, err := r.forged(ctx, func(st *scope.Statement) {
		st.Decision.Certificate, st.Decision.Scope = sha256.Sum256(chain[0].Raw), sha256.Sum256(action.Scope)
		change(st)
	})
	if err != nil {
		return "", err
	}
	input := header.SigningInput(statement)
	signature, err := jws.Sign(k, input)
	if err != nil {
		return "", err
	}
	return jws.Compact(input, signature), nil
}
