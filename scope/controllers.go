package scope

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Power is something that a controller may do.
type Power string

// The powers. Each is over one kind of control document.
const (
	MayApprove  Power = "approve"  // authorize an action above human_approval_above
	MayOverride Power = "override" // lift a soft limit for one action (RTS 6, Article 15(6))
	MayPolicy   Power = "policy"   // narrow the scope for a time
	MayRearm    Power = "rearm"    // end a kill (RTS 6, Article 15(3))
)

var powers = []Power{MayApprove, MayOverride, MayPolicy, MayRearm}

// maxControllers bounds the list: each has a key in the certificate.
const maxControllers = 16

// Controller is a human role with a key of its own, which is neither the
// agent's nor the signer's. It stands in the certificate, so whoever has that can verify
// what the role signs.
type Controller struct {
	Name string  `json:"name"`
	Key  string  `json:"key"` // SubjectPublicKeyInfo of a key on P-256, DER in base64url
	May  []Power `json:"may"`

	public *ecdsa.PublicKey
	id     Digest
}

// KeyID names a public key: the SHA-256 of its SubjectPublicKeyInfo.
func KeyID(key *ecdsa.PublicKey) (Digest, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return Digest{}, err
	}
	return sha256.Sum256(der), nil
}

// ControllerKey returns a public key as the controllers of a scope state it. It must be on P-256.
func ControllerKey(key *ecdsa.PublicKey) (string, error) {
	if key.Curve != elliptic.P256() {
		return "", errors.New("a key on P-256 is expected")
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	return base64.RawURLEncoding.EncodeToString(der), err
}

func (d *document) validateControllers() error {
	if len(d.Controllers) > maxControllers {
		return fmt.Errorf("controllers: %d entries, at most %d are allowed", len(d.Controllers), maxControllers)
	}
	slices.SortFunc(d.Controllers, func(a, b Controller) int { return strings.Compare(a.Name, b.Name) })
	for i := range d.Controllers {
		c := &d.Controllers[i]
		if !validText(c.Name) {
			return fmt.Errorf("controllers: name %s: printable ASCII without spaces is expected", clipped(c.Name))
		}
		if err := c.parseKey(); err != nil {
			return fmt.Errorf("controllers: key of %s: %w", c.Name, err)
		}
		if err := set("controllers: may of "+c.Name, c.May, func(p Power) bool { return slices.Contains(powers, p) }, "one of "+join(powers)); err != nil {
			return err
		}
		if len(c.May) == 0 {
			return fmt.Errorf("controllers: %s may do nothing: give may, of %s", c.Name, join(powers))
		}
		for _, other := range d.Controllers[:i] {
			if other.Name == c.Name || other.id == c.id {
				return fmt.Errorf("controllers: %s and %s have one name or one key", other.Name, c.Name)
			}
		}
	}
	return nil
}

func (c *Controller) parseKey() error {
	want := errors.New("the SubjectPublicKeyInfo of a key on P-256 in base64url without padding is expected")
	der, err := base64.RawURLEncoding.Strict().DecodeString(c.Key)
	if err != nil || strings.ContainsAny(c.Key, "\r\n") {
		return want
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return want
	}
	public, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return want
	}
	if again, err := ControllerKey(public); err != nil || again != c.Key {
		return want
	}
	c.public, c.id = public, sha256.Sum256(der)
	return nil
}

// controller returns the one with a key.
func (s *Scope) controller(id Digest) *Controller {
	for i := range s.doc.Controllers {
		if c := &s.doc.Controllers[i]; c.id == id {
			return c
		}
	}
	return nil
}

// containsControllers: the inner scope has nobody who may do more than in the outer one.
func containsControllers(outer, inner []Controller) *Wider {
	for _, c := range inner {
		if !slices.ContainsFunc(outer, func(o Controller) bool {
			return o.Name == c.Name && o.id == c.id && subset("", o.May, c.May) == nil
		}) {
			return &Wider{"controllers", c.Name + " is none of them, or may do more"}
		}
	}
	return nil
}
