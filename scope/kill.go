package scope

import (
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"inkan/internal/strictjson"
)

// Events of the kill function (RTS 6, Article 12).
const (
	EventKill  Kind = "control.kill"
	EventRearm Kind = "control.rearm"
)

// TypeRearm is the typ of a document that ends a kill.
const TypeRearm = "agent-rearm+jws"

// Rules of the kill function.
const (
	RuleKill         Rule = "kill"          // a kill is in force, and this is no cancel
	RuleKillKnown    Rule = "kill_known"    // the issuer's kill was taken over before
	RuleRearmUnknown Rule = "rearm_unknown" // nothing that this entry stopped is stopped now
)

// KillScope says what a kill stops.
type KillScope string

// What a kill stops: one agent, what agents do at one venue, or all agents of a firm.
const (
	KillAgent KillScope = "agent"
	KillVenue KillScope = "venue"
	KillFirm  KillScope = "firm"
)

// Kill stops an agent. While it is in force only cancels pass.
type Kill struct {
	Scope  KillScope `json:"scope"`
	Venue  string    `json:"venue,omitzero"` // of KillVenue: a MIC, or lei: and an LEI
	Reason string    `json:"reason"`
	By     string    `json:"by"`          // who, as the signer knows it
	ID     string    `json:"id,omitzero"` // in the issuer's list; empty: it was made at the signer
}

// maxReason bounds what a person gives as a reason, in bytes.
const maxReason = 256

// Validate says what is wrong with k.
func (k *Kill) Validate() error {
	switch {
	case k.Scope != KillAgent && k.Scope != KillVenue && k.Scope != KillFirm:
		return fmt.Errorf("scope %s: agent, venue or firm is expected", clipped(string(k.Scope)))
	case (k.Scope == KillVenue) != (k.Venue != ""):
		return errors.New("the scope venue needs a venue, and no other scope has one")
	case k.Venue != "" && !validVenue(k.Venue):
		return fmt.Errorf("venue %s: a MIC such as XPAR, or lei: and an LEI, is expected", clipped(k.Venue))
	case k.ID != "" && !validText(k.ID):
		return errors.New("id: printable ASCII without spaces is expected")
	case !validSentence(k.By):
		return fmt.Errorf("by: 1 to %d bytes of printable text are expected", maxReason)
	case !validSentence(k.Reason):
		return fmt.Errorf("reason: 1 to %d bytes of printable text are expected", maxReason)
	}
	return nil
}

// validSentence: text for a person, without control characters.
func validSentence(s string) bool {
	return strings.TrimSpace(s) != "" && len(s) <= maxReason && strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\u2028' || r == '\u2029' }) < 0
}

// Event returns the kill as an event.
func (k *Kill) Event(s *Scope) (*Event, error) {
	b, err := strictjson.Marshal(k)
	if err != nil {
		return nil, err
	}
	return NewEvent(EventKill, string(b), s)
}

func parseKill(text string) (fact, error) {
	var k Kill
	if err := canonicalDocument([]byte(text), MaxEvent, &k); err != nil {
		return nil, err
	}
	return &k, k.Validate()
}

// admits: whoever stops something may always do so. What the issuer stopped is
// taken over once: it stays in the issuer's list after a re-arm.
func (k *Kill) admits(b *Book, _ *Scope, _ *Statement) *Refusal {
	if k.ID != "" && b.issued[k.ID] {
		return &Refusal{Rule: RuleKillKnown, Value: k.ID, Message: "the issuer's kill " + k.ID + " was taken over before"}
	}
	return nil
}

func (k *Kill) apply(b *Book, st *Statement) {
	b.kills = append(b.kills, ActiveKill{*k, st.Counter, st.Time})
	if k.ID != "" {
		b.issued[k.ID] = true
	}
}

// ActiveKill is a kill that is in force.
type ActiveKill struct {
	Kill
	Event Counter   `json:"event"` // number of its entry
	Since Timestamp `json:"since"`
}

// stops says whether the kill stops what is sent to a venue.
func (k *Kill) stops(venue string) bool { return k.Scope != KillVenue || k.Venue == venue }

// Kills returns the kills that are in force, the oldest first.
func (b *Book) Kills() []ActiveKill { return b.kills }

// killed refuses what a kill in force stops (rule G7: never a cancel).
func (b *Book) killed(kind Kind, venue string) *Refusal {
	if kind.reducesRisk() {
		return nil
	}
	for i := range b.kills {
		if k := &b.kills[i]; k.stops(venue) {
			return &Refusal{Rule: RuleKill, Value: k.Venue, Message: fmt.Sprintf("stopped since %s by %s: %s; only cancels pass until event %d is re-armed", k.Since.Time.Format(TimeFormat), k.By, k.Reason, k.Event)}
		}
	}
	return nil
}

// maxRearmLife bounds how long a re-arm document is valid.
const maxRearmLife = 24 * time.Hour

// Rearm ends one kill, or what one refusal by the throttle disabled. It names the
// number of that entry, so it is used once.
type Rearm struct {
	validity
	Entry  Counter `json:"entry"`
	Reason string  `json:"reason"`

	signed *signed
}

func (r *Rearm) validate() error {
	switch {
	case r.Entry == 0:
		return errors.New("entry: the number of the kill in the record, or of the throttle's refusal, is expected")
	case !validSentence(r.Reason):
		return fmt.Errorf("reason: 1 to %d bytes of printable text are expected", maxReason)
	}
	return r.validity.validate(maxRearmLife)
}

// SignRearm has a controller's key sign that what an entry stopped goes on.
func SignRearm(key crypto.Signer, agent string, entry Counter, reason string, issued, expires time.Time) (string, error) {
	r := &Rearm{validity: validity{agent, issued, expires}, Entry: entry, Reason: reason}
	if err := r.validate(); err != nil {
		return "", fmt.Errorf("re-arm: %w", err)
	}
	return signDocument(key, TypeRearm, r)
}

// ParseRearm reads a re-arm document. Its signature is not verified.
func ParseRearm(text string) (*Rearm, error) {
	var r Rearm
	d, err := parseSigned(text, TypeRearm, 2<<10, &r)
	if err != nil {
		return nil, fmt.Errorf("re-arm: %w", err)
	}
	r.signed = d
	if err := r.validate(); err != nil {
		return nil, fmt.Errorf("re-arm: %w", err)
	}
	return &r, nil
}

func parseRearmFact(text string) (fact, error) { return ParseRearm(text) }

func (r *Rearm) admits(b *Book, s *Scope, st *Statement) *Refusal {
	if _, refusal := r.signed.by(s, MayRearm); refusal != nil {
		return refusal
	}
	if refusal := r.holds(st.Agent, st.Time.Time); refusal != nil {
		return refusal
	}
	if !slices.ContainsFunc(b.kills, func(k ActiveKill) bool { return k.Event == r.Entry }) && !b.tripped(r.Entry) {
		return &Refusal{Rule: RuleRearmUnknown, Value: fmt.Sprint(r.Entry), Message: fmt.Sprintf("entry %d is no kill that is in force, and no refusal of a throttle that is", r.Entry)}
	}
	return nil
}

func (r *Rearm) apply(b *Book, _ *Statement) {
	b.kills = slices.DeleteFunc(slices.Clone(b.kills), func(k ActiveKill) bool { return k.Event == r.Entry })
	b.enable(r.Entry)
}
