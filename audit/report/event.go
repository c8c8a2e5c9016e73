package report

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"inkan/audit"
	"inkan/scope"
)

// happening is an event, or a person's authorization that came with an action.
type happening struct {
	Counter   uint64
	Time      time.Time
	Kind      string // as the record has it
	Title     string // in words
	Text      string
	Sentences []string
}

// eventTitles say in words what events are; others are shown by their kind.
var eventTitles = map[scope.Kind]string{
	scope.EventKill: "Stopped", scope.EventPolicy: "Policy in effect", scope.EventRearm: "Stop ended", scope.EventRecovery: "Record taken up again",
}

// kindAuthorization stands in for the kind that an authorization, which is no entry, does not have.
const kindAuthorization = "authorization"

// happened returns what an entry says beside an action: an event, or the
// authorizations of a permit.
func happened(v *audit.Verified) []happening {
	st := v.Statement
	x := happening{Counter: uint64(st.Counter), Time: st.Time.Time, Kind: clip(string(st.Kind))}
	switch st.Decision.Decision {
	case scope.DecisionDeny:
		return nil
	case scope.DecisionPermit:
		var out []happening
		for _, text := range st.Authorized {
			a := x
			a.Kind, a.Title, a.Text = kindAuthorization, "One action authorized", inWords(text, v.Scope)
			out = append(out, a)
		}
		return out
	}
	if x.Title = eventTitles[st.Kind]; x.Title == "" {
		x.Title = x.Kind
	}
	if x.Title == "" {
		x.Title = clip(st.Decision.Decision)
	}
	x.Text = inWords(st.Event, v.Scope)
	if p, err := scope.ParsePolicy(st.Event); err == nil {
		for _, s := range p.Describe() {
			x.Sentences = append(x.Sentences, clip(s))
		}
	}
	return []happening{x}
}

// inWords returns the members of a document, which is JSON or a JWS with JSON
// inside, one after the other, and the controller who signed it.
func inWords(text string, s *scope.Scope) string {
	var out []string
	if parts := strings.Split(text, "."); len(parts) == 3 {
		if by := controller(parts[0], s); by != "" {
			out = append(out, "signed by "+by)
		}
		if b, err := base64.RawURLEncoding.DecodeString(parts[1]); err == nil {
			text = string(b)
		}
	}
	var members map[string]json.RawMessage
	if json.Unmarshal([]byte(text), &members) != nil {
		return clip(text)
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		value := string(members[name])
		if strings.HasPrefix(value, "{") || strings.HasPrefix(value, "[") {
			continue // a scope, which is shown in sentences
		}
		var plain string
		if json.Unmarshal(members[name], &plain) == nil {
			value = plain
		}
		out = append(out, clip(name)+": "+clip(value))
	}
	return strings.Join(out, "; ")
}

// controller returns the name of the role in a scope whose key a document's header names.
func controller(header string, s *scope.Scope) string {
	var h struct {
		Kid string `json:"kid"`
	}
	b, err := base64.RawURLEncoding.DecodeString(header)
	if err != nil || json.Unmarshal(b, &h) != nil || s == nil {
		return ""
	}
	var d struct {
		Controllers []struct{ Name, Key string } `json:"controllers"`
	}
	if json.Unmarshal(s.Canonical(), &d) != nil {
		return ""
	}
	for _, c := range d.Controllers {
		der, err := base64.RawURLEncoding.DecodeString(c.Key)
		if sum := sha256.Sum256(der); err == nil && base64.RawURLEncoding.EncodeToString(sum[:]) == h.Kid {
			return c.Name
		}
	}
	return ""
}
