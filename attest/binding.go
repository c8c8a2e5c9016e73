package attest

import (
	"bytes"
	"crypto/sha256"
)

// BindingLabel is the label of the TLS exporter (RFC 8446, section 7.5) whose
// 32 bytes the evidence carries, without a context.
const BindingLabel = "EXPORTER-inkan-attestation"

// Sizes, in bytes, of what the qualifying data is made of. All are fixed, so
// the concatenation has one reading.
const (
	SessionSize = 16
	NonceSize   = 32
	BindingSize = 32
	SecretSize  = 32
)

// KeyQualifyingData is what TPM2_Certify of a key must carry: the exchange, the
// TLS channel and the certificate request.
func KeyQualifyingData(session, nonce, binding, csr []byte) [32]byte {
	sum := sha256.Sum256(csr)
	return sha256.Sum256(bytes.Join([][]byte{[]byte("inkan-key"), session, nonce, binding, sum[:]}, nil))
}

// QuoteQualifyingData is what TPM2_Quote must carry: the exchange, the TLS
// channel, and every key with its certificate request (G8).
func QuoteQualifyingData(session, nonce, binding []byte, keys []KeyEvidence) ([32]byte, error) {
	h := sha256.New()
	for _, part := range [][]byte{[]byte("inkan-quote"), session, nonce, binding} {
		h.Write(part)
	}
	for _, k := range keys {
		spki := sha256.Sum256(k.SPKI)
		if len(k.SPKI) == 0 {
			var err error
			if spki, err = SPKIDigest(k.Public); err != nil {
				return [32]byte{}, err
			}
		}
		csr := sha256.Sum256(k.CSR)
		h.Write(spki[:])
		h.Write(csr[:])
	}
	return [32]byte(h.Sum(nil)), nil
}
