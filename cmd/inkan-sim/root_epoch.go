package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
	"inkan/signer"
)

// rotate replaces the approver's key: the policy key approves the new one for
// the next epoch, the issuer demands that epoch, and the TPM refuses the old approval from then on.
func (r *root) rotate(ctx context.Context) error {
	w := r.w
	old := w.keyFile()
	if _, err := w.run(ctx, "approver", "init", "--dir", w.path("approver2"), "--trust-domain", "example.org", "--ca", w.path("issuer", "ca.pem"), "--crl-url", "http://"+w.addresses.Public+"/crl",
		"--listen", "127.0.0.1:0", "--agent", "mm-07"); err != nil {
		return err
	}
	w.epoch++
	for _, step := range []func() error{
		func() error { return w.approve(ctx, "next") },
		func() error {
			return w.approve(ctx, "next-with-approver", "--approver", w.path("approver2", "approver.pub.pem"))
		},
		func() error { return w.demandEpoch(ctx) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	var ready struct{ Signers string }
	approver, err := w.startReady("approver2", &ready, "approver", "serve", "--config", w.path("approver2", "approver.yaml"))
	if err != nil {
		return err
	}
	w.approverAt, w.approverDir = []string{ready.Signers}, "approver2"
	w.signer.stop()
	// Root had keys of its own sign for these attacks. The TPM testifies to that too.
	if err := w.attack("a renewal after that", "issuer", "C3", func() (bool, string, error) {
		r, err := w.try(ctx, "", "signer", "enrol", "--config", w.path("signer.yaml"))
		return r.code == 0, r.stderr, err
	}); err != nil {
		return err
	}
	if _, err := w.run(ctx, "issuer", "device", "reset-audit", "--dir", w.path("issuer"), "--id", "host1"); err != nil {
		return err
	}
	if _, err := w.run(ctx, "signer", "enrol", "--config", w.path("signer.yaml")); err != nil {
		return err
	}
	if err := w.restartSigner(); err != nil {
		return err
	}
	if now := w.keyFile(); now != old {
		return errors.New("the agent's key changed with the approver's")
	}
	if err := w.frontDoor(ctx); err != nil {
		return err
	}
	if err := r.quiet(); err != nil {
		return err
	}
	// r.approved is the approval of the epoch that has ended.
	if err := r.tpmAttack("the approval of the epoch before", "TPM_RC_POLICY:", func() error {
		s, err := r.session()
		if err != nil {
			return err
		}
		return r.pcr(s, r.approved)
	}); err != nil {
		return err
	}
	w.title("12. No approver answers")
	return r.alone(ctx, approver)
}

// keyFile tells the agent's key file from another.
func (w *world) keyFile() string {
	state, err := signer.OpenState(w.path("state"), "mm-07")
	if err != nil {
		return ""
	}
	keys, err := state.Keys(attest.PurposeAction)
	if err != nil {
		return ""
	}
	return string(keys[attest.PurposeAction])
}

// undefineEpoch takes the epoch counter away, which the owner may.
func (r *root) undefineEpoch(name []byte) error {
	_, err := tpm2.NVUndefineSpace{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: attest.EpochIndex, Name: tpm2.TPM2BName{Buffer: name}}}.Execute(r.link)
	return err
}

// changed: root changes what approvals name, the epoch counter and the host's
// state. All it gains is that nothing is signed any more.
func (r *root) changed(ctx context.Context) error {
	old := r.approved
	ended := func() error {
		s, err := r.session()
		if err != nil {
			return err
		}
		return r.pcr(s, old)
	}
	for _, a := range []struct {
		name, rc string
		f        func() error
	}{
		{"the counter undefined", "TPM_RC_HANDLE", func() error {
			if err := r.undefineEpoch(attest.EpochName()); err != nil {
				return fmt.Errorf("undefining: %w", err)
			}
			return ended()
		}},
		{"an index that root wrote in its place", "TPM_RC_VALUE", func() error {
			p := attest.EpochPublic(false)
			p.Attributes.NT = tpm2.TPMNTOrdinary
			if _, err := (tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(*p)}).Execute(r.link); err != nil {
				return fmt.Errorf("defining: %w", err)
			}
			name, err := tpm2.NVName(p)
			if err != nil {
				return err
			}
			if _, err := (tpm2.NVWrite{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: attest.EpochIndex, Name: *name}, Data: tpm2.TPM2BMaxNVBuffer{Buffer: attest.EpochOperand(1)}}).Execute(r.link); err != nil {
				return fmt.Errorf("writing: %w", err)
			}
			p.Attributes.Written = true
			if name, err = tpm2.NVName(p); err != nil {
				return err
			}
			s, err := r.session()
			if err != nil {
				return err
			}
			defer func() { _ = r.undefineEpoch(name.Buffer) }() // the next attack shows if it is still there
			if err := r.pcr(s, old); err != nil {
				return fmt.Errorf("the comparison, which root's index satisfies: %w", err)
			}
			return r.authorize(s, old) // it has another Name, so the policy digest is another
		}},
		{"the counter made again", "TPM_RC_POLICY:", func() error {
			if _, err := (tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(*attest.EpochPublic(false))}).Execute(r.link); err != nil {
				return fmt.Errorf("defining: %w", err)
			}
			name, err := tpm2.NVName(attest.EpochPublic(false))
			if err != nil {
				return err
			}
			if _, err := (tpm2.NVIncrement{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: attest.EpochIndex, Name: *name}}).Execute(r.link); err != nil {
				return fmt.Errorf("incrementing: %w", err)
			}
			return ended()
		}},
	} {
		if err := r.tpmAttack(a.name, a.rc, a.f); err != nil {
			return err
		}
	}
	if err := r.tpmAttack("PCR changed, then the old approved policy", "TPM_RC_VALUE", func() error {
		s, err := r.session()
		if err != nil {
			return err
		}
		if err := r.w.tpm.ExtendPCR(7, []byte("another Secure Boot policy")); err != nil {
			return err
		}
		return r.pcr(s, old)
	}); err != nil {
		return err
	}
	return r.w.attack("a cancel, on the changed host", "TPM", "PCR 7", func() (bool, string, error) {
		return r.w.signsByLog(ctx, cancelOrder())
	})
}
