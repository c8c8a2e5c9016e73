package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"

	"inkan/attest"
	"inkan/journal"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/tpm"
)

// attackBooks is the family books: in local mode root can use the agent's key.
// The TPM keeps count of it, and verification finds it afterwards.
func attackBooks(ctx context.Context, w *world) error {
	if err := w.bringUp(ctx); err != nil {
		return err
	}
	w.title("Root signs behind the signer's back, in local mode, and an auditor looks afterwards")
	for _, a := range []struct {
		name, rule string
		do         func(d *tpm.Device, k *tpm.Key) error
	}{
		{"an order beside the signer's", string(journal.RuleOffTheBooks), func(_ *tpm.Device, k *tpm.Key) error { return behind(k) }},
		{"the same, and its digest taken away", string(journal.RuleTaken), func(d *tpm.Device, k *tpm.Key) error {
			if err := behind(k); err != nil {
				return err
			}
			if err := d.StartAudit(discard{}); err != nil {
				return err
			}
			_, err := d.Testify(nil)
			return err
		}},
		{"the same, written into the journal", string(journal.RuleUnexplained), func(d *tpm.Device, k *tpm.Key) error {
			j, err := journal.Open(w.path("state", journal.FileName))
			if err != nil {
				return err
			}
			defer j.Close()
			if err := d.StartAudit(j); err != nil {
				return err
			}
			return behind(k)
		}},
	} {
		if err := w.attack(a.name, "auditor", a.rule, func() (bool, string, error) { return w.audited(ctx, a.do) }); err != nil {
			return err
		}
	}
	return nil
}

// discard is a journal that keeps nothing.
type discard struct{}

func (discard) Begin([]byte, [32]byte, []byte) (func([]byte, error) error, error) {
	return func([]byte, error) error { return nil }, nil
}

func (discard) Testify(_ []byte, take func() (attest.Attested, error)) (attest.Attested, error) {
	return take()
}

func behind(k *tpm.Key) error {
	_, err := crypto.SignMessage(k, nil, []byte("eyJ an order of root's own"), crypto.SHA256)
	return err
}

// audited starts with a fresh journal, has an order signed as it should be,
// lets root act, stops the signer and returns what an auditor finds.
func (w *world) audited(ctx context.Context, act func(*tpm.Device, *tpm.Key) error) (accepted bool, said string, err error) {
	w.signer.stop()
	if err := os.Remove(w.path("state", journal.FileName)); err != nil {
		return false, "", err
	}
	if err := w.startSigner(); err != nil {
		return false, "", err
	}
	if ok, said, err := w.signs(ctx, w.inkan, order(client.NewID())); err != nil || !ok {
		return false, "", errors.Join(err, fmt.Errorf("the honest order: %s", said))
	}
	verify := []string{"audit", "verify", "--log", w.path("state", "mm-07", "log.db"), "--ca", w.path("issuer", "ca.pem"), "--journal", w.path("state", journal.FileName)}
	honest, err := w.try(ctx, "", verify...)
	if err != nil || honest.code != 0 {
		return false, "", errors.Join(err, fmt.Errorf("before the attack the journal does not stand: %s", honest.stderr))
	}
	if err := w.asRoot(act); err != nil {
		return false, "", fmt.Errorf("root could not sign, which it can in local mode: %w", err)
	}
	w.signer.stop() // it has the TPM testify a last time
	found, err := w.try(ctx, "", verify...)
	if err != nil {
		return false, "", err
	}
	return found.code == 0, found.stdout + found.stderr, w.startSigner()
}

// asRoot loads the agent's key beside the signer.
func (w *world) asRoot(act func(*tpm.Device, *tpm.Key) error) error {
	state, err := signer.OpenState(w.path("state"), "mm-07")
	if err != nil {
		return err
	}
	var p tpm.Policies
	if _, err := state.Policies(&p); err != nil {
		return err
	}
	keys, err := state.Keys(attest.PurposeAction)
	if err != nil {
		return err
	}
	d, err := tpm.Open(w.tpm.Address)
	if err != nil {
		return err
	}
	defer d.Close()
	k, err := d.LoadKey(keys[attest.PurposeAction], &p)
	if err != nil {
		return err
	}
	return act(d, k)
}
