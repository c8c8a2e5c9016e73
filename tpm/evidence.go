package tpm

import (
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// ReadPCRs returns the values of PCRs, ordered by bank and index.
func (d *Device) ReadPCRs(selection []attest.PCRSelection) (values []attest.PCRValue, err error) {
	err = d.do("reading PCRs", func() (err error) {
		values, err = d.readPCRs(selection)
		return err
	})
	return values, err
}

// readPCRs asks as often as it takes: a TPM gives eight values at a time.
func (d *Device) readPCRs(selection []attest.PCRSelection) ([]attest.PCRValue, error) {
	var out []attest.PCRValue
	for _, s := range selection {
		for part := range slices.Chunk(s.Indexes, 8) {
			l, err := attest.Selection([]attest.PCRSelection{{Bank: s.Bank, Indexes: part}})
			if err != nil {
				return nil, err
			}
			rsp, err := tpm2.PCRRead{PCRSelectionIn: *l}.Execute(d.link)
			if err != nil {
				return nil, err
			}
			if len(rsp.PCRValues.Digests) != len(part) {
				return nil, fmt.Errorf("the TPM has no PCR bank %s, or not all of the PCRs %v in it", s.Bank, part)
			}
			for i, digest := range rsp.PCRValues.Digests {
				out = append(out, attest.PCRValue{Bank: s.Bank, Index: part[i], Digest: digest.Buffer})
			}
		}
	}
	return out, nil
}

// attested converts what the AK signed to the form of messages.
func attested(a tpm2.TPM2BAttest, s tpm2.TPMTSignature) attest.Attested {
	return attest.Attested{Attest: a.Bytes(), Signature: tpm2.Marshal(s)}
}

var akScheme = tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull} // the AK has its own

// Quote has the AK sign the values of PCRs together with qualifying data.
func (d *Device) Quote(selection []attest.PCRSelection, qualifying []byte) (out attest.Attested, err error) {
	l, err := attest.Selection(selection)
	if err != nil {
		return out, err
	}
	err = d.do("quoting PCRs", func() error {
		return d.withAK(func(ak tpm2.NamedHandle, _ []byte) error {
			rsp, err := tpm2.Quote{SignHandle: empty(ak), QualifyingData: tpm2.TPM2BData{Buffer: qualifying}, InScheme: akScheme, PCRSelect: *l}.Execute(d.link)
			if err != nil {
				return err
			}
			out = attested(rsp.Quoted, rsp.Signature)
			return nil
		})
	})
	return out, err
}

// Certify has the AK sign that the key is in this TPM, together with qualifying data.
func (d *Device) Certify(k *Key, qualifying []byte) (out attest.Attested, err error) {
	err = d.do("certifying the key", func() error {
		if err := k.load(); err != nil {
			return err
		}
		return d.withAK(func(ak tpm2.NamedHandle, _ []byte) error {
			rsp, err := tpm2.Certify{ObjectHandle: empty(*k.handle), SignHandle: empty(ak), QualifyingData: tpm2.TPM2BData{Buffer: qualifying}, InScheme: akScheme}.Execute(d.link)
			if err != nil {
				return err
			}
			out = attested(rsp.CertifyInfo, rsp.Signature)
			return nil
		})
	})
	return out, err
}

// ActivateCredential opens a credential that was made for this EK and the AK
// and returns its secret.
func (d *Device) ActivateCredential(ek *EK, c *attest.Credential) (secret []byte, err error) {
	err = d.do("opening the credential", func() error {
		if err := d.makeRoom(0); err != nil {
			return err
		}
		return d.withAK(func(ak tpm2.NamedHandle, _ []byte) error {
			return d.withEK(ek, func(h tpm2.NamedHandle, public *tpm2.TPMTPublic) error {
				auth, done, err := d.ekAuth(public)
				if err != nil {
					return err
				}
				defer done()
				rsp, err := tpm2.ActivateCredential{
					ActivateHandle: empty(ak),
					KeyHandle:      tpm2.AuthHandle{Handle: h.Handle, Name: h.Name, Auth: auth},
					CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.IDObject},
					Secret:         tpm2.TPM2BEncryptedSecret{Buffer: c.EncryptedSecret},
				}.Execute(d.link)
				if err != nil {
					return err
				}
				secret = rsp.CertInfo.Buffer
				return nil
			})
		})
	})
	return secret, err
}

// ekAuth authorizes an endorsement key: by its policy, the authorization of
// the endorsement hierarchy, or in the high range by its empty password.
func (d *Device) ekAuth(public *tpm2.TPMTPublic) (auth tpm2.Session, done func(), err error) {
	if public.ObjectAttributes.UserWithAuth {
		return tpm2.PasswordAuth(nil), func() {}, nil
	}
	d.dropSession() // those that wait for approvers may have the other places
	d.dropFree()
	s, closeSession, err := tpm2.PolicySession(d.link, public.NameAlg, 16)
	if err != nil {
		return nil, nil, err
	}
	done = func() {
		if closeSession() != nil {
			d.link.close() // the next connection flushes it
		}
	}
	if _, err := (tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(d.options.EndorsementAuth)},
		PolicySession: s.Handle(),
		NonceTPM:      s.NonceTPM(),
	}).Execute(d.link); err != nil {
		done()
		return nil, nil, explainHierarchy("using the endorsement key", err)
	}
	return s, done, nil
}
