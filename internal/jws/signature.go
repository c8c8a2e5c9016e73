package jws

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
)

// Algorithm returns the JWS algorithm (RFC 7518, section 3.1) for a public key
// and the hash that is signed; hash is 0 for Ed25519, which signs the input itself.
func Algorithm(key crypto.PublicKey) (alg string, hash crypto.Hash, err error) {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return "ES256", crypto.SHA256, nil
		case elliptic.P384():
			return "ES384", crypto.SHA384, nil
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n >= 2048 && n <= 4096 {
			return "PS256", crypto.SHA256, nil
		}
	case ed25519.PublicKey:
		return "EdDSA", 0, nil
	}
	return "", 0, errors.New("a key on P-256 or P-384, RSA of 2048 to 4096 bits, or Ed25519 is expected")
}

// FromDER converts a DER ECDSA signature, as crypto.Signer gives it, to the
// fixed-size r||s of RFC 7518, section 3.4.
func FromDER(key *ecdsa.PublicKey, der []byte) ([]byte, error) {
	var rs struct{ R, S *big.Int }
	rest, err := asn1.Unmarshal(der, &rs)
	size := (key.Curve.Params().BitSize + 7) / 8
	if err != nil || len(rest) != 0 || rs.R.Sign() <= 0 || rs.S.Sign() <= 0 || rs.R.BitLen() > 8*size || rs.S.BitLen() > 8*size {
		return nil, errors.New("not an ECDSA signature of the key's size")
	}
	out := make([]byte, 2*size)
	rs.R.FillBytes(out[:size])
	rs.S.FillBytes(out[size:])
	return out, nil
}

// Sign has the device sign the input and returns the signature in JOSE form.
func Sign(key crypto.Signer, input []byte) ([]byte, error) { return SignWith(key, input, nil) }

// SignWith is Sign with options for a device that needs more than the hash,
// which must be SHA-256 by a key on P-256; nil is none.
func SignWith(key crypto.Signer, input []byte, opts crypto.SignerOpts) ([]byte, error) {
	alg, hash, err := Algorithm(key.Public())
	if err != nil {
		return nil, err
	}
	if opts == nil {
		opts = hash
	} else if alg != "ES256" || opts.HashFunc() != crypto.SHA256 {
		return nil, fmt.Errorf("signing with %s: a key on P-256 is expected", alg)
	}
	switch alg {
	case "EdDSA":
		return key.Sign(nil, input, crypto.Hash(0))
	case "PS256":
		sum := sha256.Sum256(input)
		return key.Sign(nil, sum[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256})
	}
	der, err := crypto.SignMessage(key, nil, input, opts) // a device may keep what it signed
	if err != nil {
		return nil, err
	}
	return FromDER(key.Public().(*ecdsa.PublicKey), der)
}

// ErrSignature: the signature does not verify.
var ErrSignature = errors.New("the signature does not verify")

// Verify checks a signature in JOSE form over input. alg must be the one
// algorithm of the key; it never chooses.
func Verify(key crypto.PublicKey, alg string, input, signature []byte) error {
	want, _, err := Algorithm(key)
	if err != nil {
		return err
	}
	// RS256 is the other form of RSA that receivers know; devices that lack PSS use it.
	if alg != want && !(want == "PS256" && alg == "RS256") {
		return fmt.Errorf("alg is %.16q, the certificate's key has %s", alg, want)
	}
	ok := false
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		size := (k.Curve.Params().BitSize + 7) / 8
		if len(signature) != 2*size {
			return fmt.Errorf("%w: %d bytes, %d are expected", ErrSignature, len(signature), 2*size)
		}
		der, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])})
		if err != nil {
			return ErrSignature
		}
		if alg == "ES384" {
			sum := sha512.Sum384(input)
			ok = ecdsa.VerifyASN1(k, sum[:], der)
		} else {
			sum := sha256.Sum256(input)
			ok = ecdsa.VerifyASN1(k, sum[:], der)
		}
	case *rsa.PublicKey:
		sum := sha256.Sum256(input)
		if alg == "RS256" {
			ok = rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], signature) == nil
		} else {
			ok = rsa.VerifyPSS(k, crypto.SHA256, sum[:], signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, input, signature)
	}
	if !ok {
		return ErrSignature
	}
	return nil
}
