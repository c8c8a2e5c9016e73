package scope

import (
	"slices"
	"time"
)

// Controls is what is in force beside the certificate, as a person sees it.
type Controls struct {
	Kills  []ActiveKill `json:"kills,omitempty"`  // the oldest first
	Policy *PolicyState `json:"policy,omitempty"` // nil: there is none
}

// PolicyState is the policy in effect.
type PolicyState struct {
	Version     uint32    `json:"version"`
	SHA256      Digest    `json:"sha256"`
	Expires     time.Time `json:"expires"`
	Event       Counter   `json:"event"`          // number of its entry
	Error       string    `json:"error,omitzero"` // why only cancels pass: it has ended, or is not one for the certificate
	Description []string  `json:"description"`    // of its scope, in words
}

// Controls returns what is in force at a time, under the scope of a certificate.
func (b *Book) Controls(cert *Scope, at time.Time) *Controls {
	c := &Controls{Kills: slices.Clone(b.kills)}
	if p := b.policy; p != nil {
		c.Policy = &PolicyState{Version: p.doc.Version, SHA256: p.Hash(), Expires: p.doc.Expires, Event: b.policyEvent, Description: p.Describe()}
		if _, r := b.narrow(cert, at); r != nil {
			c.Policy.Error = r.Error()
		}
	}
	return c
}

// Effective returns the scope whose limits hold at a time: that of the policy in
// effect, or the certificate's.
func (b *Book) Effective(cert *Scope, at time.Time) *Scope {
	if b.policy != nil {
		if s, r := b.narrow(cert, at); r == nil {
			return s
		}
	}
	return cert
}
