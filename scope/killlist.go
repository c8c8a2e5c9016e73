package scope

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"inkan/internal/jws"
	"inkan/internal/strictjson"
)

// TypeKillList is the typ of an issuer's list of kills.
const TypeKillList = "agent-kills+jws"

// MaxKills bounds an issuer's list.
const MaxKills = 100

// ErrKillListSize: who reads the list would refuse it, and go on without it.
var ErrKillListSize = fmt.Errorf("kill list: it has more than %d bytes", base64.RawURLEncoding.DecodedLen(jws.MaxPayload))

// KillList is what an issuer stopped, signed by the CA's key like its revocation list.
type KillList struct {
	Number     Counter      `json:"number"` // never less than that of a list before it
	ThisUpdate time.Time    `json:"this_update"`
	NextUpdate time.Time    `json:"next_update"` // there is a newer one by then
	Kills      []IssuedKill `json:"kills"`       // in force
}

// IssuedKill is a kill that an issuer's administrator made.
type IssuedKill struct {
	ID     string    `json:"id"`
	Scope  KillScope `json:"scope"`
	Agent  string    `json:"agent,omitzero"` // SPIFFE ID, of KillAgent; of KillVenue it may be missing: all agents
	Venue  string    `json:"venue,omitzero"`
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
}

// Stops says whether the kill is about an agent.
func (k *IssuedKill) Stops(agent string) bool { return k.Agent == "" || k.Agent == agent }

// Validate says what is wrong with k.
func (k *IssuedKill) Validate() error {
	switch {
	case k.Scope == KillAgent && k.Agent == "", k.Scope == KillFirm && k.Agent != "":
		return errors.New("the scope agent needs an agent, venue may have one, and firm has none")
	case len(k.Agent) > 2048:
		return errors.New("agent: a SPIFFE ID is expected")
	case k.ID == "":
		return errors.New("id is missing")
	}
	return (&Kill{Scope: k.Scope, Venue: k.Venue, Reason: k.Reason, By: "issuer", ID: k.ID}).Validate()
}

// killListHeader is the whole protected header.
type killListHeader struct {
	Alg string `json:"alg"` // that of the CA's key
	Kid Digest `json:"kid"` // SHA-256 of its SubjectPublicKeyInfo
	Typ string `json:"typ"`
}

func publicKeyID(key crypto.PublicKey) (Digest, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	return sha256.Sum256(der), err
}

// Sign has the CA's key sign the list.
func (l *KillList) Sign(key crypto.Signer) (string, error) {
	if err := l.validate(); err != nil {
		return "", fmt.Errorf("kill list: %w", err)
	}
	alg, _, err := jws.Algorithm(key.Public())
	if err != nil {
		return "", err
	}
	id, err := publicKeyID(key.Public())
	if err != nil {
		return "", err
	}
	header, err := strictjson.Marshal(killListHeader{alg, id, TypeKillList})
	if err != nil {
		return "", err
	}
	payload, err := l.payload()
	if err != nil {
		return "", err
	}
	input := []byte(base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(payload))
	signature, err := jws.Sign(key, input)
	if err != nil {
		return "", err
	}
	return jws.Compact(input, signature), nil
}

// Fits says whether the list can be signed: nil, or [ErrKillListSize].
func (l *KillList) Fits() error {
	_, err := l.payload()
	return err
}

func (l *KillList) payload() ([]byte, error) {
	b, err := strictjson.Marshal(l)
	if err == nil && base64.RawURLEncoding.EncodedLen(len(b)) > jws.MaxPayload {
		err = ErrKillListSize
	}
	return b, err
}

func (l *KillList) validate() error {
	switch {
	case len(l.Kills) > MaxKills:
		return fmt.Errorf("%d kills, at most %d are allowed", len(l.Kills), MaxKills)
	case !l.ThisUpdate.Before(l.NextUpdate):
		return errors.New("next_update is not after this_update")
	case l.Number == 0:
		return errors.New("number: 1 or more is expected")
	}
	for i := range l.Kills {
		if err := l.Kills[i].Validate(); err != nil {
			return fmt.Errorf("kill %d: %w", i+1, err)
		}
	}
	return nil
}

// ParseKillList reads a list and verifies that the CA's key signed it.
func ParseKillList(text string, ca crypto.PublicKey) (*KillList, error) {
	l, err := parseKillList(text, ca)
	if err != nil {
		return nil, fmt.Errorf("kill list: %w", err)
	}
	return l, nil
}

func parseKillList(text string, ca crypto.PublicKey) (*KillList, error) {
	var h killListHeader
	m, err := splitDocument(text, &h)
	if err != nil {
		return nil, err
	}
	id, err := publicKeyID(ca)
	switch {
	case err != nil:
		return nil, err
	case h.Typ != TypeKillList:
		return nil, fmt.Errorf("header: typ %.32q, %s is expected", h.Typ, TypeKillList)
	case h.Kid != id:
		return nil, errors.New("header: kid is not the CA's key")
	}
	if err := jws.Verify(ca, h.Alg, m.SigningInput, m.Signature); err != nil {
		return nil, err
	}
	var l KillList
	if err := canonicalDocument(m.Payload, jws.MaxPayload, &l); err != nil {
		return nil, err
	}
	return &l, l.validate()
}
