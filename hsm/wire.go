package hsm

import (
	"encoding/binary"
	"fmt"
	"io"

	"inkan/internal/strictjson"
)

// The worker's protocol: frames of a length (4 bytes, big endian) and that
// many bytes of JSON. The first request opens the token; answers come in any
// order and carry their request's ID.

const (
	maxFrame = 64 << 10
	maxID    = 64  // bytes of a CKA_ID
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

func writeFrame(w io.Writer, v any) error {
	b, err := strictjson.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxFrame {
		return fmt.Errorf("frame of %d bytes, at most %d are allowed", len(b), maxFrame)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), uint32(len(b))), b...))
	return err
}

func readFrame(r io.Reader, v any) error {
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
	return strictjson.Unmarshal(b, maxFrame, v)
}
