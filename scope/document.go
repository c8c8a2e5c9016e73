package scope

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"inkan/internal/jws"
	"inkan/internal/strictjson"
)

// Rules of control documents. docs/controls.md lists them.
const (
	RuleControlForm      Rule = "control_form"      // malformed, or not in its one spelling
	RuleControlKey       Rule = "control_key"       // signed by a key that no controller of the scope has
	RuleControlPower     Rule = "control_power"     // the controller may not do this
	RuleControlSignature Rule = "control_signature" // the signature does not verify
	RuleControlAgent     Rule = "control_agent"     // it is for another agent
	RuleControlTime      Rule = "control_time"      // it is not valid yet, or not any more
)

// documentSkew is how far ahead the clock of whoever signs a document may be.
const documentSkew = time.Minute

// signed is a control document taken apart: a JWS in compact serialisation,
// ES256, whose payload is canonical JSON. Nothing of it is verified.
type signed struct {
	text    string
	key     Digest // of who says it signed
	message *jws.Message
}

// documentHeader is the whole protected header.
type documentHeader struct {
	Alg string `json:"alg"` // ES256
	Kid Digest `json:"kid"` // SHA-256 of the SubjectPublicKeyInfo
	Typ string `json:"typ"`
}

// parseSigned reads a document of a type and its payload into v.
func parseSigned(text, typ string, max int, v any) (*signed, error) {
	if len(text) > MaxEvent {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(text), MaxEvent)
	}
	var h documentHeader
	m, err := splitDocument(text, &h)
	if err != nil {
		return nil, err
	}
	if h.Typ != typ || h.Alg != "ES256" {
		return nil, fmt.Errorf("header: typ %.32q with alg %.16q, %s with ES256 is expected", h.Typ, h.Alg, typ)
	}
	if err := canonicalDocument(m.Payload, max, v); err != nil {
		return nil, err
	}
	return &signed{text: text, key: h.Kid, message: m}, nil
}

// splitDocument takes a JWS apart and reads its whole protected header, which
// must be in its one spelling.
func splitDocument(text string, header any) (*jws.Message, error) {
	m, err := jws.Split([]byte(text))
	if err != nil {
		return nil, err
	}
	raw, err := m.RawHeader()
	if err != nil {
		return nil, err
	}
	if err := canonicalDocument(raw, 512, header); err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	return m, nil
}

// sum is the SHA-256 of the document as it is written.
func (d *signed) sum() Digest { return sha256.Sum256([]byte(d.text)) }

// by verifies that a controller of the scope signed the document, one who may.
func (d *signed) by(s *Scope, power Power) (*Controller, *Refusal) {
	c := s.controller(d.key)
	switch {
	case c == nil:
		return nil, &Refusal{Rule: RuleControlKey, Value: base64.RawURLEncoding.EncodeToString(d.key[:]), Message: "the document is signed by a key that is none of the controllers' in the agent's scope"}
	case subset("", c.May, []Power{power}) != nil:
		return nil, &Refusal{Rule: RuleControlPower, Value: c.Name, Limit: join(c.May), Message: fmt.Sprintf("controller %s may not %s; it may: %s", c.Name, power, join(c.May))}
	}
	if err := jws.Verify(c.public, "ES256", d.message.SigningInput, d.message.Signature); err != nil {
		return nil, &Refusal{Rule: RuleControlSignature, Value: c.Name, Message: fmt.Sprintf("the document is not signed by controller %s: %v", c.Name, err)}
	}
	return c, nil
}

// canonicalDocument reads JSON that must be in its one spelling.
func canonicalDocument(b []byte, max int, v any) error {
	if err := strictjson.Unmarshal(b, max, v); err != nil {
		return err
	}
	again, err := strictjson.Marshal(v)
	if err != nil {
		return err
	}
	if string(again) != string(b) {
		return errors.New("it is not in canonical form (RFC 8785)")
	}
	return nil
}

// validity is what documents say of themselves.
type validity struct {
	Agent   string    `json:"agent"`  // SPIFFE ID
	Issued  time.Time `json:"issued"` // UTC, whole seconds
	Expires time.Time `json:"expires"`
}

func (v *validity) validate(most time.Duration) error {
	for name, t := range map[string]time.Time{"issued": v.Issued, "expires": v.Expires} {
		if t.Location() != time.UTC || t.Nanosecond() != 0 || t.Year() < 2000 || t.Year() > 9999 {
			return fmt.Errorf("%s: whole seconds in UTC are expected, such as 2026-07-27T09:30:00Z", name)
		}
	}
	switch d := v.Expires.Sub(v.Issued); {
	case v.Agent == "" || len(v.Agent) > 2048:
		return errors.New("agent: a SPIFFE ID is expected")
	case d <= 0:
		return errors.New("expires is not after issued")
	case d > most:
		return fmt.Errorf("it is valid for %s, at most %s is allowed", d, most)
	}
	return nil
}

// holds says why the document is not one for an agent at a time.
func (v *validity) holds(agent string, at time.Time) *Refusal {
	switch {
	case v.Agent != agent:
		return &Refusal{Rule: RuleControlAgent, Value: v.Agent, Limit: agent, Message: fmt.Sprintf("the document is for %.200s, not for %.200s", v.Agent, agent)}
	case at.Before(v.Issued.Add(-documentSkew)):
		return &Refusal{Rule: RuleControlTime, Value: at.UTC().Format(time.RFC3339), Limit: v.Issued.Format(time.RFC3339), Message: "the document is valid from " + v.Issued.Format(time.RFC3339) + " on"}
	case !at.Before(v.Expires):
		return &Refusal{Rule: RuleControlTime, Value: at.UTC().Format(time.RFC3339), Limit: v.Expires.Format(time.RFC3339), Message: "the document expired at " + v.Expires.Format(time.RFC3339)}
	}
	return nil
}

// signDocument has a key sign a document, which was built and validated by its caller.
func signDocument(key crypto.Signer, typ string, v any) (string, error) {
	public, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return "", errors.New("a controller's key is on P-256")
	}
	id, err := KeyID(public)
	if err != nil {
		return "", err
	}
	header, err := strictjson.Marshal(documentHeader{Alg: "ES256", Kid: id, Typ: typ})
	if err != nil {
		return "", err
	}
	payload, err := strictjson.Marshal(v)
	if err != nil {
		return "", err
	}
	input := []byte(base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload))
	signature, err := jws.Sign(key, input)
	if err != nil {
		return "", err
	}
	if err := jws.Verify(public, "ES256", input, signature); err != nil {
		return "", fmt.Errorf("the key's signature is wrong: %w", err)
	}
	return jws.Compact(input, signature), nil
}
