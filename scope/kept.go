package scope

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"runtime"
	"sync"
)

// KeptBook is a book as it is kept for the next start, so that a day's entries
// are not read again. It is no truth of its own: it is bound to the entry up to which it
// counts, and the entries after that one are read.
type KeptBook struct {
	Book  *Book
	UpTo  Counter           // the last entry that it counts
	Entry [sha256.Size]byte // SHA-256 of that entry
}

const (
	keptMagic = "INKBOOK1"
	keptHead  = len(keptMagic) + 8 + 2*sha256.Size
)

var errKept = errors.New("book: what was kept is malformed")

// AppendBinary appends the form in which a book is kept: what begins it, the
// number of the entry, its SHA-256, the SHA-256 of the rest, and the book. Its error is always nil.
func (k *KeptBook) AppendBinary(b []byte) ([]byte, error) {
	begun := len(b)
	b = binary.BigEndian.AppendUint64(append(b, keptMagic...), uint64(k.UpTo))
	b = append(append(b, k.Entry[:]...), make([]byte, sha256.Size)...)
	b, err := k.Book.AppendBinary(b)
	if err != nil {
		return nil, err
	}
	body := begun + keptHead
	sum := sha256.Sum256(b[body:])
	copy(b[body-sha256.Size:], sum[:])
	return b, nil
}

// UnmarshalBinary reads the form of AppendBinary, strictly. It does not keep data.
func (k *KeptBook) UnmarshalBinary(data []byte) error {
	if len(data) < keptHead || string(data[:len(keptMagic)]) != keptMagic {
		return errKept
	}
	rest, body := data[len(keptMagic):keptHead], data[keptHead:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], rest[8+sha256.Size:]) {
		return errKept
	}
	fresh := KeptBook{Book: NewBook(), UpTo: Counter(binary.BigEndian.Uint64(rest)), Entry: [sha256.Size]byte(rest[8:])}
	if err := fresh.Book.UnmarshalBinary(body); err != nil {
		return err
	}
	*k = fresh
	return nil
}

// statementsAlone is how many statements one processor parses before another one helps.
const statementsAlone = 64

// ParseStatements is [ParseStatement] for many, on all processors.
func ParseStatements(list [][]byte) ([]*Statement, error) {
	out := make([]*Statement, len(list))
	errs := make([]error, min(runtime.GOMAXPROCS(0), len(list)/statementsAlone+1))
	var wg sync.WaitGroup
	for w := range errs {
		wg.Go(func() {
			for i := w; i < len(list) && errs[w] == nil; i += len(errs) {
				out[i], errs[w] = ParseStatement(list[i])
			}
		})
	}
	wg.Wait()
	return out, errors.Join(errs...)
}
