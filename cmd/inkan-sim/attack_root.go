package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
	"inkan/signer/client"
)

// attackRoot is the family root: an agent in approver mode, and whoever has its host.
func attackRoot(ctx context.Context, w *world) error {
	w.withApprover, w.bindAtOnce = true, true
	if err := w.bringUp(ctx); err != nil {
		return err
	}
	if err := w.write("order.json", order(client.NewID())); err != nil {
		return err
	}
	return w.attacksAsRoot(ctx)
}

// attacksAsRoot carries out what root on the agent's host can think of.
func (w *world) attacksAsRoot(ctx context.Context) error {
	w.title("6. Root on the agent's host, with its own code, against the TPM")
	r, err := w.newRoot()
	if err != nil {
		return err
	}
	for _, group := range []func(context.Context) error{r.withoutApprover, r.withAuthorization, r.attackApprover, r.elsewhere} {
		if err := group(ctx); err != nil {
			return err
		}
	}
	w.title("10. The same order through the front door")
	if err := w.frontDoor(ctx); err != nil {
		return err
	}
	w.title("11. The approver's key is rotated: a new approval, and the next epoch; the agent's key stays")
	if err := r.rotate(ctx); err != nil {
		return err
	}
	w.title("13. Root changes the host")
	return r.changed(ctx)
}

// frontDoor has an order signed as the agent.
func (w *world) frontDoor(ctx context.Context) error {
	if _, err := w.run(ctx, "sign", "--socket", w.socket(), "--action", w.path("order.json"), "--new-id"); err != nil {
		return err
	}
	w.say("   signed")
	return nil
}

// tpmAttack is an attack that the TPM must answer with a response code.
func (r *root) tpmAttack(name, rc string, f func() error) error {
	return r.w.attack(name, "TPM", rc, func() (bool, string, error) {
		// swtpm has no resource manager: the signer, which binds its record now and
		// then, flushes what root had loaded. Then root tries again.
		for tries := 0; ; tries++ {
			if err := r.begin(); err != nil {
				return false, "", err
			}
			err := f()
			r.end()
			if tries == 3 || !strings.Contains(code(err), "TPM_RC_REFERENCE_") {
				return err == nil, code(err), nil
			}
		}
	})
}

// withoutApprover: everything that root has by itself.
func (r *root) withoutApprover(ctx context.Context) error {
	if err := r.quiet(); err != nil {
		return err
	}
	digest := sha256.Sum256([]byte("an order of root's own"))
	policy := func(steps ...func(tpm2.Session) error) func() error {
		return func() error {
			s, err := r.session()
			if err != nil {
				return err
			}
			for _, step := range steps {
				if err := step(s); err != nil {
					return err
				}
			}
			return r.sign(r.key, digest, s)
		}
	}
	pcr := func(s tpm2.Session) error { return r.pcr(s, r.approved) }
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ownArea, err := attest.PolicyKeyPublic(&own.PublicKey)
	if err != nil {
		return err
	}
	for _, a := range []struct {
		name, rc string
		f        func() error
	}{
		{"sign with no session at all", "TPM_RC_AUTH_MISSING", func() error { return r.signNoSession(digest) }},
		{"sign with an empty password", "TPM_RC_AUTH_UNAVAILABLE", func() error { return r.sign(r.key, digest, tpm2.PasswordAuth(nil)) }},
		{"sign with an HMAC session", "TPM_RC_AUTH_UNAVAILABLE", func() error { return r.sign(r.key, digest, tpm2.HMAC(tpm2.TPMAlgSHA256, 16)) }},
		{"sign with an empty policy", "TPM_RC_POLICY_FAIL", policy()},
		{"PolicyPCR alone", "TPM_RC_POLICY_FAIL", policy(pcr)},
		{"the approval for local keys", "TPM_RC_POLICY_FAIL", policy(func(s tpm2.Session) error { return r.pcr(s, r.local) }, func(s tpm2.Session) error { return r.authorize(s, r.local) })},
		{"the approval, but no authorization", "TPM_RC_VALUE", policy(pcr, func(s tpm2.Session) error { return r.authorize(s, r.approved) })},
		{"authorization by root's own key", "TPM_RC_VALUE", policy(pcr, func(s tpm2.Session) error {
			nonce, cp := s.NonceTPM().Buffer, attest.SignCommandHash(r.key.Name.Buffer, digest)
			x, err := attest.Authorize(own, nonce, cp, r.policies.Ref)
			if err != nil {
				return err
			}
			return r.signed(s, ownArea, nonce, cp[:], x.Expiration, attest.AuthorizationRef(r.policies.Ref), x.Signature)
		}, func(s tpm2.Session) error { return r.authorize(s, r.approved) })},
	} {
		if err := r.tpmAttack(a.name, a.rc, a.f); err != nil {
			return err
		}
	}
	return nil
}

// signNoSession is TPM2_Sign by hand, with the tag TPM_ST_NO_SESSIONS.
func (r *root) signNoSession(digest [32]byte) error {
	b := []byte{0x80, 0x01, 0, 0, 0, 0, 0, 0, 0x01, 0x5d}
	b = binary.BigEndian.AppendUint32(b, uint32(r.key.Handle))
	b = append(append(b, 0, 32), digest[:]...)
	b = append(b, 0x00, 0x18, 0x00, 0x0b, 0x80, 0x24, 0x40, 0x00, 0x00, 0x07, 0x00, 0x00)
	binary.BigEndian.PutUint32(b[2:], uint32(len(b)))
	rsp, err := r.link.Send(b)
	if err != nil {
		return err
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:])); rc != tpm2.TPMRCSuccess {
		return rc
	}
	return nil
}
