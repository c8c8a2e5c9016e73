package scope

import (
	"fmt"
	"slices"
	"time"
)

// DecisionEvent marks an entry of the record that is no action.
const DecisionEvent = "event"

// MaxEvent bounds the text of an event, in bytes.
const MaxEvent = 32 << 10

// Event is a fact that changes what an agent may do, with the exact text of the
// document behind it. It is an entry of the record like an action: numbered,
// chained, in the tree, and never signed by the device. Make one with [NewEvent].
type Event struct {
	kind  Kind
	text  string
	scope *Scope
}

// fact is what an event's text says.
type fact interface {
	// admits says why the event may not follow the entries that the book has
	// seen, under a scope; nil if it may.
	admits(b *Book, s *Scope, st *Statement) *Refusal
	// apply changes the book. It does nothing that needs the scope.
	apply(b *Book, st *Statement)
}

// eventType is an entry of the registry of events.
type eventType struct {
	parse func(text string) (fact, error)
	// lasting: its effect does not end by itself, so a later start must find it
	// however long ago it was. Statements name the last of these (ctl).
	lasting bool
}

// facts is the registry.
var facts = map[Kind]eventType{
	EventKill:        {parseKill, true},
	EventPolicy:      {parsePolicyFact, true},
	EventRearm:       {parseRearmFact, true},
	EventRecovery:    {parseRecovery, false},
	EventAcknowledge: {parseAcknowledge, false},
}

// Events lists the kinds of events, sorted.
func Events() []Kind {
	var out []Kind
	for k := range facts {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// NewEvent makes an event of a registered kind out of its text, which must be
// well-formed. It will stand under the scope of the agent's certificate.
func NewEvent(kind Kind, text string, s *Scope) (*Event, error) {
	if _, err := parseFact(kind, text); err != nil {
		return nil, fmt.Errorf("event: %w", err)
	}
	if s == nil || s.canonical == nil {
		return nil, fmt.Errorf("event: %s: there is no scope for it to stand under", kind)
	}
	return &Event{kind, text, s}, nil
}

// Kind returns the event's kind.
func (e *Event) Kind() Kind { return e.kind }

// Scope returns the scope under which it stands.
func (e *Event) Scope() *Scope { return e.scope }

// On makes a statement, which has everything but a decision, that of the event.
func (e *Event) On(st *Statement) {
	st.Kind, st.Event, st.Decision.Decision = e.kind, e.text, DecisionEvent
}

func parseFact(kind Kind, text string) (fact, error) {
	t, ok := facts[kind]
	switch {
	case !ok:
		return nil, fmt.Errorf("%s is not a kind of event; the kinds are %s", clipped(string(kind)), join(Events()))
	case text == "" || len(text) > MaxEvent:
		return nil, fmt.Errorf("%s: its text has %d bytes, 1 to %d are allowed", kind, len(text), MaxEvent)
	}
	f, err := t.parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kind, err)
	}
	return f, nil
}

// validEvent checks the form of an event's statement and keeps what its text says.
func (s *Statement) validEvent() error {
	d := &s.Decision
	if s.ID != "" || s.Audience != "" || s.Order != nil || s.Payment != nil || s.Party != nil || s.Native != nil ||
		d.Rule != "" || d.Message != "" || d.Notional != nil || d.Reference != nil || len(d.Utilisation) > 0 {
		return fmt.Errorf("statement: an event has act and evt, and nothing of an action")
	}
	f, err := parseFact(s.Kind, s.Event)
	if err != nil {
		return fmt.Errorf("statement: %w", err)
	}
	s.fact = f
	return nil
}

// Admits says why an event may not follow the entries that the book has seen;
// nil if it may. s is the scope under which it stands.
func (b *Book) Admits(s *Scope, st *Statement) *Refusal {
	if st.fact == nil {
		return &Refusal{Rule: RuleForm, Message: "the entry is no event"}
	}
	return st.fact.admits(b, s, st)
}

// Replay counts an entry of the record, of whatever kind. Entries come in their
// order. It decides nothing: what is in a record was decided before.
func (b *Book) Replay(st *Statement) {
	switch st.Decision.Decision {
	case DecisionPermit:
		b.Add(UseOfStatement(st))
	case DecisionDeny:
		if st.trips() {
			b.trip(st)
			b.Pass(st)
		}
	case DecisionEvent:
		if st.fact == nil {
			return // only ParseStatement makes events
		}
		st.fact.apply(b, st)
		b.Pass(st)
	}
}

// Pass counts an entry's place, and nothing that it says: of an event that was refused.
func (b *Book) Pass(st *Statement) { b.lasting = st.lastingUpTo() }

// Lasting is the number of the last event whose effect lasts; 0: there is none.
// The next statement names it.
func (b *Book) Lasting() Counter { return b.lasting }

// OpenSince is the number of the oldest order that is open at a moment and older
// than any window: a start reads the record from there on. 0: there is none. The
// next statement, which is of that moment, names it.
func (b *Book) OpenSince(at time.Time) Counter {
	return b.open.since(at.UnixMicro(), at.Add(-MaxWindow).UnixMicro())
}

// lastingUpTo is the number of the last lasting event up to and including an entry.
func (s *Statement) lastingUpTo() Counter {
	if s.Decision.Decision == DecisionEvent && facts[s.Kind].lasting || s.trips() {
		return s.Counter
	}
	return s.Controls
}

// LastingEvents returns the lasting events of a record up to its last entry, in
// their order. Each names the one before it, so a long record costs nothing; at
// reads the entry with a number.
func LastingEvents(last *Statement, at func(Counter) (*Statement, error)) ([]*Statement, error) {
	var out []*Statement
	before := last.Counter + 1
	for n := last.lastingUpTo(); n != 0; {
		if n >= before {
			return nil, fmt.Errorf("entry %d names the later event %d", before, n)
		}
		st := last
		if n != last.Counter {
			var err error
			if st, err = at(n); err != nil {
				return nil, err
			}
		}
		if st.Counter != n || st.lastingUpTo() != n {
			return nil, fmt.Errorf("entry %d is not the event that a later entry names", n)
		}
		out = append(out, st)
		before, n = n, st.Controls
	}
	slices.Reverse(out)
	return out, nil
}
