package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"inkan/audit"
	"inkan/internal/jws"
	"inkan/journal"
	"inkan/scope"
)

// books holds a signer's journal of signatures against an agent's record: what
// the agent's keys signed must be in it.
type books struct {
	path    string
	signed  map[[32]byte]bool            // signing inputs of permits, hashed
	ak      map[string]bool              // attestation keys that certificates name
	keys    map[string]bool              // action keys
	headers map[scope.Digest]*jws.Header // by certificate, of permits without a signature
	roots   map[uint64]scope.Digest      // of the record's tree, by size
	first   time.Time                    // of the permits
	bad     error
}

// openBooks has verification collect what a journal is held against.
func openBooks(path string, o *audit.VerifyOptions) (*books, error) {
	b := &books{path: path, signed: make(map[[32]byte]bool), ak: make(map[string]bool), keys: make(map[string]bool), headers: make(map[scope.Digest]*jws.Header),
		roots: map[uint64]scope.Digest{0: sha256.Sum256(nil)}}
	// Heads that were signed and not kept are in the journal alone.
	o.Sizes = make(map[uint64]bool)
	if _, err := b.read(journal.Options{Explain: func(journal.Signature) bool { return true }, Message: func(m []byte) {
		if c, err := audit.ParseCheckpoint(string(m)); err == nil {
			o.Sizes[c.Size] = true
		}
	}}); err != nil {
		if _, ok := errors.AsType[*journal.Contradiction](err); !ok { // that is told later
			return nil, err
		}
	}
	o.RootAt = func(size uint64, root scope.Digest) { b.roots[size] = root }
	o.Observe = b.observe
	return b, nil
}

func (b *books) read(o journal.Options) (*journal.Report, error) {
	f, err := os.Open(b.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return journal.Verify(io.Reader(f), o)
}

func (b *books) observe(v *audit.Verified) {
	att := v.Certificate.Attestation
	b.ak[att.AKName], b.keys[att.KeyName] = att.AKName != "", att.KeyName != ""
	if v.Statement.Decision.Decision != scope.DecisionPermit {
		return
	}
	if b.first.IsZero() {
		b.first = v.Statement.Time.Time
	}
	if i := strings.LastIndexByte(v.Entry.JWS, '.'); i >= 0 {
		b.signed[sha256.Sum256([]byte(v.Entry.JWS[:i]))] = true
		return
	}
	// It may have been signed all the same: a crash came before the signature was kept.
	sum := v.Statement.Decision.Certificate
	h := b.headers[sum]
	if h == nil {
		leaf := v.Certificate.Certificate
		alg, _, err := jws.Algorithm(leaf.PublicKey)
		if err == nil {
			h, err = jws.NewHeader(alg, []*x509.Certificate{leaf}, true)
		}
		if err != nil {
			b.bad = err
			return
		}
		b.headers[sum] = h
	}
	b.signed[sha256.Sum256(h.SigningInput(v.Entry.Statement))] = true
}

// explains says whether a signature is in the record, or is the head of it, or
// a certificate request.
func (b *books) explains(agent string) func(journal.Signature) bool {
	return func(s journal.Signature) bool {
		if b.signed[s.Digest] {
			return true
		}
		if c, err := audit.ParseCheckpoint(string(s.Message)); err == nil {
			root, ok := b.roots[c.Size]
			return ok && root == c.Root && c.Agent == agent
		}
		return isRequest(s.Message)
	}
}

// isRequest says whether bytes are a CertificationRequestInfo (RFC 2986, section 4.1).
func isRequest(b []byte) bool {
	var info struct {
		Version    int
		Subject    asn1.RawValue
		PublicKey  asn1.RawValue
		Attributes asn1.RawValue `asn1:"optional,tag:0"`
	}
	rest, err := asn1.Unmarshal(b, &info)
	return err == nil && len(rest) == 0 && info.Version == 0
}

// close verifies the journal and adds its claim to the record's report.
func (b *books) close(r *audit.Report) error {
	if b.bad != nil {
		return b.bad
	}
	delete(b.ak, "")
	delete(b.keys, "")
	claim := audit.Claim{Name: "nothing_off_the_books"}
	if len(b.keys) == 0 || len(b.ak) == 0 {
		claim.Text = "That nothing was signed behind the signer's back: the certificates name no key in a TPM and its attestation key."
		r.Claims = append(r.Claims, claim)
		return nil
	}
	j, err := b.read(journal.Options{AK: b.ak, Keys: b.keys, Explain: b.explains(r.Agent)})
	if err != nil {
		return err
	}
	span := fmt.Sprintf("from %s to %s the TPM made %d signatures, %d by this agent's key", j.From.Format(time.RFC3339), j.Until.Format(time.RFC3339), j.Signatures, j.Own)
	switch {
	case j.From.IsZero():
		claim.Text = "That nothing was signed behind the signer's back: the journal has no testimony of the TPM."
	case len(j.Lost) > 0:
		x := j.Lost[0]
		claim.Text = fmt.Sprintf("That nothing was signed behind the signer's back: %s, all of which are in the record; but it does not testify to %d periods, the first from %s to %s: %s.",
			span, len(j.Lost), x.After.Format(time.RFC3339), x.Before.Format(time.RFC3339), x.Reason)
	case !b.first.IsZero() && b.first.Before(j.From):
		claim.Text = fmt.Sprintf("That nothing was signed behind the signer's back: %s, all of which are in the record; but its testimony begins after the first permit, at %s.", span, b.first.Format(time.RFC3339))
	default:
		claim.Proven = true
		claim.Text = fmt.Sprintf("Nothing was signed behind the signer's back: %s, and all of them are in the record.", span)
		if j.After > 0 {
			claim.Text += fmt.Sprintf(" %d later ones wait for the next testimony.", j.After)
		}
	}
	r.Claims = append(r.Claims, claim)
	return nil
}
