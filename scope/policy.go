package scope

import (
	"crypto"
	"errors"
	"fmt"
	"time"

	"inkan/internal/strictjson"
)

// TypePolicy is the typ of a policy.
const TypePolicy = "agent-policy+jws"

// EventPolicy is the event by which a policy takes effect.
const EventPolicy Kind = "control.policy"

// Rules of policies.
const (
	RulePolicyWider   Rule = "policy_wider"   // it allows something that the certificate does not
	RulePolicyVersion Rule = "policy_version" // one with this version or a later one is in effect
	RulePolicyExpired Rule = "policy_expired" // the policy in effect ended, and no other took its place
)

// maxPolicyLife bounds how long a policy is valid.
const maxPolicyLife = 7 * 24 * time.Hour

// Policy narrows an agent's scope for a time. Make one with [ParsePolicy].
type Policy struct {
	doc    policyDocument
	signed *signed
}

type policyDocument struct {
	validity
	Version uint32   `json:"version"`
	Scope   document `json:"scope"`
}

// SignPolicy has a controller's key sign a policy with a scope, which has neither
// controllers nor an os section: those are the certificate's.
func SignPolicy(key crypto.Signer, agent string, version uint32, s *Scope, issued, expires time.Time) (string, error) {
	d := policyDocument{validity: validity{agent, issued, expires}, Version: version, Scope: s.doc}
	if err := d.validate(); err != nil {
		return "", fmt.Errorf("policy: %w", err)
	}
	return signDocument(key, TypePolicy, &d)
}

func (d *policyDocument) validate() error {
	switch {
	case d.Version == 0:
		return errors.New("version: 1 or more is expected")
	case d.Scope.Controllers != nil || d.Scope.OS != nil:
		return errors.New("scope: a policy has neither controllers nor os, those of the certificate hold: leave them out")
	}
	return d.validity.validate(maxPolicyLife)
}

// ParsePolicy reads a policy. Its signature is not verified, nor that it is
// narrower than a certificate: see [Policy.Within].
func ParsePolicy(text string) (*Policy, error) {
	p := &Policy{}
	var err error
	if p.signed, err = parseSigned(text, TypePolicy, MaxScope+4096, &p.doc); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if err := p.doc.validate(); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	before, err := strictjson.Marshal(&p.doc)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	s, err := compile(p.doc.Scope)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	p.doc.Scope = s.doc
	if after, err := strictjson.Marshal(&p.doc); err != nil || string(after) != string(before) {
		return nil, errors.New("policy: its scope is not in canonical form")
	}
	return p, nil
}

// Text returns the policy as it is written.
func (p *Policy) Text() string { return p.signed.text }

// Hash is the SHA-256 of the policy as it is written.
func (p *Policy) Hash() Digest { return p.signed.sum() }

// Agent is the SPIFFE ID of the agent whose policy it is.
func (p *Policy) Agent() string { return p.doc.Agent }

// Version is higher than that of every policy before it.
func (p *Policy) Version() uint32 { return p.doc.Version }

// Expires is when the policy ends.
func (p *Policy) Expires() time.Time { return p.doc.Expires }

// Holds says why the policy is not in force for an agent at a time; nil if it is.
func (p *Policy) Holds(agent string, at time.Time) *Refusal { return p.doc.holds(agent, at) }

// Within verifies that a controller of a certificate's scope signed the policy,
// and that it only narrows that scope. It returns what the two allow together: the
// policy's scope with the certificate's controllers and os section.
func (p *Policy) Within(cert *Scope) (*Scope, *Refusal) {
	if _, r := p.signed.by(cert, MayPolicy); r != nil {
		return nil, r
	}
	d := p.doc.Scope
	d.Controllers, d.OS = cert.doc.Controllers, cert.doc.OS
	b, err := strictjson.Marshal(&d)
	if err != nil {
		return nil, &Refusal{Rule: RuleControlForm, Message: err.Error()}
	}
	s, err := Parse(b) // a copy, since compiling sorts
	if err != nil {
		return nil, &Refusal{Rule: RuleControlForm, Message: "the policy with the certificate's controllers and os: " + err.Error()}
	}
	if err := Contains(cert, s); err != nil {
		return nil, &Refusal{Rule: RulePolicyWider, Message: "the policy is wider than the certificate: " + err.Error()}
	}
	return s, nil
}

// Describe returns what the policy's scope allows, in plain sentences.
func (p *Policy) Describe() []string {
	s, err := compile(p.doc.Scope)
	if err != nil {
		return nil // ParsePolicy has compiled it
	}
	return s.Describe()
}

func parsePolicyFact(text string) (fact, error) { return ParsePolicy(text) }

func (p *Policy) admits(b *Book, s *Scope, st *Statement) *Refusal {
	if _, r := p.Within(s); r != nil {
		return r
	}
	if r := p.Holds(st.Agent, st.Time.Time); r != nil {
		return r
	}
	if b.policy != nil && p.doc.Version <= b.policy.doc.Version {
		return &Refusal{Rule: RulePolicyVersion, Value: fmt.Sprint(p.doc.Version), Limit: fmt.Sprint(b.policy.doc.Version),
			Message: fmt.Sprintf("the policy has version %d, and %d is in effect: a later one must have a higher version", p.doc.Version, b.policy.doc.Version)}
	}
	return nil
}

func (p *Policy) apply(b *Book, st *Statement) {
	b.policy, b.policyEvent, b.narrowed = p, st.Counter, narrowed{}
}

// Policy returns the policy in effect, expired or not; nil: there is none.
func (b *Book) Policy() *Policy { return b.policy }

// narrowed remembers what the policy makes of one certificate's scope.
type narrowed struct {
	of      Digest
	scope   *Scope
	refusal *Refusal
}

// narrow returns what the policy in effect leaves of a certificate's scope at a time.
func (b *Book) narrow(cert *Scope, at time.Time) (*Scope, *Refusal) {
	if n := &b.narrowed; n.of != cert.hash {
		s, r := b.policy.Within(cert)
		*n = narrowed{cert.hash, s, r}
	}
	if b.narrowed.refusal != nil {
		return nil, b.narrowed.refusal
	}
	if end := b.policy.doc.Expires; !at.Before(end) {
		return nil, &Refusal{Rule: RulePolicyExpired, Limit: end.Format(time.RFC3339), Value: at.UTC().Format(time.RFC3339),
			Message: fmt.Sprintf("policy %d ended at %s, and only cancels pass until a later one is in effect", b.policy.doc.Version, end.Format(time.RFC3339))}
	}
	return b.narrowed.scope, nil
}

// Grounds are what a permit was checked against, to stand in its statement.
type Grounds struct {
	Utilisation []Utilisation
	Policy      *Digest         // SHA-256 of the policy that it was checked against; nil: there is none, or it is a cancel
	Reference   *ReferencePrice // that it was checked against
}

// Decide says what the entries that the book has seen make of one more permit
// at a time: a kill, the policy in effect, and the limits over time of certificate
// and policy. It changes nothing. p was checked for that time.
func (b *Book) Decide(p *Permit, at time.Time) (*Grounds, *Refusal) {
	u := UseOf(p, at)
	if r := b.killed(u.Kind, u.Audience); r != nil {
		return nil, r
	}
	out := &Grounds{Reference: p.UsedReference()}
	limits := p.scope
	if b.policy != nil && !u.Kind.reducesRisk() {
		n, r := b.narrow(p.scope, at)
		if r != nil {
			return nil, r
		}
		limits = n
		env := p.env
		env.Now = at
		under, r := check(limits, p.action, env)
		if r != nil {
			return nil, r
		}
		sum := b.policy.Hash()
		out.Policy, out.Reference = &sum, under.UsedReference()
		narrow := UseOf(under, at)
		if r := b.Check(limits, narrow); r != nil {
			return nil, r
		}
		if r := b.Check(p.scope, u); r != nil {
			return nil, r
		}
		out.Utilisation = b.Utilisation(limits, narrow)
		return out, nil
	}
	if r := b.Check(p.scope, u); r != nil {
		return nil, r
	}
	out.Utilisation = b.Utilisation(limits, u)
	return out, nil
}
