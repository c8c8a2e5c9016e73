// Package keyuri opens a signing key that a URI names: see [Open].
//
//	file:/etc/inkan/ca.key                       PKCS#8 in PEM, readable by its owner alone
//	tpm:/dev/tpmrm0?key=/etc/inkan/ca.tss2.pem   TSS2 PRIVATE KEY, made by inkan tpm keygen
//	pkcs11:token=T;id=%01?module-path=/m.so&pin-source=file:/pin   RFC 7512, made by inkan hsm keygen
package keyuri

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"inkan/hsm"
	"inkan/tpm"
)

// nothing is the closer of keys that need none.
type nothing struct{}

func (nothing) Close() error { return nil }

// Open opens the key that uri names. Close the closer when done.
func Open(uri string) (crypto.Signer, io.Closer, error) { return OpenSealed(uri, nil) }

// Absolute returns the URI with the paths of files in it made absolute, for a file
// that is read from another directory.
func Absolute(uri string) (string, error) {
	scheme, rest, _ := strings.Cut(uri, ":")
	switch scheme {
	case "file":
		path, err := filepath.Abs(rest)
		return "file:" + path, err
	case "tpm":
		if address, key, err := cutTPM(rest); err == nil {
			return TPM(address, key)
		}
	}
	return uri, nil
}

// TPM returns the URI of a key file of the TPM at an address.
func TPM(address, key string) (string, error) {
	a, err := filepath.Abs(address)
	k, err2 := filepath.Abs(key)
	return "tpm:" + a + "?key=" + strings.ReplaceAll(url.QueryEscape(k), "%2F", "/"), errors.Join(err, err2)
}

// cutTPM takes what follows tpm: apart.
func cutTPM(rest string) (address, key string, err error) {
	address, query, _ := strings.Cut(rest, "?")
	q, err := url.ParseQuery(query)
	if err != nil || len(q) != 1 || len(q["key"]) != 1 || q.Get("key") == "" {
		return "", "", errors.New("key URI: tpm:ADDRESS?key=FILE is expected")
	}
	return address, q.Get("key"), nil
}

// OpenSealed is Open where a token's PIN may be sealed: unseal opens its file.
func OpenSealed(uri string, unseal func(file []byte) ([]byte, error)) (crypto.Signer, io.Closer, error) {
	scheme, rest, ok := strings.Cut(uri, ":")
	if !ok {
		return nil, nil, fmt.Errorf("key %.64q: a URI is expected, such as file:/etc/inkan/ca.key or tpm:/dev/tpmrm0?key=/etc/inkan/ca.tss2.pem", uri)
	}
	switch scheme {
	case "file":
		k, err := fromFile(rest)
		return k, nothing{}, err
	case "tpm":
		return fromTPM(rest)
	case "pkcs11":
		return fromToken(uri, unseal)
	}
	return nil, nil, fmt.Errorf("key URI with the scheme %.16q: file, tpm or pkcs11 is expected", scheme)
}

func fromFile(path string) (crypto.Signer, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key file %s: others may read it (mode %04o): chmod 600", path, fi.Mode().Perm())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("key file %s: a PKCS#8 PRIVATE KEY in PEM is expected: openssl pkcs8 -topk8 -nodes makes one of another PEM key", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("key file %s: malformed PKCS#8", path) // the cause could quote key material
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("key file %s: not a signing key", path)
	}
	return s, nil
}

func fromToken(uri string, unseal func([]byte) ([]byte, error)) (crypto.Signer, io.Closer, error) {
	u, err := hsm.ParseURI(uri)
	if err != nil {
		return nil, nil, err
	}
	if len(u.ID) == 0 {
		return nil, nil, errors.New("key URI: it names no key: id= is missing; inkan hsm keygen prints a whole one")
	}
	t, err := hsm.Open(uri, hsm.Options{Unseal: unseal})
	if err != nil {
		return nil, nil, err
	}
	k, err := t.Key(u.ID)
	if err != nil {
		return nil, nil, errors.Join(err, t.Close())
	}
	return k, t, nil
}

func fromTPM(rest string) (crypto.Signer, io.Closer, error) {
	address, key, err := cutTPM(rest)
	if err != nil {
		return nil, nil, err
	}
	file, err := os.ReadFile(key)
	if err != nil {
		return nil, nil, err
	}
	d, err := tpm.Open(address)
	if err != nil {
		return nil, nil, err
	}
	k, err := d.LoadKey(file, nil)
	if err != nil {
		return nil, nil, errors.Join(err, d.Close())
	}
	return k, d, nil
}
