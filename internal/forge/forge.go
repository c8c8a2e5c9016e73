// Package forge is a TPM in software whose every field can be forged, for
// negative tests and for measuring an issuer: [New] makes one, [Device.Evidence]
// answers a challenge. Its keys are in memory, so it proves nothing; only the
// pin of its endorsement key makes an issuer believe it.
package forge

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// Device is a forged TPM. Its fields may be changed between calls.
type Device struct {
	EK     *rsa.PrivateKey
	AK     *ecdsa.PrivateKey
	Hello  attest.Hello // as sent; Agent is empty
	PCRs   map[int][]byte
	Clock  tpm2.TPMSClockInfo
	FW     uint64
	Signer []byte // Qualified Name of the AK
	SRK    []byte // Qualified Name of the SRK
	Keys   map[string]*ecdsa.PrivateKey
	Epoch  uint64 // value of the epoch counter
	Audit  uint64 // the audit counter; 0: it gives no testimony

	// Change, if not nil, changes a structure before it is signed; kind is
	// "quote", "epoch", "audit" or a key's purpose.
	Change func(kind string, s *tpm2.TPMSAttest)
	// ChangeKey, if not nil, changes a key's public area before it is certified.
	ChangeKey func(purpose string, p *tpm2.TPMTPublic)
	// ChangeCSR, if not nil, changes a certificate request before its key is certified for it.
	ChangeCSR func(csr []byte) []byte
}

// New makes a device with the PCRs 0, 2, 4 and 7.
func New() (*Device, error) {
	d := &Device{PCRs: make(map[int][]byte), Keys: make(map[string]*ecdsa.PrivateKey), FW: 2, Clock: tpm2.TPMSClockInfo{Clock: 1000, ResetCount: 5, RestartCount: 1, Safe: true}}
	for _, i := range []int{0, 2, 4, 7} {
		sum := sha256.Sum256([]byte{byte(i)})
		d.PCRs[i] = sum[:]
	}
	var err error
	if d.EK, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		return nil, err
	}
	ek := tpm2.RSAEKTemplate
	ek.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: d.EK.N.Bytes()})
	d.Hello.EKPublic = tpm2.Marshal(ek)
	if d.AK, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	if d.Hello.AKPublic, err = Public(attest.AKTemplate(), &d.AK.PublicKey); err != nil {
		return nil, err
	}
	srk, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if d.Hello.SRKPublic, err = Public(attest.SRKTemplate(), &srk.PublicKey); err != nil {
		return nil, err
	}
	if d.Signer, err = qualified([]byte{0x40, 0, 0, 0x0b}, d.Hello.AKPublic); err != nil {
		return nil, err
	}
	d.SRK, err = qualified([]byte{0x40, 0, 0, 0x01}, d.Hello.SRKPublic)
	return d, err
}

// Public is a template with the key in it.
func Public(template []byte, key *ecdsa.PublicKey) ([]byte, error) {
	t, err := tpm2.Unmarshal[tpm2.TPMTPublic](template)
	if err != nil {
		return nil, err
	}
	if err := setPoint(t, key); err != nil {
		return nil, err
	}
	return tpm2.Marshal(*t), nil
}

func setPoint(t *tpm2.TPMTPublic, key *ecdsa.PublicKey) error {
	point, err := key.Bytes() // 04 | X | Y
	if err != nil {
		return err
	}
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	return nil
}

func qualified(parent, public []byte) ([]byte, error) {
	name, err := attest.KeyName(public)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(append(bytes.Clone(parent), name...))
	return append([]byte{0, 0x0b}, sum[:]...), nil
}

// Values returns the PCR values of a selection.
func (d *Device) Values(sel []attest.PCRSelection) []attest.PCRValue {
	var out []attest.PCRValue
	for _, s := range sel {
		for _, i := range s.Indexes {
			out = append(out, attest.PCRValue{Bank: s.Bank, Index: i, Digest: d.PCRs[i]})
		}
	}
	return out
}

// Open opens a credential (TPM2_ActivateCredential, Part 1, section 24).
func (d *Device) Open(c *attest.Credential) ([]byte, error) {
	seed, err := rsa.DecryptOAEP(sha256.New(), nil, d.EK, c.EncryptedSecret, []byte("IDENTITY\x00"))
	if err != nil {
		return nil, err
	}
	name, err := attest.KeyName(d.Hello.AKPublic)
	if err != nil {
		return nil, err
	}
	if len(c.IDObject) < 34 {
		return nil, errors.New("credential is too short")
	}
	block, err := aes.NewCipher(tpm2.KDFa(sha256Hash, seed, "STORAGE", name, nil, 128))
	if err != nil {
		return nil, err
	}
	plain := make([]byte, len(c.IDObject)-34)
	//lint:ignore SA1019 it is the mode that the TPM protects credentials with
	cipher.NewCFBDecrypter(block, make([]byte, 16)).XORKeyStream(plain, c.IDObject[34:])
	return plain[2:], nil
}

// Sign signs a structure as the AK.
func (d *Device) Sign(structure []byte) (attest.Attested, error) {
	sum := sha256.Sum256(structure)
	der, err := d.AK.Sign(rand.Reader, sum[:], sha256Hash)
	if err != nil {
		return attest.Attested{}, err
	}
	var rs struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &rs); err != nil {
		return attest.Attested{}, err
	}
	return attest.Attested{Attest: structure, Signature: tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: rs.R.FillBytes(make([]byte, 32))}, SignatureS: tpm2.TPM2BECCParameter{Buffer: rs.S.FillBytes(make([]byte, 32))}}),
	})}, nil
}

func (d *Device) attest(kind string, s *tpm2.TPMSAttest) (attest.Attested, error) {
	s.Magic, s.ClockInfo, s.FirmwareVersion, s.QualifiedSigner = tpm2.TPMGeneratedValue, d.Clock, d.FW, tpm2.TPM2BName{Buffer: d.Signer}
	if d.Change != nil {
		d.Change(kind, s)
	}
	return d.Sign(tpm2.Marshal(*s))
}

// Evidence answers a challenge over the channel with this binding.
func (d *Device) Evidence(c *attest.Challenge, binding []byte) (*attest.Evidence, error) {
	ev := &attest.Evidence{Session: c.Session, PCRs: d.Values(c.PCRs)}
	if c.Credential != nil {
		secret, err := d.Open(c.Credential)
		if err != nil {
			return nil, err
		}
		ev.Secret = secret
	}
	for _, want := range c.Keys {
		k, err := d.key(c, want, binding)
		if err != nil {
			return nil, err
		}
		ev.Keys = append(ev.Keys, *k)
	}
	q, err := attest.QuoteQualifyingData(c.Session, c.Nonce, binding, ev.Keys)
	if err != nil {
		return nil, err
	}
	sel, err := attest.Selection(c.PCRs)
	if err != nil {
		return nil, err
	}
	ev.Quote, err = d.attest("quote", &tpm2.TPMSAttest{Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: q[:]},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{PCRSelect: *sel, PCRDigest: tpm2.TPM2BDigest{Buffer: attest.PCRDigest(ev.PCRs)}})})
	if err == nil && d.Audit > 0 {
		err = d.testify(c, binding, ev)
	}
	if err != nil || c.Epoch == nil {
		return ev, err
	}
	q = attest.EpochQualifyingData(c.Session, c.Nonce, binding)
	epoch, err := d.attest("epoch", &tpm2.TPMSAttest{Type: tpm2.TPMSTAttestNV, ExtraData: tpm2.TPM2BData{Buffer: q[:]},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestNV, &tpm2.TPMSNVCertifyInfo{IndexName: tpm2.TPM2BName{Buffer: attest.EpochName()}, NVContents: tpm2.TPM2BData{Buffer: attest.EpochOperand(d.Epoch)}})})
	ev.Epoch = &epoch
	return ev, err
}

// testify says that TPM2_Sign is audited, and that nothing was signed.
func (d *Device) testify(c *attest.Challenge, binding []byte, ev *attest.Evidence) error {
	commands := sha256.Sum256([]byte{0, 0, 1, 0x40, 0, 0, 1, 0x5d})
	q := attest.TestimonyQualifyingData(c.Session, c.Nonce, binding)
	t, err := d.attest("audit", &tpm2.TPMSAttest{Type: tpm2.TPMSTAttestCommandAudit, ExtraData: tpm2.TPM2BData{Buffer: q[:]},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestCommandAudit, &tpm2.TPMSCommandAuditInfo{AuditCounter: d.Audit, DigestAlg: tpm2.TPMAlgSHA256, CommandDigest: tpm2.TPM2BDigest{Buffer: commands[:]}})})
	ev.Audit = &t
	return err
}

func (d *Device) key(c *attest.Challenge, want attest.KeyRequest, binding []byte) (*attest.KeyEvidence, error) {
	key := d.Keys[want.Purpose]
	if key == nil {
		var err error
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, err
		}
		d.Keys[want.Purpose] = key
	}
	if want.Protection == attest.ProtectionHSM {
		return d.hsmKey(want, key)
	}
	t, err := tpm2.Unmarshal[tpm2.TPMTPublic](want.Template)
	if err != nil {
		return nil, err
	}
	if err := setPoint(t, &key.PublicKey); err != nil {
		return nil, err
	}
	if d.ChangeKey != nil {
		d.ChangeKey(want.Purpose, t)
	}
	public := tpm2.Marshal(*t)
	var csr []byte
	if want.Mode == "" {
		if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "forged"}}, key); err != nil {
			return nil, err
		}
	}
	if d.ChangeCSR != nil {
		csr = d.ChangeCSR(csr)
	}
	name, err := attest.KeyName(public)
	if err != nil {
		return nil, err
	}
	qn, err := qualified(d.SRK, public)
	if err != nil {
		return nil, err
	}
	q := attest.KeyQualifyingData(c.Session, c.Nonce, binding, csr)
	certify, err := d.attest(want.Purpose, &tpm2.TPMSAttest{Type: tpm2.TPMSTAttestCertify, ExtraData: tpm2.TPM2BData{Buffer: q[:]},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: tpm2.TPM2BName{Buffer: name}, QualifiedName: tpm2.TPM2BName{Buffer: qn}})})
	return &attest.KeyEvidence{Purpose: want.Purpose, Public: public, CSR: csr, Certify: &certify}, err
}

func (d *Device) hsmKey(want attest.KeyRequest, key *ecdsa.PrivateKey) (*attest.KeyEvidence, error) {
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "forged"}}, key)
	if err == nil && d.ChangeCSR != nil {
		csr = d.ChangeCSR(csr)
	}
	return &attest.KeyEvidence{Purpose: want.Purpose, SPKI: spki, CSR: csr}, err
}

const sha256Hash = crypto.SHA256
