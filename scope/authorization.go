package scope

import (
	"crypto"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"time"
)

// TypeAuthorization is the typ of an authorization.
const TypeAuthorization = "agent-authorization+jws"

// Rules of authorizations.
const (
	RuleApproval            Rule = "human_approval_above" // above the amount, and no controller has approved it
	RuleAuthorizationAction Rule = "authorization_action" // it is for another action
	RuleAuthorizationHard   Rule = "authorization_hard"   // the limit is hard, or none that can be lifted
	RuleAuthorizationTwice  Rule = "authorization_twice"  // two lift the same limit
)

// maxAuthorizations bounds how many go with an action, and maxAuthorized their life.
const (
	maxAuthorizations  = 4
	maxAuthorization   = 2 << 10 // bytes of a payload
	maxAuthorizedFor   = 24 * time.Hour
	maxAuthorizedBytes = 4 << 10 // of the whole document
)

// liftable are the limits that may have block: soft, and the approval of a person.
var liftable = []Rule{RuleOrderQty, RuleOrderNotional, RuleCollar, RuleApproval, RuleNotionalWindow, RuleQtyWindow, RuleOrdersWindow, RuleMessagesWindow,
	RuleCollarWindow, RuleInstrumentCount, RuleVenueCount, RuleOpenOrders, RuleOpenNotional}

// Authorization lets one action pass one limit: a controller lifts a soft limit,
// or approves an action above human_approval_above.
type Authorization struct {
	validity
	Action Digest `json:"action"` // SHA-256 of the action's canonical JSON, its id included
	Rule   Rule   `json:"rule"`   // the limit
	Reason string `json:"reason"`

	signed *signed
}

func (a *Authorization) validate() error {
	if err := a.validity.validate(maxAuthorizedFor); err != nil {
		return err
	}
	if !slices.Contains(liftable, a.Rule) {
		return fmt.Errorf("rule %s: one of %s is expected", clipped(string(a.Rule)), join(liftable))
	}
	if !validSentence(a.Reason) {
		return fmt.Errorf("reason: 1 to %d bytes of printable text are expected", maxReason)
	}
	return nil
}

// SignAuthorization has a controller's key sign an authorization of an action for
// the limit that a rule names.
func SignAuthorization(key crypto.Signer, agent string, action *Action, rule Rule, reason string, issued, expires time.Time) (string, error) {
	b, err := action.Canonical()
	if err != nil {
		return "", err
	}
	a := &Authorization{validity: validity{agent, issued, expires}, Action: sha256.Sum256(b), Rule: rule, Reason: reason}
	if err := a.validate(); err != nil {
		return "", fmt.Errorf("authorization: %w", err)
	}
	return signDocument(key, TypeAuthorization, a)
}

// ParseAuthorization reads an authorization. Its signature is not verified.
func ParseAuthorization(text string) (*Authorization, error) {
	var a Authorization
	if len(text) > maxAuthorizedBytes {
		return nil, fmt.Errorf("authorization: %d bytes, at most %d are allowed", len(text), maxAuthorizedBytes)
	}
	d, err := parseSigned(text, TypeAuthorization, maxAuthorization, &a)
	if err != nil {
		return nil, fmt.Errorf("authorization: %w", err)
	}
	a.signed = d
	if err := a.validate(); err != nil {
		return nil, fmt.Errorf("authorization: %w", err)
	}
	return &a, nil
}

func parseAuthorizations(list []string) ([]*Authorization, error) {
	if len(list) > maxAuthorizations {
		return nil, fmt.Errorf("%d authorizations, at most %d are allowed", len(list), maxAuthorizations)
	}
	var out []*Authorization
	for _, text := range list {
		a, err := ParseAuthorization(text)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// authorize verifies what goes with the action, and keeps it. It holds whether
// or not a limit is in the way: what stands in a statement is true.
func (p *Permit) authorize() *Refusal {
	if len(p.env.Authorizations) == 0 {
		return nil
	}
	list, err := parseAuthorizations(p.env.Authorizations)
	if err != nil {
		return &Refusal{Rule: RuleControlForm, Message: err.Error()}
	}
	b, err := p.action.Canonical()
	if err != nil {
		return &Refusal{Rule: RuleForm, Message: err.Error()}
	}
	sum := Digest(sha256.Sum256(b))
	for i, a := range list {
		power := MayOverride
		if a.Rule == RuleApproval {
			power = MayApprove
		}
		if _, r := a.signed.by(p.scope, power); r != nil {
			return r
		}
		if r := a.holds(p.env.Agent, p.env.Now); r != nil {
			return r
		}
		if a.Action != sum {
			return &Refusal{Rule: RuleAuthorizationAction, Message: "the authorization is for another action: it names the SHA-256 of the action's canonical JSON, the id included"}
		}
		if slices.ContainsFunc(list[:i], func(x *Authorization) bool { return x.Rule == a.Rule }) {
			return &Refusal{Rule: RuleAuthorizationTwice, Value: string(a.Rule), Message: fmt.Sprintf("two authorizations lift %s", a.Rule)}
		}
		p.lifts = append(p.lifts, a.Rule)
	}
	return nil
}

// lift turns a refusal by a soft limit into none if that was authorized; a hard
// one stays, and says that it is hard.
func lift(rules []Rule, r *Refusal) *Refusal {
	switch {
	case r == nil || !slices.Contains(rules, r.Rule):
		return r
	case r.Block == Soft:
		return nil
	}
	hard := *r
	hard.Rule, hard.Message = RuleAuthorizationHard, fmt.Sprintf("%s: no authorization lifts this: %s", r.Rule, r.Message)
	return &hard
}

// checkApproval: above an amount a person approves the action.
func (p *Permit) checkApproval() *Refusal {
	if p.currency == "" {
		return nil
	}
	for _, m := range p.scope.doc.Approval {
		if m.Currency == p.currency && p.notional.Cmp(m.Amount) > 0 {
			r := exceeds(RuleApproval, "", "the notional", p.notional, m.Amount, m.Currency)
			r.Message += ", without the approval of a controller"
			r.Block = Soft
			return r
		}
	}
	return nil
}

// Threshold is an amount in one currency.
type Threshold struct {
	Currency string  `json:"currency"`
	Amount   Decimal `json:"amount"`
}

func (d *document) validateApproval() error {
	if len(d.Approval) > maxEntries {
		return fmt.Errorf("human_approval_above: %d entries, at most %d are allowed", len(d.Approval), maxEntries)
	}
	sortBy(d.Approval, func(a, b Threshold) int { return strings.Compare(a.Currency, b.Currency) })
	for i, m := range d.Approval {
		switch {
		case !validCurrency(m.Currency):
			return fmt.Errorf("human_approval_above: currency %s: an ISO 4217 code or a DTI is expected", clipped(m.Currency))
		case m.Amount.Sign() < 0:
			return fmt.Errorf("human_approval_above: amount %s is negative", m.Amount)
		case i > 0 && d.Approval[i-1].Currency == m.Currency:
			return fmt.Errorf("human_approval_above: %s stands twice", m.Currency)
		}
	}
	return nil
}

// containsApproval: above each of outer's amounts the inner scope asks a person too.
func containsApproval(o, i *document) *Wider {
	for _, l := range o.Approval {
		trades := slices.ContainsFunc(i.OrderNotional, func(m MoneyLimit) bool { return m.Currency == l.Currency })
		if trades && !slices.ContainsFunc(i.Approval, func(x Threshold) bool { return x.Currency == l.Currency && x.Amount.Cmp(l.Amount) <= 0 }) {
			return &Wider{RuleApproval, fmt.Sprintf("at most %s %s is allowed", l.Amount, l.Currency)}
		}
	}
	return nil
}
