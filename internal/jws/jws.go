// Package jws writes and splits the JWS compact serialisation (RFC 7515) of an
// agent action. [NewHeader] and [Header.SigningInput] make what a device
// signs; [Split] takes a received one apart without deciding anything.
package jws

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"inkan/internal/strictjson"
)

// Type is the typ header parameter of a signed agent action.
const Type = "agent-action+jws"

// Bounds, in bytes of the encoded form.
const (
	MaxHeader    = 24 << 10 // a few certificates
	MaxPayload   = 88 << 10 // a leaf of 65,535 bytes, base64url-encoded
	MaxSignature = 1 << 10  // RSA-4096 takes 683
	MaxCompact   = MaxHeader + MaxPayload + MaxSignature + 2
)

var b64 = base64.RawURLEncoding.Strict()

// ErrForm: the text is not a JWS in compact serialisation, or not the one spelling of it.
var ErrForm = errors.New("not a JWS in compact serialisation")

// Parameters are the protected header's members; any other is refused.
type Parameters struct {
	Alg     string   `json:"alg"`
	Typ     string   `json:"typ"`
	X5C     []string `json:"x5c,omitempty"` // standard base64 DER, leaf first (RFC 7515, 4.1.6)
	X5TS256 string   `json:"x5t#S256"`      // base64url SHA-256 of the leaf (RFC 7515, 4.1.8)
}

// Header is an encoded protected header, fixed for a certificate.
type Header struct{ encoded string }

// NewHeader returns the protected header for signatures with alg by the key of
// chain[0]. With embed the chain stands in x5c; leave the root out of it.
func NewHeader(alg string, chain []*x509.Certificate, embed bool) (*Header, error) {
	if len(chain) == 0 {
		return nil, errors.New("JWS header: no certificate")
	}
	sum := sha256.Sum256(chain[0].Raw)
	p := Parameters{Alg: alg, Typ: Type, X5TS256: b64.EncodeToString(sum[:])}
	if embed {
		for _, c := range chain {
			p.X5C = append(p.X5C, base64.StdEncoding.EncodeToString(c.Raw))
		}
	}
	j, err := strictjson.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("JWS header: %w", err)
	}
	h := &Header{encoded: b64.EncodeToString(j)}
	if len(h.encoded) > MaxHeader {
		return nil, fmt.Errorf("JWS header: %d bytes, at most %d are allowed", len(h.encoded), MaxHeader)
	}
	return h, nil
}

// SigningInput returns the bytes that are signed for payload (RFC 7515, 5.1).
func (h *Header) SigningInput(payload []byte) []byte {
	out := make([]byte, 0, len(h.encoded)+1+b64.EncodedLen(len(payload)))
	out = append(append(out, h.encoded...), '.')
	return b64.AppendEncode(out, payload)
}

// Compact joins a signing input and its signature in JOSE form (for ECDSA the
// fixed-size r||s).
func Compact(signingInput, signature []byte) string {
	out := make([]byte, 0, len(signingInput)+1+b64.EncodedLen(len(signature)))
	out = append(append(out, signingInput...), '.')
	return string(b64.AppendEncode(out, signature))
}

// Message is a JWS taken apart. Nothing in it is verified.
type Message struct {
	EncodedHeader string // the key of caches: equal for all actions under one certificate
	Payload       []byte
	Signature     []byte
	SigningInput  []byte // aliases the input of Split
}

// Split takes the compact serialisation apart. The error is [ErrForm].
func Split(compact []byte) (*Message, error) {
	if len(compact) > MaxCompact {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are allowed", ErrForm, len(compact), MaxCompact)
	}
	h, rest, ok1 := bytes.Cut(compact, []byte("."))
	p, s, ok2 := bytes.Cut(rest, []byte("."))
	if !ok1 || !ok2 || bytes.IndexByte(s, '.') >= 0 {
		return nil, fmt.Errorf("%w: three parts joined by dots are expected", ErrForm)
	}
	if len(h) > MaxHeader || len(p) > MaxPayload || len(s) > MaxSignature {
		return nil, fmt.Errorf("%w: a part is too large", ErrForm)
	}
	m := &Message{EncodedHeader: string(h), SigningInput: compact[:len(h)+1+len(p)]}
	var err error
	if m.Payload, err = decode(p); err != nil {
		return nil, fmt.Errorf("%w: payload: %w", ErrForm, err)
	}
	if m.Signature, err = decode(s); err != nil {
		return nil, fmt.Errorf("%w: signature: %w", ErrForm, err)
	}
	return m, nil
}

// Header decodes the protected header, strictly. alg, typ and the certificates
// are for the caller to judge.
func (m *Message) Header() (*Parameters, error) {
	j, err := m.RawHeader()
	if err != nil {
		return nil, err
	}
	var p Parameters
	if err := strictjson.Unmarshal(j, MaxHeader, &p); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrForm, err)
	}
	if c, err := strictjson.Canonical(j, MaxHeader); err != nil || !bytes.Equal(c, j) {
		return nil, fmt.Errorf("%w: the header is not in its one spelling (RFC 8785)", ErrForm)
	}
	return &p, nil
}

// RawHeader returns the protected header's JSON, for messages that are no
// actions and have other parameters. It is in the one spelling of base64url.
func (m *Message) RawHeader() ([]byte, error) {
	j, err := decode([]byte(m.EncodedHeader))
	if err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrForm, err)
	}
	return j, nil
}

// decode is strict base64url: the decoder skips line ends, so they are refused first.
func decode(b []byte) ([]byte, error) {
	if strings.ContainsAny(string(b), "\r\n") {
		return nil, errors.New("line end in base64url")
	}
	return b64.AppendDecode(make([]byte, 0, b64.DecodedLen(len(b))), b)
}
