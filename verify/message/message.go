package message

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"inkan/internal/strictjson"
	"inkan/scope"
	"inkan/verify"
)

// agrees compares a message with the action that was signed for it.
func (r *Route) agrees(a *scope.Action, path map[string]string, body []byte) error {
	if !slices.Contains(r.Kinds, a.Kind) {
		return refuse(verify.ReasonKind, "%s %s does not take %s", r.Method, r.Path, a.Kind)
	}
	fields, err := fieldsOf(a)
	if err != nil {
		return err
	}
	said := make(map[string]bool)
	for field, value := range path {
		if fields[field] != value {
			return refuse(verify.ReasonMismatch, "the path has %.64q for %s, the action has %q", value, field, fields[field])
		}
		said[field] = true
	}
	if r.Opaque {
		return nil
	}
	for field, value := range r.Implied {
		if got, ok := fields[field]; value != "*" && (!ok || got != value) {
			return refuse(verify.ReasonMismatch, "this message means %s %q, the action has %q", field, value, got)
		}
		said[field] = true
	}
	if err := r.compareBody(body, fields, said); err != nil {
		return err
	}
	for _, field := range slices.Sorted(maps.Keys(fields)) {
		if !said[field] && (strings.HasPrefix(field, "ord.") || strings.HasPrefix(field, "pay.")) {
			return refuse(verify.ReasonMismatch, "the action has %s, the message does not say it", field)
		}
	}
	return nil
}

func (r *Route) compareBody(body []byte, fields map[string]string, said map[string]bool) error {
	if len(r.Body) == 0 {
		if len(body) > 0 {
			return refuse(verify.ReasonMismatch, "a request without a body is expected")
		}
		return nil
	}
	var members map[string]json.RawMessage
	if err := strictjson.Unmarshal(body, len(body), &members); err != nil {
		return refuse(verify.ReasonMismatch, "the body: %v", err)
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		m, ok := r.Body[name]
		if !ok {
			return refuse(verify.ReasonMismatch, "the body has %.64q, which this route does not know", name)
		}
		if m.Free {
			continue
		}
		text, ok := scalar(members[name])
		if !ok {
			return refuse(verify.ReasonMismatch, "%q in the body is not a text, a number or a boolean", name)
		}
		if m.Field == "" {
			if text != m.Const {
				return refuse(verify.ReasonMismatch, "%q in the body is %.64q, %q is expected", name, text, m.Const)
			}
			continue
		}
		word := text
		if m.Values != nil {
			if word, ok = m.Values[text]; !ok {
				return refuse(verify.ReasonMismatch, "%q in the body is %.64q, one of %q is expected", name, text, slices.Sorted(maps.Keys(m.Values)))
			}
		}
		if got, ok := fields[m.Field]; !ok || got != word {
			return refuse(verify.ReasonMismatch, "%q in the body is %.64q, the action's %s is %q", name, text, m.Field, got)
		}
		said[m.Field] = true
	}
	for name, m := range r.Body {
		if _, ok := members[name]; m.Const != "" && !ok {
			return refuse(verify.ReasonMismatch, "the body lacks %q, %q is expected", name, m.Const)
		}
	}
	return nil
}

// scalar is the text of a JSON value: a number's digits as they stand, so that
// 61.5 and 61.50 differ as they do in actions.
func scalar(raw json.RawMessage) (string, bool) {
	s := string(raw)
	switch {
	case s == "" || s == "null" || s[0] == '{' || s[0] == '[':
		return "", false
	case s[0] == '"':
		var text string
		err := json.Unmarshal(raw, &text)
		return text, err == nil
	}
	return s, true
}

// fieldsOf is an action's JSON as one level: ord.Price and so on.
func fieldsOf(a *scope.Action) (map[string]string, error) {
	b, err := a.Canonical()
	if err != nil {
		return nil, err
	}
	var tree map[string]any
	if err := json.Unmarshal(b, &tree); err != nil {
		return nil, err
	}
	fields := make(map[string]string)
	flatten("", tree, fields)
	return fields, nil
}

func flatten(prefix string, tree map[string]any, into map[string]string) {
	for name, v := range tree {
		switch v := v.(type) {
		case string:
			into[prefix+name] = v
		case map[string]any:
			flatten(prefix+name+".", v, into)
		}
	}
}

// Agrees compares a message that came by another way than HTTP, such as a
// WebSocket's text, with the action that was signed for it, as a request's body is.
func (r *Route) Agrees(a *scope.Action, message []byte) error { return r.agrees(a, nil, message) }
