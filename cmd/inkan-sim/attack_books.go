package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"strings"

	"inkan/attest"
	"inkan/journal"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/tpm"
)

// attackBooks is the family books: in local mode root can use the agent's key.
// The TPM keeps count of it, and the issuer at the next renewal, or verification, finds it.
func attackBooks(ctx context.Context, w *world) error {
	if err := w.bringUp(ctx); err != nil {
		return err
	}
	w.title("Root signs behind the signer's back, in local mode, and the host renews")
	if err := w.attack("an order beside the signer's, then a renewal", "issuer", "C3", func() (bool, string, error) {
		if err := w.asRoot(func(_ *tpm.Device, k *tpm.Key) error { return behind(k) }); err != nil {
			return false, "", fmt.Errorf("root could not sign, which it can in local mode: %w", err)
		}
		r, err := w.try(ctx, "", "signer", "enrol", "--config", w.path("signer.yaml"))
		return r.code == 0, r.stderr, err
	}); err != nil {
		return err
	}
	if _, err := w.run(ctx, "issuer", "device", "reset-audit", "--dir", w.path("issuer"), "--id", "host1"); err != nil {
		return err
	}
	if _, err := w.run(ctx, "signer", "enrol", "--config", w.path("signer.yaml")); err != nil {
		return fmt.Errorf("after an operator's reset: %w", err)
	}
	// Nothing is found where nothing was done: doctor's signatures are in the journal too.
	said, err := w.books(ctx, func() error {
		_, err := w.run(ctx, "doctor", "--config", w.path("signer.yaml"))
		return err
	})
	if err != nil {
		return err
	}
	if said.code != 0 || !strings.Contains(said.stdout, "Nothing was signed behind the signer's back") {
		return fmt.Errorf("an honest journal does not stand: %s%s", said.stdout, said.stderr)
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
		if err := w.attack(a.name, "auditor", a.rule, func() (bool, string, error) {
			said, err := w.books(ctx, func() error {
				if err := w.asRoot(a.do); err != nil {
					return fmt.Errorf("root could not sign, which it can in local mode: %w", err)
				}
				return nil
			})
			return said.code == 0, said.stdout + said.stderr, err
		}); err != nil {
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

// books starts with a fresh journal, has an order signed as
// it should be, lets something happen, stops the signer, which has the TPM
// testify a last time, and returns what an auditor finds.
func (w *world) books(ctx context.Context, happens func() error) (result, error) {
	if err := os.Remove(w.path("state", journal.FileName)); err != nil {
		return result{}, err
	}
	if err := w.restartSigner(); err != nil {
		return result{}, err
	}
	if ok, said, err := w.signs(ctx, w.inkan, order(client.NewID())); err != nil || !ok {
		return result{}, errors.Join(err, fmt.Errorf("the honest order: %s", said))
	}
	if err := happens(); err != nil {
		return result{}, err
	}
	w.signer.stop()
	found, err := w.try(ctx, "", "audit", "verify", "--log", w.path("state", "mm-07", "log.db"), "--ca", w.path("issuer", "ca.pem"), "--journal", w.path("state", journal.FileName))
	return found, errors.Join(err, w.startSigner())
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
