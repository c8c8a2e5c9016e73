package tpm

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// Where TPMs keep endorsement keys and their certificates (TCG EK Credential
// Profile, section 2.2.1.4; Registry of Reserved TPM 2.0 Handles, section 2.3).
const (
	firstEK    = 0x81010000
	lastEK     = 0x810100ff
	firstChain = 0x01c00100
	lastChain  = 0x01c001ff
)

// ekCertificates are the NV indexes of certificates: RSA-2048, P-256, then the
// high range: RSA-2048, P-256, P-384, P-521, RSA-3072, RSA-4096.
var ekCertificates = []uint32{0x01c00002, 0x01c0000a, 0x01c00012, 0x01c00014, 0x01c00016, 0x01c00018, 0x01c0001c, 0x01c0001e}

// maxNV bounds what is read from an NV index, in bytes: Intel's firmware TPM has
// the certificates of several CAs in one.
const maxNV = 16 << 10

// EK is an endorsement key.
type EK struct {
	Public      []byte   // TPMT_PUBLIC
	Certificate []byte   // as in NV, perhaps padded; empty: the TPM has none for it
	Chain       [][]byte // what NV has of the maker's CAs, by index

	handle   tpm2.TPMHandle // persistent; 0: made from the template
	template []byte
}

// Algorithm names the key's algorithm, such as RSA-2048 or P-384.
func (e *EK) Algorithm() string {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](e.Public)
	if err != nil {
		return "unknown"
	}
	if rsa, err := p.Parameters.RSADetail(); err == nil {
		return fmt.Sprintf("RSA-%d", rsa.KeyBits)
	}
	if ecc, err := p.Parameters.ECCDetail(); err == nil {
		return map[tpm2.TPMECCCurve]string{tpm2.TPMECCNistP256: "P-256", tpm2.TPMECCNistP384: "P-384", tpm2.TPMECCNistP521: "P-521"}[ecc.CurveID]
	}
	return "unknown"
}

// EKs returns the endorsement keys, those with a certificate first.
func (d *Device) EKs() (list []EK, err error) {
	err = d.do("reading endorsement keys", func() (err error) {
		list, err = d.eks()
		return err
	})
	return list, err
}

func (d *Device) eks() ([]EK, error) {
	if err := d.makeRoom(1); err != nil {
		return nil, err
	}
	var keys []EK
	have := func(public []byte) bool {
		for _, k := range keys {
			if bytes.Equal(k.Public, public) {
				return true
			}
		}
		return false
	}
	persistent, err := d.handles(firstEK)
	if err != nil {
		return nil, err
	}
	for _, h := range persistent {
		if h > lastEK {
			continue
		}
		public, err := d.readPublic(h)
		if err != nil {
			return nil, err
		}
		if a := public.ObjectAttributes; a.Restricted && a.Decrypt && !have(tpm2.Marshal(*public)) {
			keys = append(keys, EK{Public: tpm2.Marshal(*public), handle: h})
		}
	}
	for _, template := range []tpm2.TPMTPublic{tpm2.RSAEKTemplate, tpm2.ECCEKTemplate} {
		t := tpm2.Marshal(template)
		err := d.primary(tpm2.TPMRHEndorsement, d.options.EndorsementAuth, t, func(_ tpm2.NamedHandle, public []byte) error {
			if !have(public) {
				keys = append(keys, EK{Public: public, template: t})
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return d.withCertificates(keys)
}

func (d *Device) readPublic(h tpm2.TPMHandle) (*tpm2.TPMTPublic, error) {
	rsp, err := tpm2.ReadPublic{ObjectHandle: h}.Execute(d.link)
	if err != nil {
		return nil, err
	}
	return rsp.OutPublic.Contents()
}

// withCertificates finds each key's certificate by the key in it, and puts the
// keys that have one first.
func (d *Device) withCertificates(keys []EK) ([]EK, error) {
	indexes, err := d.handles(0x01c00000)
	if err != nil {
		return nil, err
	}
	var chain [][]byte
	certificates := make(map[[32]byte][]byte)
	for _, i := range indexes {
		isChain := i >= firstChain && i <= lastChain
		if !isChain && !contains(ekCertificates, uint32(i)) {
			continue
		}
		b, err := d.readNV(i)
		if err != nil {
			return nil, err
		}
		if isChain {
			chain = append(chain, b)
			continue
		}
		if digest, ok := spkiOf(b); ok {
			certificates[digest] = b
		}
	}
	var with, without []EK
	for _, k := range keys {
		digest, err := attest.SPKIDigest(k.Public)
		if err != nil {
			return nil, err
		}
		k.Chain = chain
		if k.Certificate = certificates[digest]; k.Certificate != nil {
			with = append(with, k)
		} else {
			without = append(without, k)
		}
	}
	return append(with, without...), nil
}

func contains(list []uint32, v uint32) bool {
	for _, x := range list {
		if x == v {
			return true
		}
	}
	return false
}

// spkiOf tolerates padding; whether the certificate is right is for the issuer to say.
func spkiOf(nv []byte) (digest [32]byte, ok bool) {
	var raw asn1.RawValue
	if _, err := asn1.Unmarshal(nv, &raw); err != nil {
		return digest, false
	}
	c, err := x509.ParseCertificate(raw.FullBytes)
	if err != nil {
		return digest, false
	}
	return attest.CertificateSPKIDigest(c), true
}

// readNV reads an index that everyone may read.
func (d *Device) readNV(index tpm2.TPMHandle) ([]byte, error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: index}.Execute(d.link)
	if err != nil {
		return nil, err
	}
	public, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	size := int(public.DataSize)
	if size > maxNV {
		return nil, fmt.Errorf("NV index %#x has %d bytes, at most %d are expected", uint32(index), size, maxNV)
	}
	auth := tpm2.AuthHandle{Handle: index, Name: rsp.NVName, Auth: tpm2.PasswordAuth(nil)}
	if !public.Attributes.AuthRead {
		auth = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(d.options.OwnerAuth)}
	}
	var out []byte
	for len(out) < size {
		n := min(size-len(out), 512) // every TPM reads that much at a time
		rsp, err := tpm2.NVRead{AuthHandle: auth, NVIndex: tpm2.NamedHandle{Handle: index, Name: rsp.NVName}, Size: uint16(n), Offset: uint16(len(out))}.Execute(d.link)
		if err != nil {
			return nil, explainHierarchy(fmt.Sprintf("reading NV index %#x", uint32(index)), err)
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, fmt.Errorf("NV index %#x ends after %d of its %d bytes", uint32(index), len(out), size)
		}
		out = append(out, rsp.Data.Buffer...)
	}
	return out, nil
}

// withEK lends an endorsement key.
func (d *Device) withEK(ek *EK, use func(tpm2.NamedHandle, *tpm2.TPMTPublic) error) error {
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](ek.Public)
	if err != nil {
		return err
	}
	if ek.handle == 0 {
		return d.primary(tpm2.TPMRHEndorsement, d.options.EndorsementAuth, ek.template, func(h tpm2.NamedHandle, _ []byte) error { return use(h, public) })
	}
	name, err := tpm2.ObjectName(public)
	if err != nil {
		return err
	}
	return use(tpm2.NamedHandle{Handle: ek.handle, Name: *name}, public)
}
