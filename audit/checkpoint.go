package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"inkan/internal/jws"
	"inkan/scope"
)

// Domain begins the text of every checkpoint, so the first bytes that the
// device signs say that they are a record's head. No signed action begins so, or
// has a line end in it: the signing input of a JWS is base64url and dots.
const Domain = "inkan-record/v1/"

// MaxCheckpoint bounds a signed checkpoint, in bytes.
const MaxCheckpoint = 4 << 10

// Checkpoint is a tree head: what the record held at a moment. Its text is that
// of c2sp.org/tlog-checkpoint, with two extension lines for time and certificate.
type Checkpoint struct {
	Agent       string       `json:"agent"` // SPIFFE ID
	Size        uint64       `json:"size"`  // entries
	Root        scope.Digest `json:"root"`  // of the Merkle tree over them
	Time        time.Time    `json:"time"`  // no entry after these is earlier
	Certificate scope.Digest `json:"certificate"`
}

// Origin names the record in checkpoints: the domain and the agent's SPIFFE ID
// without its scheme.
func (c *Checkpoint) Origin() string { return Domain + strings.TrimPrefix(c.Agent, "spiffe://") }

// Text is what is signed, in its one spelling.
func (c *Checkpoint) Text() string {
	return fmt.Sprintf("%s\n%d\n%s\ntime %s\ncertificate %s\n", c.Origin(), c.Size, base64.StdEncoding.EncodeToString(c.Root[:]),
		c.Time.UTC().Format(scope.TimeFormat), base64.RawURLEncoding.EncodeToString(c.Certificate[:]))
}

// Errors of checkpoints.
var (
	errCheckpoint = errors.New("it is not a checkpoint of a record")
	errOtherKey   = errors.New("the head is signed by another key than its certificate's")
)

// ParseCheckpoint reads a checkpoint's text and refuses any spelling but the
// one of [Checkpoint.Text]. Nothing of it is verified.
func ParseCheckpoint(text string) (*Checkpoint, error) {
	lines := strings.Split(text, "\n")
	if len(text) > MaxCheckpoint || len(lines) != 6 {
		return nil, errCheckpoint
	}
	agent, ok1 := strings.CutPrefix(lines[0], Domain)
	stamp, ok2 := strings.CutPrefix(lines[3], "time ")
	cert, ok3 := strings.CutPrefix(lines[4], "certificate ")
	size, err1 := strconv.ParseInt(lines[1], 10, 64)
	root, err2 := base64.StdEncoding.Strict().DecodeString(lines[2])
	if !ok1 || !ok2 || !ok3 || err1 != nil || size < 0 || err2 != nil || len(root) != tlog.HashSize {
		return nil, errCheckpoint
	}
	c := &Checkpoint{Agent: "spiffe://" + agent, Size: uint64(size), Root: scope.Digest(root)}
	var at scope.Timestamp
	if err := errors.Join(at.UnmarshalText([]byte(stamp)), c.Certificate.UnmarshalText([]byte(cert))); err != nil {
		return nil, fmt.Errorf("%w: %w", errCheckpoint, err)
	}
	c.Time = at.Time
	if !nameable(c.Origin()) || c.Text() != text {
		return nil, errCheckpoint
	}
	return c, nil
}

// nameable says whether a text can be a key's name in a signed note.
func nameable(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == '+' || r > '~' })
}

// Types of signatures in notes (c2sp.org/signed-note).
const (
	noteEd25519 = 0x01
	noteECDSA   = 0x02 // on P-256: DER, over SHA-256
	noteOther   = 0xff // of this project: the form of JOSE
)

// noteKeyID is the four bytes that name a key in a note.
func noteKeyID(name string, key crypto.PublicKey) ([]byte, error) {
	alg, _, err := jws.Algorithm(key)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	switch alg {
	case "ES256": // as others have it: the key alone, without the name
		h.Write(spki)
	case "EdDSA":
		fmt.Fprintf(h, "%s\n%c%s", name, noteEd25519, key.(ed25519.PublicKey))
	default:
		fmt.Fprintf(h, "%s\n", name)
		h.Write([]byte{noteOther})
		fmt.Fprintf(h, "inkan-record/v1 %s\n%s", alg, spki)
	}
	return h.Sum(nil)[:4], nil
}

// VerifierKey returns the text by which others know the key of a record's
// checkpoints (c2sp.org/signed-note, "vkey").
func VerifierKey(agent string, key crypto.PublicKey) (string, error) {
	name := (&Checkpoint{Agent: agent}).Origin()
	id, err := noteKeyID(name, key)
	if err != nil {
		return "", err
	}
	alg, _, err := jws.Algorithm(key)
	if err != nil {
		return "", err
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", err
	}
	material := append([]byte{noteOther}, spki...)
	switch alg {
	case "ES256":
		material[0] = noteECDSA
	case "EdDSA":
		material = append([]byte{noteEd25519}, key.(ed25519.PublicKey)...)
	}
	return fmt.Sprintf("%s+%x+%s", name, id, base64.StdEncoding.EncodeToString(material)), nil
}

// noteSignature turns a signature in the form of JOSE into that of notes, and back.
func noteSignature(key crypto.PublicKey, sig []byte) ([]byte, error) {
	if k, ok := key.(*ecdsa.PublicKey); ok && k.Curve.Params().BitSize == 256 {
		if len(sig) != 64 {
			return nil, jws.ErrSignature
		}
		return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:])})
	}
	return sig, nil
}

func joseSignature(key crypto.PublicKey, sig []byte) ([]byte, error) {
	if k, ok := key.(*ecdsa.PublicKey); ok && k.Curve.Params().BitSize == 256 {
		return jws.FromDER(k, sig)
	}
	return sig, nil
}

// splitNote takes a signed note with exactly one signature apart.
func splitNote(note string) (text, name string, keyID, sig []byte, err error) {
	text, line, ok := strings.Cut(note, "\n\n")
	name, b64, ok2 := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(line, "— "), "\n"), " ")
	raw, err := base64.StdEncoding.Strict().DecodeString(b64)
	if len(note) > MaxCheckpoint || !ok || !ok2 || err != nil || len(raw) < 5 || formatNote(text+"\n", name, raw) != note {
		return "", "", nil, nil, fmt.Errorf("%w: a signed note with one signature is expected", errCheckpoint)
	}
	return text + "\n", name, raw[:4], raw[4:], nil
}

func formatNote(text, name string, raw []byte) string {
	return text + "\n— " + name + " " + base64.StdEncoding.EncodeToString(raw) + "\n"
}

// OpenCheckpoint reads a signed checkpoint without verifying its signature.
func OpenCheckpoint(note string) (*Checkpoint, error) {
	text, name, _, _, err := splitNote(note)
	if err != nil {
		return nil, err
	}
	c, err := ParseCheckpoint(text)
	if err == nil && name != c.Origin() {
		return nil, fmt.Errorf("%w: it is signed in another name than its own", errCheckpoint)
	}
	return c, err
}

// verifyNote verifies that a signed checkpoint is by the key.
func verifyNote(note string, c *Checkpoint, key crypto.PublicKey, alg string) error {
	text, name, id, sig, err := splitNote(note)
	if err != nil {
		return err
	}
	want, err := noteKeyID(name, key)
	if err != nil {
		return err
	}
	if !bytes.Equal(id, want) || name != c.Origin() {
		return errOtherKey
	}
	if sig, err = joseSignature(key, sig); err != nil {
		return fmt.Errorf("the checkpoint's signature: %w", err)
	}
	if err := jws.Verify(key, alg, []byte(text), sig); err != nil {
		return fmt.Errorf("the checkpoint's signature: %w", err)
	}
	return nil
}

// Seal is a head of the record that is to be signed. Only [Log.Seal] makes one,
// of what is on disk, and it is spent once.
type Seal struct {
	checkpoint Checkpoint
	spent      atomic.Bool
}

// Checkpoint returns what the seal says.
func (s *Seal) Checkpoint() Checkpoint { return s.checkpoint }

// Spend returns the exact bytes to sign, once; then [ErrSpent].
func (s *Seal) Spend() ([]byte, error) {
	if s == nil || s.checkpoint.Agent == "" || !s.spent.CompareAndSwap(false, true) {
		return nil, ErrSpent
	}
	return []byte(s.checkpoint.Text()), nil
}

// Seal takes the head of the record for signing: the entries that are on disk,
// and the time, before which no later entry will say it was made.
func (l *Log) Seal(ctx context.Context, id Identity) (*Seal, error) {
	s := &Seal{checkpoint: Checkpoint{Agent: id.Agent, Certificate: id.Certificate}}
	if o := s.checkpoint.Origin(); !strings.HasPrefix(id.Agent, "spiffe://") || !nameable(o) {
		return nil, fmt.Errorf("checkpoint: %.80q cannot name a record", o)
	}
	if r := l.send(ctx, &request{seal: s}); r.err != nil {
		return nil, r.err
	}
	return s, nil
}

// seal fills in a seal after a commit. Only the writer calls it.
func (l *Log) seal(s *Seal) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := l.now().UTC().Truncate(time.Microsecond); now.After(l.head.Time) {
		l.head.Time = now // no later entry is earlier than the checkpoint
	}
	s.checkpoint.Size, s.checkpoint.Root, s.checkpoint.Time = l.head.Size, scope.Digest(l.head.Root), l.head.Time
	if l.head.Size == 0 {
		s.checkpoint.Root = sha256.Sum256(nil) // of the empty tree (RFC 9162, section 2.1.1)
	}
}

// KeepSeal writes a seal's signature, in the form of JOSE, by the key into the
// record, and returns the signed checkpoint. An earlier one of the same size makes way.
func (l *Log) KeepSeal(ctx context.Context, s *Seal, key crypto.PublicKey, signature []byte) (string, error) {
	if s == nil || !s.spent.Load() {
		return "", errors.New("checkpoint: its seal was not signed")
	}
	c := &s.checkpoint
	alg, _, err := jws.Algorithm(key)
	if err != nil {
		return "", err
	}
	id, err := noteKeyID(c.Origin(), key)
	if err != nil {
		return "", err
	}
	sig, err := noteSignature(key, signature)
	if err != nil {
		return "", err
	}
	note := formatNote(c.Text(), c.Origin(), append(id, sig...))
	if err := verifyNote(note, c, key, alg); err != nil {
		return "", err
	}
	return note, l.send(ctx, &request{note: note, counter: c.Size, at: c.Time}).err
}

// LatestCheckpoint returns the latest signed checkpoint that was kept, or nothing.
func (l *Log) LatestCheckpoint(ctx context.Context) (string, error) {
	return latestCheckpoint(ctx, l.db)
}
