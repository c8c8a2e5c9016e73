package scope

import (
	"fmt"
	"slices"
	"time"

	"inkan/internal/strictjson"
)

// EventRecovery says that the record was taken up again after it was found that
// it may not be all that was recorded.
const EventRecovery Kind = "control.recovery"

// RuleRollback refuses everything while the record may not be all that was
// recorded: it was put back, lost, copied, or another program wrote to it.
const RuleRollback Rule = "rollback"

// Cause is what a recovery follows.
type Cause string

// What a recovery follows. docs/record.md says how each is found.
const (
	CauseRollback Cause = "rollback" // the record is older than what was recorded
	CauseLost     Cause = "lost"     // there was another record, or the counter is gone
	CauseDevice   Cause = "device"   // it is from another host
	CauseShared   Cause = "shared"   // another process has written to a copy of it
	CausePower    Cause = "power"    // the TPM lost power: what was recorded last cannot be told
	CauseProgram  Cause = "program"  // another executable has written to it before
	CauseClock    Cause = "clock"    // the clock was set
)

var causes = []Cause{CauseRollback, CauseLost, CauseDevice, CauseShared, CausePower, CauseProgram, CauseClock}

// loses says whether actions may have been forgotten.
func (c Cause) loses() bool { return c != CauseProgram && c != CauseClock }

// Recovery is the text of [EventRecovery]. What was done before it, and is not in
// the record, counts as if it had used up every limit over time.
type Recovery struct {
	Cause  Cause  `json:"cause"`
	Found  string `json:"found"` // what was found, in words
	Reason string `json:"reason"`
	By     string `json:"by"` // who, as the signer knows it
}

// Validate says what is wrong with r.
func (r *Recovery) Validate() error {
	switch {
	case !slices.Contains(causes, r.Cause):
		return fmt.Errorf("cause %s: one of %s is expected", clipped(string(r.Cause)), join(causes))
	case !validSentence(r.Found):
		return fmt.Errorf("found: 1 to %d bytes of printable text are expected", maxReason)
	case !validSentence(r.By):
		return fmt.Errorf("by: 1 to %d bytes of printable text are expected", maxReason)
	case !validSentence(r.Reason):
		return fmt.Errorf("reason: 1 to %d bytes of printable text are expected", maxReason)
	}
	return nil
}

// Event returns the recovery as an event.
func (r *Recovery) Event(s *Scope) (*Event, error) {
	b, err := strictjson.Marshal(r)
	if err != nil {
		return nil, err
	}
	return NewEvent(EventRecovery, string(b), s)
}

func parseRecovery(text string) (fact, error) {
	var r Recovery
	if err := canonicalDocument([]byte(text), MaxEvent, &r); err != nil {
		return nil, err
	}
	return &r, r.Validate()
}

// admits: it only takes away.
func (*Recovery) admits(*Book, *Scope, *Statement) *Refusal { return nil }

func (r *Recovery) apply(b *Book, st *Statement) {
	if r.Cause.loses() && st.Time.Time.After(b.unknown) {
		b.unknown = st.Time.Time
	}
}

// Unknown is the moment of the last recovery before which actions may be
// missing; zero if there was none.
func (b *Book) Unknown() time.Time { return b.unknown }

// forgotten refuses what falls into a window with a moment of which is not
// known what was done, and for as long what is limited by what is open. Cancels do not come here.
func (b *Book) forgotten(s *Scope, u *Use) *Refusal {
	if b.unknown.IsZero() {
		return nil
	}
	refuse := func(rule Rule, key string, free time.Time) *Refusal {
		if !u.At.Before(free) {
			return nil
		}
		return &Refusal{Rule: rule, Key: key, FreeAt: free,
			Message: fmt.Sprintf("what was done before %s is not known, so the limit counts as used up until %s", b.unknown.Format(TimeFormat), free.UTC().Format(TimeFormat))}
	}
	if u.same != [16]byte{} {
		if r := refuse(RuleDuplicate, "", b.unknown.Add(time.Duration(s.doc.DuplicateMS)*time.Millisecond)); r != nil {
			return r
		}
	}
	for i := range s.limits {
		l := &s.limits[i]
		key, ok := l.applies(s, u)
		if !ok {
			continue
		}
		free := b.unknown.Add(MaxWindow) // of what is open: orders for a day have ended by then
		if l.span.Window != (Window{}) {
			free = time.UnixMicro(l.span.end(b.unknown.UnixMicro()))
		}
		rule := l.rule
		if rule == RuleThrottle {
			rule = RuleDisabled // for a time: no one execution was too many, so nobody needs to re-arm
		}
		if r := refuse(rule, key, free); r != nil {
			return r
		}
	}
	return nil
}
