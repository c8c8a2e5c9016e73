package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Schemes of signatures, as the protocol names them.
const (
	schemeECDSA = "ecdsa"
	schemePKCS1 = "rsa-pkcs1v15"
	schemePSS   = "rsa-pss"
	schemeEdDSA = "eddsa"
)

// Key is a key in a token: a crypto.Signer that is safe for concurrent use.
type Key struct {
	token *Token
	attrs Attributes
	pub   crypto.PublicKey

	mu      sync.Mutex
	checked uint64 // the generation in which the key was last found and compared
}

// keyOf makes the Key of an answer that has one.
func (t *Token) keyOf(r *response) (*Key, error) {
	if len(r.Keys) != 1 {
		return nil, errors.New("the worker returned no key")
	}
	k := &Key{token: t, attrs: r.Keys[0]}
	if err := k.attrs.Check(); err != nil {
		return nil, fmt.Errorf("key %x: %w", k.attrs.ID, err)
	}
	var err error
	if k.pub, err = k.attrs.publicKey(); err != nil {
		return nil, fmt.Errorf("key %x: %w", k.attrs.ID, err)
	}
	// A private key need not belong to the public one of the same CKA_ID.
	digest, opts := make([]byte, 32), crypto.SignerOpts(crypto.SHA256)
	if p, ok := k.pub.(*ecdsa.PublicKey); ok && p.Curve.Params().BitSize == 384 {
		digest, opts = make([]byte, 48), crypto.SHA384
	}
	if _, ok := k.pub.(ed25519.PublicKey); ok {
		opts = crypto.Hash(0)
	}
	_, _ = rand.Read(digest) // never fails; the signature is thrown away
	if _, err := k.Sign(nil, digest, opts); err != nil {
		return nil, fmt.Errorf("key %x: test signature: %w", k.attrs.ID, err)
	}
	return k, nil
}

// Public returns the public key: *ecdsa.PublicKey, *rsa.PublicKey or ed25519.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.pub }

// Attributes returns what the token said of the key when it was opened.
func (k *Key) Attributes() Attributes { return k.attrs }

// URI names the key and its token.
func (k *Key) URI() string {
	u := *k.token.uri
	u.ID, u.Object = k.attrs.ID, ""
	return u.String()
}

// Sign signs a digest; with an Ed25519 key the message itself. The hash must
// be the curve's own: SHA-256 on P-256, SHA-384 on P-384. RSA takes SHA-256,
// SHA-384 and SHA-512, by PKCS #1 v1.5 or, with *rsa.PSSOptions, by PSS with a
// salt as long as the digest. The first argument is not used.
//
// The signature was verified. An error leaves open whether the token made one;
// to ask again for the same digest does no harm.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if k == nil || opts == nil {
		return nil, errors.New("signing: no key or no options")
	}
	q, verify, err := k.plan(digest, opts)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	begin := time.Now()
	r, err := k.token.do(*q, k.ensure, func(r *response) error {
		if !verify(r.Signature) {
			return ErrWrongSignature
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("signing with key %x: %w", k.attrs.ID, err)
	}
	k.token.released(time.Since(begin))
	return r.Signature, nil
}

// VerifiesSignatures says that Sign returns nothing that was not verified with
// the key that Public returns, so its user need not verify again.
func (k *Key) VerifiesSignatures() {}

// plan checks what is to be signed and says how it is asked for and verified.
func (k *Key) plan(digest []byte, opts crypto.SignerOpts) (*request, func([]byte) bool, error) {
	q := &request{Op: opSign, Key: k.attrs.ID, Input: digest}
	hash := opts.HashFunc()
	if pub, ok := k.pub.(ed25519.PublicKey); ok {
		if hash != 0 {
			return nil, nil, errors.New("Ed25519 signs the message itself: no hash must be named")
		}
		if len(digest) > maxFrame/2 {
			return nil, nil, fmt.Errorf("message of %d bytes, at most %d are allowed", len(digest), maxFrame/2)
		}
		q.Scheme = schemeEdDSA
		return q, func(sig []byte) bool { return ed25519.Verify(pub, digest, sig) }, nil
	}
	prefix, known := digestInfo[hash]
	if !known {
		return nil, nil, errors.New("hash: SHA-256, SHA-384 or SHA-512 is expected")
	}
	if len(digest) != hash.Size() {
		return nil, nil, fmt.Errorf("digest of %d bytes: %v has %d", len(digest), hash, hash.Size())
	}
	switch pub := k.pub.(type) {
	case *ecdsa.PublicKey:
		if hash.Size()*8 != pub.Curve.Params().BitSize {
			return nil, nil, fmt.Errorf("a key on %s signs digests of %d bits, %v has %d", pub.Curve.Params().Name, pub.Curve.Params().BitSize, hash, hash.Size()*8)
		}
		q.Scheme = schemeECDSA
		return q, func(sig []byte) bool { return ecdsa.VerifyASN1(pub, digest, sig) }, nil
	case *rsa.PublicKey:
		if pss, ok := opts.(*rsa.PSSOptions); ok {
			if s := pss.SaltLength; s != rsa.PSSSaltLengthAuto && s != rsa.PSSSaltLengthEqualsHash && s != hash.Size() {
				return nil, nil, fmt.Errorf("PSS salt of %d bytes: %d, as long as the digest, is expected", s, hash.Size())
			}
			q.Scheme, q.Hash = schemePSS, hash.String()
			return q, func(sig []byte) bool {
				return rsa.VerifyPSS(pub, hash, digest, sig, &rsa.PSSOptions{SaltLength: hash.Size()}) == nil
			}, nil
		}
		q.Scheme, q.Input = schemePKCS1, append([]byte(prefix), digest...)
		return q, func(sig []byte) bool { return rsa.VerifyPKCS1v15(pub, hash, digest, sig) == nil }, nil
	}
	return nil, nil, errors.New("key of a kind that is not supported")
}

// digestInfo is what stands before a digest in PKCS #1 v1.5 (RFC 8017, section 9.2, note 1).
var digestInfo = map[crypto.Hash]string{
	crypto.SHA256: "\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20",
	crypto.SHA384: "\x30\x41\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x02\x05\x00\x04\x30",
	crypto.SHA512: "\x30\x51\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x03\x05\x00\x04\x40",
}

// The hashes are linked in, so that crypto.Hash knows them.
var _, _ = sha256.New, sha512.New

// ensure finds the key in a worker that has not looked for it yet: its public
// key must be the same, its attributes still good. Handles of one worker mean
// nothing in the next.
func (k *Key) ensure(ctx context.Context, c *child) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.checked == c.generation {
		return nil
	}
	r, err := c.call(ctx, request{Op: opFind, Key: k.attrs.ID})
	if err != nil {
		return err
	}
	if len(r.Keys) != 1 || !bytes.Equal(r.Keys[0].SPKI, k.attrs.SPKI) {
		return ErrWrongKey
	}
	if err := r.Keys[0].Check(); err != nil {
		return err
	}
	k.checked = c.generation
	return nil
}
