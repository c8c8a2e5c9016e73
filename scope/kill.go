package scope

import (
	"errors"
	"fmt"
	"strings"

	"inkan/internal/strictjson"
)

// Events of the kill function (RTS 6, Article 12).
const (
	EventKill Kind = "control.kill"
)

// RuleKill refuses everything but cancels while a kill is in force.
const RuleKill Rule = "kill"

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
		return errors.New("venue is for the scope venue, which needs it")
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

// admits: whoever stops something may always do so.
func (*Kill) admits(*Book, *Scope, *Statement) *Refusal { return nil }

func (k *Kill) apply(b *Book, st *Statement) {
	b.kills = append(b.kills, ActiveKill{*k, st.Counter, st.Time})
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
