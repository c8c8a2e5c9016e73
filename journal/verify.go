package journal

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"inkan/attest"
	"inkan/internal/strictjson"
)

// Rule is the stable name of why a journal does not stand. docs/record.md has
// a sentence for each.
type Rule string

// The rules.
const (
	RuleForm        Rule = "journal"       // a line is malformed, or does not belong where it stands
	RuleAK          Rule = "journal_ak"    // a testimony is not by the attestation key that the agent's certificates name
	RuleAuditOff    Rule = "audit_off"     // TPM2_Sign was not audited
	RuleOffTheBooks Rule = "off_the_books" // the TPM signed what is not in the journal, or the journal has what it did not sign
	RuleTaken       Rule = "audit_taken"   // the TPM's digest was taken by somebody else, and with it what it was over
	RuleUnexplained Rule = "unexplained"   // the agent's key signed what is not in its record
)

// Contradiction says that a journal and the TPM's testimony, or the record, do not agree.
type Contradiction struct {
	Rule   Rule
	Line   int
	Reason string
}

func (c *Contradiction) Error() string {
	return fmt.Sprintf("the journal of signatures does not stand, at line %d: %s (%s)", c.Line, c.Reason, c.Rule)
}

// Is makes errors.Is(err, &Contradiction{Rule: r}) ask for the rule.
func (c *Contradiction) Is(target error) bool {
	t, ok := target.(*Contradiction)
	return ok && t.Rule == c.Rule
}

// Signature is a signature in a journal.
type Signature struct {
	Digest  [32]byte
	Message []byte // nil: a statement, or not known
}

// Options of verification.
type Options struct {
	AK   map[string]bool // Names of attestation keys, hex, that the agent's certificates state; nil: any
	Keys map[string]bool // Names of its action keys, hex
	// Explain says whether a signature by one of these keys is in the agent's record.
	Explain func(Signature) bool
	// Message, if not nil, gets each message that stands in the journal; nothing of it is verified.
	Message func([]byte)
}

// Lost is a period about which the TPM does not testify.
type Lost struct {
	After  time.Time `json:"after"`  // the testimony before it
	Before time.Time `json:"before"` // the one after
	Reason string    `json:"reason"`
}

// Report is what a journal shows.
type Report struct {
	From       time.Time `json:"from,omitzero"`  // first testimony: before it nothing is known
	Until      time.Time `json:"until,omitzero"` // last one: after it nothing is known
	Signatures uint64    `json:"signatures"`     // of all keys, that the TPM testified to
	Own        uint64    `json:"own"`            // by the agent's keys, among them
	After      uint64    `json:"after"`          // signatures in the journal after the last testimony
	Lost       []Lost    `json:"lost,omitempty"`
}

// verification walks a journal.
type verification struct {
	o    Options
	r    *Report
	line int

	last    *attest.Testimony
	chain   [32]byte
	n       uint64 // signatures since the last testimony
	own     uint64
	open    *asked // asked for, with no answer yet
	unknown bool   // since the last testimony something was asked for and nobody knows the answer

	from *[32]byte // what the first line must testify; nil: anything may come
	at   [32]byte  // of the testimony, if the last line was one
}

// Verify reads a journal and holds it against the TPM's testimonies and the
// agent's record. Its error is a [*Contradiction] when they do not agree.
// Periods that the TPM does not testify to, since it was reset or the signer
// was killed in between, are in the report: nothing is known about them.
func Verify(in io.Reader, o Options) (*Report, error) {
	v := &verification{o: o, r: &Report{}}
	if err := v.read(in, true); err != nil {
		return nil, err
	}
	if v.open != nil {
		v.n++
	}
	v.r.After = v.n
	return v.r, nil
}

// read goes on with lines. What follows the last end of a line may be a part of
// one: somebody is at it, or was when it was ended, and [Open] cuts it off.
func (v *verification) read(in io.Reader, part bool) error {
	ended := true
	s := bufio.NewScanner(in)
	s.Split(func(data []byte, atEOF bool) (int, []byte, error) {
		ended = bytes.IndexByte(data, '\n') >= 0
		return bufio.ScanLines(data, atEOF)
	})
	s.Buffer(make([]byte, 0, maxLine), maxLine)
	for s.Scan() {
		v.line++
		var l line
		if err := strictjson.Unmarshal(s.Bytes(), maxLine, &l); err != nil {
			if part && !ended && v.line > 1 {
				break
			}
			return v.contradiction(RuleForm, "%v", err)
		}
		if err := v.next(&l); err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil {
		return v.contradiction(RuleForm, "after it: %v", err)
	}
	return nil
}

func (v *verification) contradiction(rule Rule, format string, a ...any) error {
	return &Contradiction{rule, v.line, fmt.Sprintf(format, a...)}
}

func (v *verification) next(l *line) error {
	parts := 0
	for _, there := range []bool{l.Asked != nil, l.Signed != nil, l.Refused != "", l.Testimony != nil} {
		if there {
			parts++
		}
	}
	if parts != 1 {
		return v.contradiction(RuleForm, "a line is one of asked, signed, refused and testimony")
	}
	if v.from != nil {
		if l.Testimony == nil || TestimonyID(l.Testimony.Attest) != *v.from {
			return v.contradiction(RuleForm, "this part of the journal does not begin with the testimony of the last time")
		}
		v.from = nil
	}
	v.at = [32]byte{}
	switch {
	case l.Asked != nil:
		if v.open != nil {
			v.unknown = true // the signer was killed while the TPM was at it
		}
		v.open = l.Asked
	case l.Signed != nil:
		return v.signed(l.Signed)
	case l.Refused != "":
		if v.open == nil {
			return v.contradiction(RuleForm, "a refusal of nothing")
		}
		v.open = nil
	default:
		if v.open != nil {
			v.unknown, v.open = true, nil
		}
		return v.testified(l.Testimony)
	}
	return nil
}

func (v *verification) signed(signature []byte) error {
	a := v.open
	if a == nil {
		return v.contradiction(RuleForm, "a signature over nothing")
	}
	v.open = nil
	name, err := hex.DecodeString(a.Key)
	if err != nil || len(a.Digest) != sha256.Size {
		return v.contradiction(RuleForm, "key or digest are malformed")
	}
	x := Signature{Digest: [32]byte(a.Digest)}
	if a.Message != nil {
		if sha256.Sum256(a.Message) != x.Digest {
			return v.contradiction(RuleForm, "the message does not have the digest beside it")
		}
		x.Message = a.Message
		if v.o.Message != nil {
			v.o.Message(a.Message)
		}
	}
	v.chain = attest.AuditLink(v.chain, name, x.Digest, signature)
	v.n++
	if v.o.Keys[a.Key] {
		if v.own++; !v.o.Explain(x) {
			return v.contradiction(RuleUnexplained, "the agent's key %.16s... signed %x, which is neither in its record nor a record's head nor a certificate request", a.Key, a.Digest)
		}
	}
	return nil
}

// testified holds the chain so far against what the TPM says.
func (v *verification) testified(x *testified) error {
	name, err := attest.KeyName(x.AK)
	if err != nil {
		return v.contradiction(RuleForm, "the attestation key: %v", err)
	}
	if v.o.AK != nil && !v.o.AK[hex.EncodeToString(name)] {
		return v.contradiction(RuleAK, "the testimony is by the attestation key %x, which is not the one in the agent's certificates", name)
	}
	t, err := attest.ReadTestimony(x.AK, attest.Attested{Attest: x.Attest, Signature: x.Signature})
	switch {
	case errors.Is(err, &attest.Refusal{Check: "C2"}):
		return v.contradiction(RuleAuditOff, "between %s and %s: %v", v.r.Until.Format(time.RFC3339), x.Time.Format(time.RFC3339), err)
	case err != nil:
		return v.contradiction(RuleAK, "%v", err)
	}
	if err := v.agrees(t, x.Time); err != nil {
		return err
	}
	if v.last == nil {
		v.r.From = x.Time
	}
	v.r.Until, v.last, v.at = x.Time, t, TestimonyID(x.Attest)
	v.chain, v.n, v.own, v.unknown = [32]byte{}, 0, 0, false
	return nil
}

// agrees compares a period in the journal with the TPM's testimony about it.
func (v *verification) agrees(t *attest.Testimony, at time.Time) error {
	last := v.last
	if last == nil {
		return nil // before the first testimony nothing is known
	}
	lost := func(format string, a ...any) error {
		v.r.Lost = append(v.r.Lost, Lost{v.r.Until, at, fmt.Sprintf(format, a...)})
		return nil
	}
	since := v.r.Until.Format(time.RFC3339)
	reset := t.Clock.Resets != last.Clock.Resets
	switch {
	case t.Counter < last.Counter || t.Clock.Resets < last.Clock.Resets:
		return v.contradiction(RuleTaken, "the TPM's audit counter or reset count went back: testimonies are in another order, or some are missing")
	case t.Counter == last.Counter && len(t.Digest) == 0 && v.n == 0:
		return nil // nothing was signed
	case t.Counter == last.Counter && v.n == 0 && !v.unknown:
		return v.contradiction(RuleForm, "two testimonies about one period")
	case t.Counter == last.Counter && v.n > 0:
		return v.contradiction(RuleOffTheBooks, "the journal has %d signatures since %s, the TPM made none", v.n, since)
	case t.Counter == last.Counter:
		return nil // what was asked for was not done
	case reset: // with it went what the loss of power left unwritten
		return lost("the TPM was reset: it does not testify to the %d signatures before that", v.n)
	case v.n == 0 && !v.unknown:
		return v.contradiction(RuleOffTheBooks, "the TPM signed since %s, and nothing is in the journal", since)
	case t.Counter > last.Counter+1, len(t.Digest) == 0:
		return v.contradiction(RuleTaken, "since %s somebody else took the TPM's digest, %d periods of it", since, max(t.Counter-last.Counter-1, 1))
	case v.unknown:
		if bytes.Equal(t.Digest, v.chain[:]) {
			break // what nobody knew of was not done
		}
		return lost("the signer was killed while the TPM signed: the %d signatures of this period cannot be compared", v.n)
	case !bytes.Equal(t.Digest, v.chain[:]):
		return v.contradiction(RuleOffTheBooks, "the %d signatures in the journal since %s are not what the TPM signed: its digest is %x, they lead to %x", v.n, since, t.Digest, v.chain)
	}
	v.r.Signatures += v.n
	v.r.Own += v.own
	return nil
}
