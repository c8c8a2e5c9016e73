package tpm

import (
	"bytes"
	"errors"
	"fmt"

	keyfile "github.com/foxboron/go-tpm-keyfiles"
	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// MaxSecret bounds what can be sealed, in bytes: every TPM takes as much
// (Part 2, MAX_SYM_DATA).
const MaxSecret = 128

// Seal seals a secret below the storage root key: only this TPM gives it out,
// and only while the host is in a state that the policy key has approved. It
// returns a TSS2 PRIVATE KEY file (PEM).
func (d *Device) Seal(secret []byte, p *Policies) (file []byte, err error) {
	if len(secret) == 0 || len(secret) > MaxSecret {
		return nil, fmt.Errorf("sealing: %d bytes: 1 to %d are allowed", len(secret), MaxSecret)
	}
	policy, err := attest.AuthPolicy(p.PolicyKey, p.Ref)
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	template := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
		// No userWithAuth: no password gives it out. noDA: nobody can lock it.
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
		AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy},
	}
	err = d.do("sealing", func() error {
		if err := d.makeRoom(0); err != nil {
			return err
		}
		d.dropFree()
		return d.withSRK(func(srk tpm2.NamedHandle, public []byte) error {
			hide, err := hidden(srk, public, true)
			if err != nil {
				return err
			}
			rsp, err := tpm2.Create{
				ParentHandle: empty(srk), InPublic: tpm2.New2B(template),
				InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: secret})}},
			}.Execute(d.link, hide)
			if err != nil {
				return err
			}
			k := keyfile.NewTPMKey(keyfile.OIDSealedKey, rsp.OutPublic, rsp.OutPrivate, keyfile.WithParent(tpm2.TPMRHOwner), keyfile.WithUserAuth(nil))
			var buf bytes.Buffer
			if err := keyfile.Encode(&buf, k); err != nil {
				return err
			}
			file = buf.Bytes()
			return nil
		})
	})
	return file, err
}

// Unseal gives a sealed secret out. It fails with a *[PCRError] when the host
// is not in an approved state, and with [ErrForeignKey] in another TPM.
func (d *Device) Unseal(file []byte, p *Policies) (secret []byte, err error) {
	f, err := keyfile.Decode(file)
	if err != nil {
		return nil, fmt.Errorf("unsealing: not a TSS2 PRIVATE KEY in PEM: %w", err)
	}
	if !f.Keytype.Equal(keyfile.OIDSealedKey) || f.Parent != tpm2.TPMRHOwner {
		return nil, errors.New("unsealing: the file holds a key, not a sealed secret of the owner hierarchy")
	}
	err = d.do("unsealing", func() error {
		if err := d.makeRoom(0); err != nil {
			return err
		}
		d.dropFree()
		return d.withSRK(func(srk tpm2.NamedHandle, public []byte) error {
			hide, err := hidden(srk, public, false)
			if err != nil {
				return err
			}
			object, err := tpm2.Load{ParentHandle: empty(srk), InPrivate: f.Privkey, InPublic: f.Pubkey}.Execute(d.link)
			if err != nil {
				return err
			}
			defer d.flush(object.ObjectHandle)
			rsp, err := unchanged(func() (*tpm2.UnsealResponse, error) {
				s, err := (&Key{device: d}).satisfy(newUse(p, nil))
				if err != nil {
					return nil, err
				}
				return tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.ObjectHandle, Name: object.Name, Auth: s}}.Execute(d.link, hide)
			}, d.dropSession)
			if err != nil {
				d.dropSession()
				return err
			}
			secret = rsp.OutData.Buffer
			return nil
		})
	})
	return secret, err
}

// hidden is a session of one command that encrypts its first parameter, in or
// out, so that a listener on the bus does not read it. It is salted to the
// storage root key that was just made.
func hidden(srk tpm2.NamedHandle, public []byte, in bool) (tpm2.Session, error) {
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
	if err != nil {
		return nil, err
	}
	way := tpm2.AESEncryption(128, tpm2.EncryptOut)
	if in {
		way = tpm2.AESEncryption(128, tpm2.EncryptIn)
	}
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Salted(srk.Handle, *area), way), nil
}
