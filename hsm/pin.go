package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// maxPIN bounds a PIN, in bytes. AWS CloudHSM's is user:password.
const maxPIN = 256

// PIN is a token's user PIN. It prints as a placeholder, so that neither a log
// nor an error shows it.
type PIN struct{ value string }

// String returns a placeholder.
func (PIN) String() string { return "[PIN]" }

// GoString returns a placeholder.
func (PIN) GoString() string { return "[PIN]" }

// ReadPIN reads the PIN from its source, which is one of
//
//	file:/path        a file that its owner alone may read
//	fd:3              a descriptor that this process was started with; read once
//	credential:name   a systemd credential: a file in $CREDENTIALS_DIRECTORY
//	sealed:/path      a file that unseal opens: package tpm's sealed secrets
//
// One newline at the end is cut. unseal may be nil where nothing is sealed.
func ReadPIN(source string, unseal func(file []byte) ([]byte, error)) (PIN, error) {
	kind, rest, ok := strings.Cut(source, ":")
	if !ok || rest == "" {
		return PIN{}, errors.New("PIN source: file:/path, fd:3, credential:name or sealed:/path is expected")
	}
	switch kind {
	case "file":
		return pinFile(rest)
	case "fd":
		n, err := strconv.Atoi(rest)
		if err != nil || n < 3 || n > 1023 {
			return PIN{}, errors.New("PIN source: fd:N needs a descriptor number from 3 to 1023")
		}
		f := os.NewFile(uintptr(n), "PIN descriptor")
		if f == nil {
			return PIN{}, fmt.Errorf("PIN source: descriptor %d is not open", n)
		}
		defer f.Close()
		return pinFrom(f, "descriptor "+rest)
	case "credential":
		dir := os.Getenv("CREDENTIALS_DIRECTORY")
		if dir == "" {
			return PIN{}, errors.New("PIN source: $CREDENTIALS_DIRECTORY is not set: LoadCredential= in the unit sets it")
		}
		if rest != filepath.Base(rest) || rest == ".." || rest == "." {
			return PIN{}, errors.New("PIN source: a credential's name has no slash")
		}
		return pinFile(filepath.Join(dir, rest))
	case "sealed":
		if unseal == nil {
			return PIN{}, errors.New("PIN source: a sealed PIN opens for a signer's keys only, on the host that it was sealed on")
		}
		b, err := os.ReadFile(rest)
		if err != nil {
			return PIN{}, fmt.Errorf("sealed PIN: %w", err)
		}
		secret, err := unseal(b)
		if err != nil {
			return PIN{}, fmt.Errorf("sealed PIN %s: %w", rest, err)
		}
		return pinFrom(bytes.NewReader(secret), "sealed in "+rest)
	}
	return PIN{}, errors.New("PIN source: file, fd, credential and sealed are known")
}

// Reveal returns the PIN itself, for sealing it.
func (p PIN) Reveal() []byte { return []byte(p.value) }

func pinFile(path string) (PIN, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would wait for a writer
	if err != nil {
		return PIN{}, fmt.Errorf("PIN file: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return PIN{}, fmt.Errorf("PIN file: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return PIN{}, fmt.Errorf("PIN file %s: not a regular file", path)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return PIN{}, fmt.Errorf("PIN file %s: others may read it (mode %04o): chmod 600", path, fi.Mode().Perm())
	}
	return pinFrom(f, "file "+path)
}

func pinFrom(r io.Reader, what string) (PIN, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxPIN+2))
	if err != nil {
		return PIN{}, fmt.Errorf("PIN %s: %w", what, err)
	}
	s := strings.TrimSuffix(string(b), "\n")
	if s == "" || len(s) > maxPIN || strings.ContainsAny(s, "\n\x00") {
		return PIN{}, fmt.Errorf("PIN %s: one line of 1 to %d bytes is expected", what, maxPIN)
	}
	return PIN{s}, nil
}
