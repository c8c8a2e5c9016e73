package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"sync/atomic"

	keyfile "github.com/foxboron/go-tpm-keyfiles"
	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// Policies is what a key with an authPolicy needs to be used: the policy key
// that may approve, and what it has approved.
type Policies struct {
	PolicyKey []byte // TPMT_PUBLIC
	Ref       []byte // policyRef
	Approved  []attest.ApprovedPolicy
}

// Key is a P-256 signing key in the TPM: a crypto.Signer, safe for concurrent use.
type Key struct {
	device *Device
	file   *keyfile.TPMKey
	area   []byte // TPMT_PUBLIC
	name   []byte // of the object
	public *ecdsa.PublicKey
	use    atomic.Pointer[use]

	resident          // owned by device.mu
	last     string   // name of the policy that was right last time
	consent  *consent // of a key in reserve mode; nil: there was none
}

// resident is something that may be loaded in the TPM.
type resident struct {
	handle   *tpm2.NamedHandle // nil: it is not
	external bool              // a public key alone, which is loaded with one command
}

// use is what a key works under, and what is derived from that once.
type use struct {
	policies   *Policies               // nil: the key has no authPolicy
	mode       string                  // the key's
	local      []attest.ApprovedPolicy // those for keys in local mode
	candidates []candidate             // those for keys of the other modes, with their approvers
}

// CreateKey makes a key from a TPMT_PUBLIC below the storage root key and
// returns it as a TSS2 PRIVATE KEY file (PEM) and its TPMT_PUBLIC. The file is
// of no use with another TPM.
func (d *Device) CreateKey(template []byte) (file, public []byte, err error) {
	t, err := tpm2.Unmarshal[tpm2.TPMTPublic](template)
	if err != nil {
		return nil, nil, fmt.Errorf("creating a key: template: %w", err)
	}
	err = d.do("creating a key", func() error {
		if err := d.makeRoom(maxLoaded - 1); err != nil {
			return err
		}
		return d.withSRK(func(srk tpm2.NamedHandle, _ []byte) error {
			rsp, err := tpm2.Create{ParentHandle: empty(srk), InPublic: tpm2.New2B(*t)}.Execute(d.link)
			if err != nil {
				return err
			}
			made, err := rsp.OutPublic.Contents()
			if err != nil {
				return err
			}
			public = tpm2.Marshal(*made)
			k := keyfile.NewTPMKey(keyfile.OIDLoadableKey, rsp.OutPublic, rsp.OutPrivate, keyfile.WithParent(tpm2.TPMRHOwner), keyfile.WithUserAuth(nil))
			var buf bytes.Buffer
			if err := keyfile.Encode(&buf, k); err != nil {
				return err
			}
			file = buf.Bytes()
			return nil
		})
	})
	return file, public, err
}

// SigningTemplate is the TPMT_PUBLIC of a P-256 key without a policy, for a CA
// or policy key on its own host: whoever may use the TPM may use it.
func SigningTemplate() []byte {
	t, err := tpm2.Unmarshal[tpm2.TPMTPublic](attest.KeyTemplate(nil))
	if err != nil {
		panic(err) // a constant
	}
	t.ObjectAttributes.UserWithAuth = true
	return tpm2.Marshal(*t)
}

// LoadKey loads a key that CreateKey made. policies is nil for a key without
// an authPolicy. It fails with ErrForeignKey for a key of another TPM.
func (d *Device) LoadKey(file []byte, policies *Policies) (*Key, error) {
	f, err := keyfile.Decode(file)
	if err != nil {
		return nil, fmt.Errorf("key file: not a TSS2 PRIVATE KEY in PEM: %w", err)
	}
	area, err := f.Pubkey.Contents()
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	k := &Key{device: d, file: f, area: tpm2.Marshal(*area)}
	pub, err := attest.PublicKey(k.area)
	if err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	var ok bool
	if k.public, ok = pub.(*ecdsa.PublicKey); !ok {
		return nil, errors.New("key file: a P-256 key is expected")
	}
	if f.Parent != tpm2.TPMRHOwner {
		return nil, fmt.Errorf("key file: its parent is %#x, the owner hierarchy (%#x) is expected", uint32(f.Parent), uint32(tpm2.TPMRHOwner))
	}
	if k.name, err = attest.KeyName(k.area); err != nil {
		return nil, fmt.Errorf("key file: %w", err)
	}
	k.SetPolicies(policies)
	return k, d.do("loading the key", func() error { return k.load() })
}

// SetPolicies changes what the key may be used under, from the next signature on.
func (k *Key) SetPolicies(p *Policies) { k.use.Store(newUse(p, k.area)) }

// newUse sorts what the policy key approved by the kinds of keys. The key's own
// kind is in its authPolicy.
func newUse(p *Policies, area []byte) *use {
	u := &use{policies: p, mode: attest.ModeLocal}
	if p == nil {
		return u
	}
	var epochs bool
	for _, with := range []bool{false, true} {
		policy := attest.KeyPolicy
		if with {
			policy = attest.EpochKeyPolicy
		}
		for _, mode := range attest.Modes {
			if auth, err := policy(mode, p.PolicyKey, p.Ref); err == nil && attest.HasTemplate(area, attest.KeyTemplate(auth)) {
				u.mode, epochs = mode, with
			}
		}
	}
	u.local = attest.UsableWith(p.Approved, attest.ModeLocal, epochs, 0)
	if u.mode == attest.ModeLocal {
		return u
	}
	for _, a := range attest.UsableWith(p.Approved, u.mode, epochs, 0) {
		c := candidate{policy: &a}
		var err error
		if c.ids, err = a.ApproverIDs(); err != nil {
			continue // a malformed one serves nobody
		}
		for _, area := range a.Approvers {
			k, err := attest.PublicKey(area)
			if err != nil {
				break // ApproverIDs has read it
			}
			c.keys = append(c.keys, k)
		}
		u.candidates = append(u.candidates, c)
	}
	return u
}

// Mode is the key's mode, one of attest.Modes; it was fixed at its creation.
func (k *Key) Mode() string { return k.use.Load().mode }

// Public returns the *ecdsa.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.public }

// PublicArea returns the key's TPMT_PUBLIC.
func (k *Key) PublicArea() []byte { return k.area }

// load puts the key into the TPM if it is not there, in the place of the one
// unused for longest.
func (k *Key) load() error {
	d := k.device
	if d.touch(&k.resident) {
		return nil
	}
	if err := d.makeRoom(maxLoaded - 1); err != nil {
		return err
	}
	return d.withSRK(func(srk tpm2.NamedHandle, _ []byte) error {
		rsp, err := tpm2.Load{ParentHandle: empty(srk), InPrivate: k.file.Privkey, InPublic: k.file.Pubkey}.Execute(d.link)
		if err != nil {
			return err
		}
		k.handle = &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}
		d.loaded = append(d.loaded, &k.resident)
		return nil
	})
}

// touch says whether something is loaded, and then that it was used just now.
func (d *Device) touch(r *resident) bool {
	i := slices.Index(d.loaded, r)
	if i >= 0 {
		d.loaded = append(slices.Delete(d.loaded, i, i+1), r)
	}
	return i >= 0
}

// makeRoom unloads until at most n are loaded: public keys first, since they
// are soon loaded again, then what was unused for longest.
func (d *Device) makeRoom(n int) error {
	for len(d.loaded) > n {
		i := max(slices.IndexFunc(d.loaded, func(r *resident) bool { return r.external }), 0)
		r := d.loaded[i]
		d.loaded = slices.Delete(d.loaded, i, i+1)
		h := r.handle.Handle
		r.handle = nil
		if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(d.link); err != nil {
			return err
		}
	}
	return nil
}

// SignMessage signs a message's SHA-256, as Sign does, and a journal of
// signatures is told the message (crypto.MessageSigner).
func (k *Key) SignMessage(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 {
		return nil, errors.New("signing: the key signs SHA-256 digests only")
	}
	digest := sha256.Sum256(message)
	return k.signDigest(digest[:], message, opts)
}

// Sign signs a SHA-256 digest and returns the signature in ASN.1 DER. It
// fails with a *PCRError when the host is not in an approved state, with an
// *EpochError when the approvals of its state have ended. For a key
// in approver mode opts must be an [Authorizer]; one in reserve mode fails with
// [ErrNoConsent] when no consent is in force.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.signDigest(digest, nil, opts)
}

func (k *Key) signDigest(digest, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 {
		return nil, errors.New("signing: the key signs SHA-256 digests only")
	}
	if len(digest) != crypto.SHA256.Size() {
		return nil, fmt.Errorf("signing: %w: %d bytes, %d are expected", ErrDigestSize, len(digest), crypto.SHA256.Size())
	}
	var sig *tpm2.TPMSSignatureECC
	var err error
	switch k.Mode() {
	case attest.ModeApprover:
		a, ok := opts.(Authorizer)
		if !ok {
			return nil, fmt.Errorf("signing: the key is in approver mode: %w", ErrNotAuthorized)
		}
		sig, err = k.signApproved(digest, message, a)
	case attest.ModeReserve:
		err = k.device.do("signing", func() (err error) {
			sig, err = k.signReserved(digest, message)
			return err
		})
	default:
		err = k.device.do("signing", func() (err error) {
			sig, err = k.sign(digest, message)
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(sig.SignatureR.Buffer), new(big.Int).SetBytes(sig.SignatureS.Buffer),
	})
}

func (k *Key) sign(digest, message []byte) (*tpm2.TPMSSignatureECC, error) {
	if err := k.load(); err != nil {
		return nil, err
	}
	u := k.use.Load()
	if u.policies == nil {
		return k.command(digest, message, tpm2.PasswordAuth(nil))
	}
	return unchanged(func() (*tpm2.TPMSSignatureECC, error) {
		s, err := k.satisfy(u)
		if err != nil {
			return nil, err
		}
		return k.command(digest, message, s)
	}, k.device.dropSession)
}

// maxChanges bounds how often a policy is begun anew since a PCR was extended.
const maxChanges = 8

// unchanged repeats a use of a policy session in which some PCR was extended
// between the policy's check of the PCRs and the use. It need not be one of the policy's: where the
// kernel measures what is run and read (IMA), PCR 10 is extended all the time.
func unchanged[T any](use func() (T, error), drop func()) (x T, err error) {
	for range maxChanges {
		if x, err = use(); !errors.Is(err, tpm2.TPMRCPCRChanged) {
			return x, err
		}
		drop() // its policy was begun
	}
	return x, answered{err}
}

// command is TPM2_Sign, the one that attest.SignCommandHash is the hash of.
func (k *Key) command(digest, message []byte, auth tpm2.Session) (*tpm2.TPMSSignatureECC, error) {
	sig, err := k.journaled(digest, message, func() (*tpm2.TPMTSignature, error) {
		rsp, err := tpm2.Sign{
			KeyHandle:  tpm2.AuthHandle{Handle: k.handle.Handle, Name: k.handle.Name, Auth: auth},
			Digest:     tpm2.TPM2BDigest{Buffer: digest},
			InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(k.device.link)
		if err != nil {
			return nil, err
		}
		return &rsp.Signature, nil
	})
	if err != nil {
		return nil, err
	}
	return sig.Signature.ECDSA()
}
