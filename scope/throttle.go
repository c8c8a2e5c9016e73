package scope

import (
	"fmt"
	"maps"
	"slices"
)

// refusesDisabled refuses what the throttle disabled.
func (b *Book) refusesDisabled(u *Use) *Refusal {
	if len(b.disabled) == 0 {
		return nil
	}
	for _, key := range [...]string{"", u.Strategy} {
		if t, ok := b.disabled[key]; ok {
			who := "the agent"
			if key != "" {
				who = "the algorithm " + key
			}
			return &Refusal{Rule: RuleDisabled, Key: key, Value: key, Message: fmt.Sprintf("%s was executed too often and is disabled since %s: only cancels pass until entry %d is re-armed", who, t.since.Format(TimeFormat), t.entry)}
		}
	}
	return nil
}

// trips says that a statement is the throttle's refusal, which disables.
func (s *Statement) trips() bool {
	return s.Decision.Decision == DecisionDeny && s.Decision.Rule == RuleThrottle
}

// trip counts a refusal of the throttle.
func (b *Book) trip(s *Statement) {
	if _, ok := b.disabled[s.Decision.Key]; !ok {
		b.disabled[s.Decision.Key] = trip{s.Time.Time, s.Counter}
	}
}

// Disabled is what the throttle disabled.
type Disabled struct {
	Strategy string    `json:"strategy,omitzero"` // the algorithm; empty: the agent
	Since    Timestamp `json:"since"`
	Entry    Counter   `json:"entry"` // number of the refusal, which a re-arm names
}

// Disabled lists what the throttle disabled, by name.
func (b *Book) Disabled() []Disabled {
	var out []Disabled
	for _, key := range slices.Sorted(maps.Keys(b.disabled)) {
		out = append(out, Disabled{key, Timestamp{b.disabled[key].since}, b.disabled[key].entry})
	}
	return out
}

// tripped says that a throttle's refusal is in effect.
func (b *Book) tripped(entry Counter) bool {
	for _, t := range b.disabled {
		if t.entry == entry {
			return true
		}
	}
	return false
}

// enable arms a throttle again: what was executed before does not count any more.
func (b *Book) enable(entry Counter) {
	for key, t := range b.disabled {
		if t.entry != entry {
			continue
		}
		delete(b.disabled, key)
		if s := b.strategies[key]; s != nil {
			s.restart()
		}
		if key == "" {
			b.all.restart()
		}
	}
}
