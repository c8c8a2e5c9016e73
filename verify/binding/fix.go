package binding

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The pair of fields that carries a signed action, in the range that FIX leaves to
// two parties to agree on (20000 to 39999). The first one is of the type Length, so
// that an engine can be told of the second as a data field; a JWS has no SOH in it, so
// one that is not told reads it as well.
const (
	TagActionLength = 20500 // AgentActionLen: bytes of the next field's value
	TagAction       = 20501 // AgentAction: JWS in compact serialisation
)

// Maxima of a FIX message.
const (
	MaxFIX    = 192 << 10 // bytes
	maxFields = 1024
	maxTag    = 99999
)

const soh = 0x01

// rewritten are the fields that an engine sets on its way, so they are not covered
// (FIX, standard header and trailer; the action's own pair besides).
var rewritten = []int{tagBeginString, tagBodyLength, tagMsgSeqNum, tagSenderCompID, tagSendingTime, tagTargetCompID, tagPossDupFlag, tagPossResend, tagOrigSendingTime, tagCheckSum, TagActionLength, TagAction}

const (
	tagBeginString, tagBodyLength, tagMsgType, tagCheckSum                           = 8, 9, 35, 10
	tagMsgSeqNum, tagSenderCompID, tagSendingTime, tagTargetCompID                   = 34, 49, 52, 56
	tagPossDupFlag, tagPossResend, tagOrigSendingTime                                = 43, 97, 122
	tagParties, tagPartyID, tagPartyIDSource, tagPartyRole, tagPartyQualifier        = 453, 448, 447, 452, 2376
	tagSymbol, tagHandlInst, tagTransactTime, tagQuoteID, tagMassCancelType          = 55, 21, 60, 117, 530
	tagSecurityExchange, tagExDestination, tagSecurityID, tagIDSource, tagExpireTime = 207, 100, 48, 22, 126
)

// header are the fields of the standard header, FIX 4.0 to 5.0 SP2: they stand
// before all others.
var header = []int{8, 9, 35, 34, 43, 49, 50, 52, 56, 57, 97, 115, 116, 122, 128, 129, 142, 143, 144, 145, 347, 369, 370, 627, 628, 629, 630, 1128, 1129, 1156}

// opaque are data fields of FIX and their lengths. Their values may contain what
// looks like fields, and an order needs none of them: they are refused.
var opaque = []int{89, 90, 91, 93, 95, 96, 212, 213, 348, 349, 350, 351, 352, 353, 354, 355, 356, 357, 358, 359, 360, 361, 362, 363, 364, 365, 445, 446, 618, 619, 621, 622, 1184, 1185, 1277, 1278, 1280, 1281, 1282, 1283, 1397, 1398, 1468, 1469}

type field struct {
	tag   int
	value string
	raw   []byte // tag=value SOH
}

// Message is a FIX message.
type Message struct {
	MsgType string
	PossDup bool   // PossDupFlag=Y: it may have been sent before
	Action  string // JWS in compact serialisation; empty: it carries none

	fields []field
}

// ParseFIX reads a FIX message as it was on the wire: FIX.4.0 to FIX.4.4 or
// FIXT.1.1, with its length and checksum. Values are printable ASCII.
func ParseFIX(b []byte) (*Message, error) {
	m := new(Message)
	if err := m.parse(b); err != nil {
		return nil, fmt.Errorf("FIX message: %w", err)
	}
	return m, nil
}

func (m *Message) parse(b []byte) error {
	if len(b) > MaxFIX {
		return fmt.Errorf("%d bytes, at most %d are allowed", len(b), MaxFIX)
	}
	for rest := b; len(rest) > 0; {
		f, err := next(rest)
		if err != nil {
			return fmt.Errorf("field %d: %w", len(m.fields)+1, err)
		}
		if len(m.fields) == maxFields {
			return fmt.Errorf("more than %d fields", maxFields)
		}
		m.fields = append(m.fields, f)
		rest = rest[len(f.raw):]
	}
	if len(m.fields) < 4 || m.fields[0].tag != tagBeginString || m.fields[1].tag != tagBodyLength || m.fields[2].tag != tagMsgType || m.fields[len(m.fields)-1].tag != tagCheckSum {
		return errors.New("it does not begin with 8, 9 and 35, or does not end with 10")
	}
	if v := m.fields[0].value; v != "FIXT.1.1" && (len(v) != 7 || v[:6] != "FIX.4." || v[6] < '0' || v[6] > '4') {
		return fmt.Errorf("BeginString %.16q: FIX.4.0 to FIX.4.4 or FIXT.1.1 is expected", v)
	}
	m.MsgType = m.fields[2].value
	end := len(b) - len(m.fields[len(m.fields)-1].raw)
	if want := strconv.Itoa(end - len(m.fields[0].raw) - len(m.fields[1].raw)); m.fields[1].value != want {
		return fmt.Errorf("BodyLength is %.16q, %s bytes are there", m.fields[1].value, want)
	}
	if got, want := m.fields[len(m.fields)-1].value, checksum(b[:end]); got != want {
		return fmt.Errorf("CheckSum is %.8q, %s is right", got, want)
	}
	return m.order()
}

// next takes the first field of b.
func next(b []byte) (field, error) {
	end := bytes.IndexByte(b, soh)
	if end < 0 {
		return field{}, errors.New("it has no end (SOH)")
	}
	f := field{raw: b[:end+1]}
	tag, value, ok := strings.Cut(string(b[:end]), "=")
	n, err := strconv.Atoi(tag)
	switch {
	case !ok || err != nil || n < 1 || n > maxTag || strconv.Itoa(n) != tag:
		return field{}, fmt.Errorf("%.16q: a tag from 1 to %d and = are expected", tag, maxTag)
	case value == "":
		return field{}, fmt.Errorf("tag %d has no value", n)
	case strings.IndexFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) >= 0:
		return field{}, fmt.Errorf("tag %d: printable ASCII is expected", n)
	case slices.Contains(opaque, n):
		return field{}, fmt.Errorf("tag %d belongs to a data field, which is not taken", n)
	}
	f.tag, f.value = n, value
	return f, nil
}

// order checks where fields stand, and finds those of the session and the action.
func (m *Message) order() error {
	seen := make(map[int]bool)
	body := false
	for i, f := range m.fields {
		if slices.Contains(rewritten, f.tag) || f.tag == tagMsgType {
			if seen[f.tag] {
				return fmt.Errorf("tag %d stands twice", f.tag)
			}
			seen[f.tag] = true
		}
		switch {
		case f.tag == tagCheckSum && i != len(m.fields)-1:
			return fmt.Errorf("tag %d stands before the end", f.tag)
		case !slices.Contains(header, f.tag):
			body = true
		case body:
			return fmt.Errorf("tag %d is of the header and stands in the body", f.tag)
		}
		switch f.tag {
		case tagPossDupFlag:
			if f.value != "Y" && f.value != "N" {
				return fmt.Errorf("PossDupFlag is %.8q: Y or N is expected", f.value)
			}
			m.PossDup = f.value == "Y"
		case TagActionLength:
			if following := m.fields[i+1]; following.tag != TagAction || f.value != strconv.Itoa(len(following.value)) {
				return fmt.Errorf("tag %d does not say the length of tag %d after it", TagActionLength, TagAction)
			}
		case TagAction:
			if m.fields[i-1].tag != TagActionLength {
				return fmt.Errorf("tag %d has no length before it", TagAction)
			}
			m.Action = f.value
		}
	}
	return nil
}

// Covered returns the bytes that are signed for: the fields as they stand on the
// wire, in their order, each with its SOH, without those that an engine rewrites.
func (m *Message) Covered() []byte {
	var out []byte
	for _, f := range m.fields {
		if !slices.Contains(rewritten, f.tag) {
			out = append(out, f.raw...)
		}
	}
	return out
}

// Digest is what an action of the format fix-body has in native: the SHA-256 of
// what is [Message.Covered].
func (m *Message) Digest() [32]byte { return sha256.Sum256(m.Covered()) }

// AttachFIX puts a signed action into a FIX message that carries none, at the end
// of its body, and sets its length and checksum anew.
func AttachFIX(message []byte, action string) ([]byte, error) {
	m, err := ParseFIX(message)
	switch {
	case err != nil:
		return nil, err
	case m.Action != "":
		return nil, errors.New("FIX message: it carries an action already")
	case action == "" || strings.Trim(action, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != "":
		return nil, errors.New("FIX message: a JWS in compact serialisation is expected")
	}
	var body []byte
	for _, f := range m.fields[2 : len(m.fields)-1] {
		body = append(body, f.raw...)
	}
	body = fmt.Appendf(body, "%d=%d\x01%d=%s\x01", TagActionLength, len(action), TagAction, action)
	out := fmt.Appendf(nil, "8=%s\x019=%d\x01%s", m.fields[0].value, len(body), body)
	out = fmt.Appendf(out, "10=%s\x01", checksum(out))
	if len(out) > MaxFIX {
		return nil, fmt.Errorf("FIX message: %d bytes, at most %d are allowed", len(out), MaxFIX)
	}
	return out, nil
}

// checksum is FIX's: the sum of all bytes modulo 256 in three digits.
func checksum(b []byte) string {
	sum := byte(0)
	for _, c := range b {
		sum += c
	}
	return fmt.Sprintf("%03d", sum)
}
