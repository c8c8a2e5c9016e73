// Package journal keeps what a TPM was asked to sign, and what the TPM itself
// testifies about that: [Open] a journal, which a device writes; [Verify] one.
//
// Where a TPM has command audit, it keeps a hash chain over every TPM2_Sign,
// by whatever key and whoever asked. Its attestation key signs the chain's
// digest now and then. A signature that was made behind the signer's back is
// in the chain and not in the journal: then they do not agree, and what the
// TPM signed cannot be changed afterwards. docs/record.md describes the file.
package journal

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"inkan/attest"
	"inkan/internal/strictjson"
)

// FileName is the journal's name in a signer's state directory.
const FileName = "signatures.journal"

// maxLine bounds a line of a journal, in bytes.
const maxLine = 16 << 10

// maxMessage bounds a message that is kept, in bytes.
const maxMessage = 4 << 10

// line is one line: exactly one member is there.
type line struct {
	Asked     *asked     `json:"asked,omitempty"`
	Signed    []byte     `json:"signed,omitempty"`  // TPMT_SIGNATURE: what was asked for just before was signed
	Refused   string     `json:"refused,omitempty"` // the TPM's answer: it was not signed
	Testimony *testified `json:"testimony,omitempty"`
}

// asked is written before the TPM is asked to sign.
type asked struct {
	Key     string `json:"key"`               // TPM Name, hex
	Digest  []byte `json:"digest"`            // SHA-256
	Message []byte `json:"message,omitempty"` // what was hashed, but for statements, which are in the record
}

// testified is the TPM's testimony about all signatures since the one before.
type testified struct {
	Time      time.Time `json:"time"`
	AK        []byte    `json:"ak"` // TPMT_PUBLIC
	Attest    []byte    `json:"attest"`
	Signature []byte    `json:"signature"`
}

// Journal appends to a journal's file. Several processes may have it open: one
// at a time asks the TPM for a signature. It is safe for concurrent use.
type Journal struct {
	mu   sync.Mutex
	file *os.File
	now  func() time.Time
}

// Open opens or makes a journal. A line that a crash left unfinished is cut off.
func Open(path string) (*Journal, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	j := &Journal{file: f, now: time.Now}
	if err := j.locked(func() error { return nil }); err != nil {
		return nil, errors.Join(fmt.Errorf("journal %s: %w", path, err), f.Close())
	}
	return j, nil
}

// mend cuts off what follows the last end of a line: a process that was killed
// left it.
func (j *Journal) mend() error {
	fi, err := j.file.Stat()
	if err != nil {
		return err
	}
	tail := make([]byte, min(fi.Size(), 1), maxLine)
	for {
		if _, err := j.file.ReadAt(tail, fi.Size()-int64(len(tail))); err != nil && err != io.EOF {
			return err
		}
		end := bytes.LastIndexByte(tail, '\n') + 1
		switch whole := min(fi.Size(), maxLine); {
		case end == len(tail):
			return nil
		case end == 0 && int64(len(tail)) < whole:
			tail = tail[:whole]
			continue
		case end == 0 && whole < fi.Size():
			return errors.New("it does not end in lines: it is another kind of file")
		}
		return j.file.Truncate(fi.Size() - int64(len(tail)-end))
	}
}

// locked runs f when nobody else writes and the file ends with a whole line.
func (j *Journal) locked(f func() error) error {
	release, err := j.lock()
	if err != nil {
		return err
	}
	return release(f())
}

// lock keeps others from writing until release, which passes an error on.
func (j *Journal) lock() (release func(error) error, err error) {
	if err := unix.Flock(int(j.file.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	release = func(err error) error { return errors.Join(err, unix.Flock(int(j.file.Fd()), unix.LOCK_UN)) }
	if err := j.mend(); err != nil {
		return nil, release(err)
	}
	return release, nil
}

// write appends a line, or nothing.
func (j *Journal) write(l *line) error {
	b, err := strictjson.Marshal(l)
	if err != nil {
		return err
	}
	return j.append(append(b, '\n'))
}

// append appends bytes. Where the disk has no room for all of them, none stays.
func (j *Journal) append(b []byte) error {
	n, err := j.file.Write(b)
	if err == nil || n == 0 {
		return err
	}
	return errors.Join(err, j.cut(n))
}

// cut takes the last bytes away.
func (j *Journal) cut(n int) error {
	fi, err := j.file.Stat()
	if err != nil {
		return err
	}
	return j.file.Truncate(fi.Size() - int64(n))
}

// room says whether the disk has room for a line. What the TPM gives once must
// not be asked for in vain.
func (j *Journal) room() error {
	b := make([]byte, maxLine/2) // has no line end, so what a process that was killed left of it is cut off
	if err := j.append(b); err != nil {
		return err
	}
	return j.cut(len(b))
}

// Close closes the file.
func (j *Journal) Close() error { return j.file.Close() }

// Begin implements tpm.Journal. The journal is held until done was called.
func (j *Journal) Begin(keyName []byte, digest [32]byte, message []byte) (done func(signature []byte, failed error) error, err error) {
	a := &asked{Key: hex.EncodeToString(keyName), Digest: digest[:]}
	if len(message) <= maxMessage && !isStatement(message) {
		a.Message = message
	}
	j.mu.Lock()
	unlock, err := j.lock()
	if err != nil {
		j.mu.Unlock()
		return nil, err
	}
	release := func(err error) error {
		defer j.mu.Unlock()
		return unlock(err)
	}
	if err := j.write(&line{Asked: a}); err != nil {
		return nil, release(err)
	}
	return func(signature []byte, failed error) error {
		switch {
		case failed != nil:
			return release(j.write(&line{Refused: failed.Error()}))
		case signature != nil:
			return release(j.write(&line{Signed: signature}))
		}
		return release(nil) // nobody knows: what was asked for stays open
	}, nil
}

// isStatement says whether a message is the signing input of a statement.
func isStatement(message []byte) bool { return bytes.HasPrefix(message, []byte("eyJ")) }

// Testify implements tpm.Journal: the testimony is on disk when it returns.
func (j *Journal) Testify(ak []byte, take func() (attest.Attested, error)) (a attest.Attested, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return a, j.locked(func() (err error) {
		if err := j.room(); err != nil {
			return err
		}
		if a, err = take(); err != nil {
			return err
		}
		if err := j.write(&line{Testimony: &testified{Time: j.now().UTC().Truncate(time.Microsecond), AK: ak, Attest: a.Attest, Signature: a.Signature}}); err != nil {
			return err
		}
		return j.file.Sync()
	})
}
