package scope

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"inkan/internal/strictjson"
)

// MaxStartDocument bounds a start document, in bytes.
const MaxStartDocument = 64 << 10

// StartDocument says what was started as an agent. The signer writes it, from
// what it measured itself but for Args, Landlock and Unenforced, which are the
// launcher's word; the launcher is known by its digest. The record keeps it.
type StartDocument struct {
	Version    int         `json:"ver"` // 1
	Agent      string      `json:"sub"` // SPIFFE ID
	Executable StartFile   `json:"executable"`
	Files      []StartFile `json:"files"` // declared files, sorted by path
	Args       []string    `json:"args"`  // the first one is the program's name
	UID        uint32      `json:"uid"`
	Unit       string      `json:"unit,omitempty"`       // systemd unit
	OS         Digest      `json:"os"`                   // of the os section, in canonical form
	Landlock   int         `json:"landlock_abi"`         // what the kernel has; 0: none
	Unenforced []string    `json:"unenforced,omitempty"` // parts that the kernel could not enforce and that were made optional by name
	Launcher   string      `json:"launcher_sha256"`      // of the launcher's executable, lower-case hex
}

// Marshal returns the document's one spelling (RFC 8785).
func (d *StartDocument) Marshal() ([]byte, error) {
	b, err := strictjson.Marshal(d)
	if err == nil && len(b) > MaxStartDocument {
		err = fmt.Errorf("%d bytes, at most %d are allowed: shorten the arguments", len(b), MaxStartDocument)
	}
	if err != nil {
		return nil, fmt.Errorf("start document: %w", err)
	}
	return b, nil
}

// ParseStartDocument reads a start document and refuses any spelling but the
// one of Marshal.
func ParseStartDocument(b []byte) (*StartDocument, error) {
	var d StartDocument
	if err := strictjson.Unmarshal(b, MaxStartDocument, &d); err != nil {
		return nil, fmt.Errorf("start document: %w", err)
	}
	if again, err := d.Marshal(); err != nil || !bytes.Equal(again, b) {
		return nil, errors.New("start document: is not in canonical form (RFC 8785)")
	}
	if d.Version != 1 {
		return nil, fmt.Errorf("start document: version %d, this program knows 1", d.Version)
	}
	return &d, nil
}

// Run returns what statements of the process say about its start.
func (d *StartDocument) Run() (*Run, error) {
	b, err := d.Marshal()
	if err != nil {
		return nil, err
	}
	exe, err := hex.DecodeString(d.Executable.SHA256)
	if err != nil || len(exe) != sha256.Size {
		return nil, errors.New("start document: the executable has no SHA-256")
	}
	files, err := FilesDigest(d.Files)
	if err != nil {
		return nil, err
	}
	return &Run{OS: d.OS, Executable: Digest(exe), Files: files, Start: sha256.Sum256(b)}, nil
}
