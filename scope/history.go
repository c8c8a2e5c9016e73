package scope

import (
	"encoding/json"
	"errors"
	"fmt"

	"inkan/internal/strictjson"
)

// MaxHistory bounds a history, in bytes.
const MaxHistory = 16 << 20

// History is what was asked for and what happened, in its order: the form of the
// vectors of limits over time. docs/scope.md describes it.
type History struct {
	Steps []Step `json:"steps"`
}

// Step is one action, acknowledgement or re-arm; exactly one is set.
type Step struct {
	At        Timestamp       `json:"at"` // not before the step before it
	Action    json.RawMessage `json:"action,omitzero"`
	Reference *ReferencePrice `json:"reference,omitzero"` // for the action
	Ended     json.RawMessage `json:"acknowledge,omitzero"`
	Rearm     Counter         `json:"rearm,omitzero"` // number of the step whose refusal disabled
}

// Outcome is what became of a step.
type Outcome struct {
	Refusal     *Refusal      // nil: it was permitted, or took effect
	Utilisation []Utilisation // after a permitted action
}

// ParseHistory reads a history in JSON, strictly. Its actions are read when it is played.
func ParseHistory(b []byte) (*History, error) {
	var h History
	if err := strictjson.Unmarshal(b, MaxHistory, &h); err != nil {
		return nil, fmt.Errorf("history: %w", err)
	}
	for i, x := range h.Steps {
		n := 0
		for _, set := range []bool{x.Action != nil, x.Ended != nil, x.Rearm != 0} {
			if set {
				n++
			}
		}
		if n != 1 {
			return nil, fmt.Errorf("history: step %d: one of action, acknowledge and rearm is expected", i+1)
		}
		if i > 0 && x.At.Time.Before(h.Steps[i-1].At.Time) {
			return nil, fmt.Errorf("history: step %d is earlier than the step before it", i+1)
		}
	}
	return &h, nil
}

// Play decides each step as a signer would that has seen those before it, with
// fresh evidence, and returns the book after the last one.
func (h *History) Play(s *Scope) (*Book, []Outcome, error) {
	b := NewBook()
	var out []Outcome
	for i, x := range h.Steps {
		n := Counter(i + 1)
		o, err := b.step(s, n, &x)
		if err != nil {
			return nil, nil, fmt.Errorf("history: step %d: %w", n, err)
		}
		out = append(out, o)
	}
	return b, out, nil
}

func (b *Book) step(s *Scope, n Counter, x *Step) (o Outcome, err error) {
	st := &Statement{Counter: n, Time: x.At}
	switch {
	case x.Rearm != 0:
		if !b.tripped(x.Rearm) {
			return o, fmt.Errorf("step %d disabled nothing", x.Rearm)
		}
		b.enable(x.Rearm)
	case x.Ended != nil:
		k, err := ParseAcknowledgement(x.Ended)
		if err != nil {
			return o, err
		}
		if o.Refusal = k.admits(b, s, st); o.Refusal == nil {
			k.apply(b, st)
		}
	default:
		a, err := ParseAction(x.Action)
		if err != nil {
			return o, err
		}
		st.ID, st.Audience, st.Kind, st.Order, st.Payment, st.Party, st.Native = a.ID, a.Audience, a.Kind, a.Order, a.Payment, a.Party, a.Native
		o = b.decide(s, a, Env{Now: x.At.Time, AttestedAt: x.At.Time, Reference: x.Reference}, st)
		b.Replay(st)
	}
	return o, nil
}

// decide fills in what became of an action.
func (b *Book) decide(s *Scope, a *Action, env Env, st *Statement) (o Outcome) {
	deny := func(r *Refusal) Outcome {
		st.Decision = Decision{Decision: DecisionDeny, Rule: r.Rule, Key: r.Key, Message: r.Message}
		return Outcome{Refusal: r}
	}
	p, err := Check(s, a, env)
	if r, ok := errors.AsType[*Refusal](err); ok {
		return deny(r)
	}
	u := UseOf(p, env.Now)
	if r := b.Check(s, u); r != nil {
		return deny(r)
	}
	st.Decision = Decision{Decision: DecisionPermit}
	if amount, currency, ok := p.Notional(); ok {
		st.Decision.Notional = &Amount{amount, currency}
	}
	if ref := p.UsedReference(); ref != nil {
		st.Decision.Reference = &Reference{Price: ref.Price, Currency: ref.Currency, Source: ref.Source, Time: Timestamp{ref.Time}}
	}
	return Outcome{Utilisation: b.Utilisation(s, u)}
}
