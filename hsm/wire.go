package hsm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"inkan/internal/strictjson"
)

// The worker's protocol: frames of a length (4 bytes, big endian) and that many
// bytes. The first request opens the token; answers come in any order and carry
// their request's ID. A frame is JSON, or, since signing is done all day, one of
//
//	'S' ID (8 bytes) scheme (1) hash (1) length of the CKA_ID (1) CKA_ID input
//	's' ID (8 bytes) signature

const (
	maxFrame = 64 << 10
	maxID    = 255 // bytes of a CKA_ID; Google Cloud KMS puts a resource name there
	maxKeys  = 100 // keys in a list
)

const (
	opOpen     = "open"
	opFind     = "find"
	opList     = "list"
	opGenerate = "generate"
	opSign     = "sign"
	opInfo     = "info"
)

type request struct {
	ID        uint64    `json:"id"`
	Op        string    `json:"op"`
	Open      *openBody `json:"open,omitempty"`
	Key       []byte    `json:"key,omitempty"`       // CKA_ID
	Label     string    `json:"label,omitempty"`     // CKA_LABEL of a key to generate
	Algorithm Algorithm `json:"algorithm,omitempty"` // of a key to generate
	Scheme    string    `json:"scheme,omitempty"`    // of a signature
	Hash      string    `json:"hash,omitempty"`      // for PSS
	Input     []byte    `json:"input,omitempty"`     // what is signed
}

type openBody struct {
	Module   string `json:"module"`
	Token    string `json:"token"`
	Serial   string `json:"serial"`
	Maker    string `json:"manufacturer"`
	Model    string `json:"model"`
	PIN      string `json:"pin"`
	Sessions int    `json:"sessions"`
}

type response struct {
	ID        uint64       `json:"id"`
	Code      uint         `json:"code,omitempty"`     // CKR_... of a call that failed
	Missing   bool         `json:"missing,omitempty"`  // no such key
	Error     string       `json:"error,omitempty"`    // anything else that failed
	Sessions  int          `json:"sessions,omitempty"` // open: how many there are
	Keys      []Attributes `json:"keys,omitempty"`
	Signature []byte       `json:"signature,omitempty"`
	Info      *Info        `json:"info,omitempty"`
}

// schemes and hashes by their number in a frame.
var (
	schemes = []string{schemeECDSA, schemePKCS1, schemePSS, schemeEdDSA}
	hashes  = []string{"", "SHA-256", "SHA-384", "SHA-512"}
)

// encode returns the body of a frame.
func (q *request) encode(b []byte) ([]byte, error) {
	scheme, hash := slices.Index(schemes, q.Scheme), slices.Index(hashes, q.Hash)
	if q.Op != opSign || scheme < 0 || hash < 0 || len(q.Key) > maxID {
		return appendJSON(b, q)
	}
	b = binary.BigEndian.AppendUint64(append(b, 'S'), q.ID)
	b = append(b, byte(scheme), byte(hash), byte(len(q.Key)))
	return append(append(b, q.Key...), q.Input...), nil
}

func (q *request) decode(b []byte) error {
	if len(b) == 0 || b[0] != 'S' {
		return strictjson.Unmarshal(b, maxFrame, q)
	}
	if len(b) < 12 || int(b[9]) >= len(schemes) || int(b[10]) >= len(hashes) || int(b[11]) > maxID || len(b) < 12+int(b[11]) {
		return errors.New("malformed frame of a signature")
	}
	key := b[12 : 12+int(b[11])]
	*q = request{Op: opSign, ID: binary.BigEndian.Uint64(b[1:]), Scheme: schemes[b[9]], Hash: hashes[b[10]], Key: key, Input: b[12+len(key):]}
	return nil
}

func (a *response) encode(b []byte) ([]byte, error) {
	if len(a.Signature) == 0 {
		return appendJSON(b, a)
	}
	return append(binary.BigEndian.AppendUint64(append(b, 's'), a.ID), a.Signature...), nil
}

func (a *response) decode(b []byte) error {
	if len(b) == 0 || b[0] != 's' {
		return strictjson.Unmarshal(b, maxFrame, a)
	}
	if len(b) < 10 {
		return errors.New("malformed frame of a signature")
	}
	*a = response{ID: binary.BigEndian.Uint64(b[1:]), Signature: b[9:]}
	return nil
}

func appendJSON(b []byte, v any) ([]byte, error) {
	text, err := strictjson.Encode(v)
	return append(b, text...), err
}

func writeFrame(w io.Writer, v interface{ encode([]byte) ([]byte, error) }) error {
	b, err := v.encode(make([]byte, 4, 256))
	if err != nil {
		return err
	}
	if len(b) > 4+maxFrame {
		return fmt.Errorf("frame of %d bytes, at most %d are allowed", len(b)-4, maxFrame)
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	_, err = w.Write(b)
	return err
}

func readFrame(r io.Reader, v interface{ decode([]byte) error }) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrame {
		return fmt.Errorf("frame of %d bytes, at most %d are allowed", n, maxFrame)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return v.decode(b)
}
