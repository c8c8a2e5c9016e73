package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// withAuthorization: root has a genuine authorization, for an honest order.
func (r *root) withAuthorization(ctx context.Context) error {
	r.w.title("7. Root with a genuine authorization of the approver, for an honest order")
	ref := attest.AuthorizationRef(r.policies.Ref)
	area := r.approved.Approvers[0]
	var recorded struct {
		nonce []byte
		x     *attest.Authorization
	}
	for _, a := range []struct {
		name, rc string
		f        func(statement []byte, digest [32]byte) error
	}{
		{"used for another digest", "TPM_RC_POLICY_FAIL", func(statement []byte, digest [32]byte) error {
			s, err := r.satisfied(statement, digest, area, ref)
			if err != nil {
				return err
			}
			return r.sign(r.key, sha256.Sum256([]byte("an order of root's own")), s)
		}},
		{"used for another key of the same policy", "TPM_RC_POLICY_FAIL", func(statement []byte, digest [32]byte) error {
			s, err := r.satisfied(statement, digest, area, ref)
			if err != nil {
				return err
			}
			r.flush(r.key.Handle)
			other, err := r.create()
			if err != nil {
				return err
			}
			return r.sign(other, digest, s)
		}},
		{"used twice", "TPM_RC_POLICY_FAIL", func(statement []byte, digest [32]byte) error {
			s, err := r.satisfied(statement, digest, area, ref)
			if err != nil {
				return err
			}
			if err := r.sign(r.key, digest, s); err != nil {
				return fmt.Errorf("the honest order was not signed: %w", err)
			}
			return r.sign(r.key, digest, s)
		}},
		{"in another session, with its old nonce", "TPM_RC_NONCE", func(statement []byte, digest [32]byte) error {
			first, err := r.session()
			if err != nil {
				return err
			}
			recorded.nonce = bytes.Clone(first.NonceTPM().Buffer)
			if recorded.x, err = r.ask(r.request(statement, recorded.nonce)); err != nil {
				return err
			}
			r.flush(first.Handle())
			s, err := r.session()
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, recorded.nonce, cp[:], recorded.x.Expiration, ref, recorded.x.Signature)
		}},
		{"in another session, with that one's nonce", "TPM_RC_SIGNATURE", func(_ []byte, digest [32]byte) error {
			s, err := r.session()
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, s.NonceTPM().Buffer, cp[:], recorded.x.Expiration, ref, recorded.x.Signature)
		}},
		{"with a later expiration", "TPM_RC_SIGNATURE", func(statement []byte, digest [32]byte) error {
			s, x, err := r.asked(statement)
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, s.NonceTPM().Buffer, cp[:], 3600, ref, x.Signature)
		}},
		{"with another policyRef", "TPM_RC_SIGNATURE", func(statement []byte, digest [32]byte) error {
			s, x, err := r.asked(statement)
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, s.NonceTPM().Buffer, cp[:], x.Expiration, nil, x.Signature)
		}},
		{"with the command left open", "TPM_RC_SIGNATURE", func(statement []byte, _ [32]byte) error {
			s, x, err := r.asked(statement)
			if err != nil {
				return err
			}
			return r.signed(s, area, s.NonceTPM().Buffer, nil, x.Expiration, ref, x.Signature)
		}},
		{"with the session left open", "TPM_RC_SIGNATURE", func(statement []byte, digest [32]byte) error {
			s, x, err := r.asked(statement)
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, nil, cp[:], x.Expiration, ref, x.Signature)
		}},
		{"a recorded conversation, replayed", "TPM_RC_NONCE", func(statement []byte, digest [32]byte) error {
			x, err := r.ask(r.request(statement, recorded.nonce)) // it is the same action: the approver answers
			if err != nil {
				return err
			}
			s, err := r.session()
			if err != nil {
				return err
			}
			cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
			return r.signed(s, area, recorded.nonce, cp[:], x.Expiration, ref, x.Signature)
		}},
		{"after it expired (root's own key, 1 s)", "TPM_RC_EXPIRED", func([]byte, [32]byte) error { return r.expired(ref) }},
	} {
		statement, digest, err := r.honest(ctx)
		if err != nil {
			return err
		}
		if err := r.tpmAttack(a.name, a.rc, func() error { return a.f(statement, digest) }); err != nil {
			return err
		}
	}
	return nil
}

// asked begins a session and gets the approver's authorization for it.
func (r *root) asked(statement []byte) (tpm2.Session, *attest.Authorization, error) {
	s, err := r.session()
	if err != nil {
		return nil, nil, err
	}
	x, err := r.ask(r.request(statement, s.NonceTPM().Buffer))
	return s, x, err
}

// satisfied is a session whose whole policy is satisfied, for an honest order.
func (r *root) satisfied(statement []byte, digest [32]byte, area, ref []byte) (tpm2.Session, error) {
	cp := attest.SignCommandHash(r.key.Name.Buffer, digest)
	s, x, err := r.asked(statement)
	if err != nil {
		return nil, err
	}
	for _, step := range []func() error{
		func() error { return r.pcr(s, r.approved) },
		func() error { return r.signed(s, area, s.NonceTPM().Buffer, cp[:], x.Expiration, ref, x.Signature) },
		func() error { return r.authorize(s, r.approved) },
	} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("the honest order's policy: %w", err)
		}
	}
	return s, nil
}

// create makes another key in approver mode.
func (r *root) create() (*tpm2.NamedHandle, error) {
	auth, err := attest.EpochKeyPolicy(attest.ModeApprover, r.policies.PolicyKey, r.policies.Ref)
	if err != nil {
		return nil, err
	}
	t, err := tpm2.Unmarshal[tpm2.TPMTPublic](attest.KeyTemplate(auth))
	if err != nil {
		return nil, err
	}
	k, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(*t)}.Execute(r.link)
	if err != nil {
		return nil, err
	}
	r.keep(k.ObjectHandle)
	return &tpm2.NamedHandle{Handle: k.ObjectHandle, Name: k.Name}, nil
}

// expired shows that the TPM counts: an authorization of one second, by a key
// of root's own, is tried after it.
func (r *root) expired(ref []byte) error {
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	area, err := attest.PolicyKeyPublic(&own.PublicKey)
	if err != nil {
		return err
	}
	s, err := r.session()
	if err != nil {
		return err
	}
	nonce, cp := s.NonceTPM().Buffer, attest.SignCommandHash(r.key.Name.Buffer, sha256.Sum256(nil))
	hash := sha256.Sum256(bytes.Join([][]byte{nonce, {0, 0, 0, 1}, cp[:], ref}, nil))
	der, err := own.Sign(rand.Reader, hash[:], crypto.SHA256)
	if err != nil {
		return err
	}
	var rs struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &rs); err != nil {
		return err
	}
	sig := tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256,
		SignatureR: tpm2.TPM2BECCParameter{Buffer: rs.R.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: rs.S.Bytes()}})})
	time.Sleep(1500 * time.Millisecond)
	return r.signed(s, area, nonce, cp[:], 1, ref, sig)
}
