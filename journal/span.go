package journal

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"inkan/internal/strictjson"
)

// MaxPart bounds a part of a journal that is sent at a time, in bytes.
const MaxPart = 1 << 20

// ErrNoTestimony: a testimony is not in the journal. It was moved away or cut off.
var ErrNoTestimony = errors.New("the testimony is not in the journal")

// TestimonyID names a testimony: the SHA-256 of its TPMS_ATTEST. It carries the
// nonce of an exchange, so that no two are the same.
func TestimonyID(attest []byte) [32]byte { return sha256.Sum256(attest) }

// Span verifies what a journal has from one testimony to another one, as it
// comes in parts. It is not safe for concurrent use.
type Span struct{ v verification }

// NewSpan begins at the testimony from, by the attestation key of this Name (hex).
func NewSpan(ak string, from [32]byte) *Span {
	return &Span{verification{o: Options{AK: map[string]bool{ak: true}}, r: &Report{}, from: &from}}
}

// Append goes on with a part of whole lines. Its error is a [*Contradiction].
func (s *Span) Append(lines []byte) error { return s.v.read(bytes.NewReader(lines), false) }

// End says what the span shows if its last line is the testimony to. Every
// signature that the TPM made in between is in the journal then, but for the
// periods that are lost. Its error is a [*Contradiction].
func (s *Span) End(to [32]byte) (*Report, error) {
	switch v := &s.v; {
	case v.from != nil:
		return nil, v.contradiction(RuleForm, "what it has since the testimony of the last time did not come: it was moved away or cut off")
	case v.at != to:
		return nil, v.contradiction(RuleForm, "what came does not end with the testimony of this time")
	}
	return s.v.r, nil
}

// Between sends what the journal has from one testimony to another one, both
// included, in parts of whole lines of at most [MaxPart] bytes. It fails with
// [ErrNoTestimony] before the first part if it does not have both.
func (j *Journal) Between(from, to [32]byte, send func(lines []byte) error) error {
	begin, _, err := j.find(from)
	if err != nil {
		return err
	}
	_, end, err := j.find(to)
	if err != nil {
		return err
	}
	in := bufio.NewReaderSize(io.NewSectionReader(j.file, begin, max(end-begin, 0)), maxLine)
	part := make([]byte, 0, MaxPart)
	for {
		line, err := in.ReadSlice('\n')
		if err != nil && err != io.EOF {
			return fmt.Errorf("reading the journal: %w", err)
		}
		if len(part) > 0 && (err == io.EOF || len(part)+len(line) > MaxPart) {
			if err := send(part); err != nil {
				return err
			}
			part = part[:0]
		}
		if err == io.EOF {
			return nil
		}
		part = append(part, line...)
	}
}

// find returns where the line of a testimony begins and ends. It looks from
// the end of the file, which is long: what is asked for is mostly new.
func (j *Journal) find(id [32]byte) (begin, end int64, err error) {
	fi, err := j.file.Stat()
	if err != nil {
		return 0, 0, err
	}
	var rest []byte // of a line that began before pos
	for pos := fi.Size(); pos > 0; {
		n := min(pos, MaxPart)
		block := make([]byte, n, int(n)+len(rest))
		pos -= n
		if _, err := j.file.ReadAt(block, pos); err != nil {
			return 0, 0, fmt.Errorf("reading the journal: %w", err)
		}
		block = append(block, rest...)
		for len(block) > 0 {
			start := bytes.LastIndexByte(block[:len(block)-1], '\n') + 1
			if start == 0 && pos > 0 {
				break
			}
			if testifies(block[start:], id) {
				return pos + int64(start), pos + int64(len(block)), nil
			}
			block = block[:start]
		}
		if rest = block; len(rest) > maxLine {
			return 0, 0, errors.New("reading the journal: a line is too long")
		}
	}
	return 0, 0, ErrNoTestimony
}

// testifies says whether a line is a testimony.
func testifies(text []byte, id [32]byte) bool {
	if !bytes.HasPrefix(text, []byte(`{"testimony":`)) {
		return false
	}
	var l line
	err := strictjson.Unmarshal(bytes.TrimSuffix(text, []byte("\n")), maxLine, &l)
	return err == nil && l.Testimony != nil && TestimonyID(l.Testimony.Attest) == id
}
