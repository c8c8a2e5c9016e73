// Package message compares a venue's own HTTP message with the action that was
// signed for it (check 10 of docs/protocol.md): [Parse] reads what requests a venue
// takes and how they say what an action says, and [Routes] is what a
// [verify.Receiver] needs to hold requests to it.
//
// A request line is not signed. So only the requests that a [Route] describes
// pass, and without a query.
package message

import (
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"

	"inkan/scope"
	"inkan/verify"
)

// Route is a request that passes and what must be true of it. An action's
// fields are named as in its JSON: ord.Price, ord.Side, pay.Amount, id, act.
//
// Each field of ord and pay that an action has must stand in the path, in the
// body or in Implied, and each member of the body must be known. So neither side
// says what the other does not.
type Route struct {
	Method string `json:"method"`
	// Path of the request. A segment {ord.OrderID} must equal that field, {*} is
	// anything.
	Path string `json:"path"`
	// Kinds of action that it takes.
	Kinds []scope.Kind `json:"kinds"`
	// Body describes every member of the body, a JSON object; where it is empty the
	// request has no body.
	Body map[string]Member `json:"body,omitempty"`
	// Implied are fields that this message does not say, and the value that the venue
	// then takes; "*" is any value.
	Implied map[string]string `json:"implied,omitempty"`
	// Opaque takes any body whose digest was signed. What it says is then the agent's word: a
	// scope limits the action beside it, not the message. The path is still compared.
	Opaque bool `json:"opaque,omitempty"`
}

// Member says what a member of a body must be. Exactly one of Field, Const and
// Free is set.
type Member struct {
	// Field of the action that it equals, as text.
	Field string `json:"field,omitempty"`
	// Values translates the venue's words into the field's, such as buy into 1. If it is set any
	// other word is refused.
	Values map[string]string `json:"values,omitempty"`
	// Const is the value that it always has; it must be there.
	Const string `json:"const,omitempty"`
	// Free members are not compared: nothing that changes an order may be one.
	Free bool `json:"free,omitempty"`
}

// Validate says what is wrong with a route.
func (r *Route) Validate() error {
	if r.Method == "" || strings.ToUpper(r.Method) != r.Method || r.Method == http.MethodConnect {
		return fmt.Errorf("method %q: one such as POST is expected", r.Method)
	}
	if !strings.HasPrefix(r.Path, "/") {
		return fmt.Errorf("a path begins with /")
	}
	seen := make(map[string]bool)
	for segment := range strings.SplitSeq(r.Path[1:], "/") {
		field, ok := wildcard(segment)
		if (ok && field == "") || (!ok && !plainSegment(segment) && r.Path != "/") {
			return fmt.Errorf("the path has the segment %q: plain text or a field in braces is expected", segment)
		}
		if ok && field != "*" {
			if err := validField(field); err != nil {
				return fmt.Errorf("path: %w", err)
			}
		}
		if ok && field != "*" && seen[field] {
			return fmt.Errorf("the path has %s twice", segment)
		}
		seen[field] = true
	}
	if len(r.Kinds) == 0 {
		return fmt.Errorf("kinds is empty: it would take no action")
	}
	for _, k := range r.Kinds {
		if !slices.Contains(scope.Kinds, k) {
			return fmt.Errorf("kinds: %q is not a kind of action; the kinds are %v", k, scope.Kinds)
		}
	}
	if r.Opaque && len(r.Body)+len(r.Implied) > 0 {
		return fmt.Errorf("opaque, and yet body or implied describes the message")
	}
	for name, m := range r.Body {
		n := 0
		for _, set := range []bool{m.Field != "", m.Const != "", m.Free} {
			if set {
				n++
			}
		}
		if n != 1 || m.Values != nil && m.Field == "" {
			return fmt.Errorf("body: %q: exactly one of field (with or without values), const and free is expected", name)
		}
		if m.Field != "" {
			if err := validField(m.Field); err != nil {
				return fmt.Errorf("body: %q: %w", name, err)
			}
		}
	}
	for field := range r.Implied {
		if err := validField(field); err != nil {
			return fmt.Errorf("implied: %w", err)
		}
	}
	return nil
}

// fieldNames are the fields that an action can have, named as routes name them.
var fieldNames = namesBelow("", reflect.TypeFor[scope.Action]())

func namesBelow(prefix string, t reflect.Type) (names []string) {
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		inner := f.Type
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		if inner.Kind() == reflect.Struct && inner != reflect.TypeFor[scope.Decimal]() {
			names = append(names, namesBelow(prefix+name+".", inner)...)
		} else {
			names = append(names, prefix+name)
		}
	}
	return names
}

// validField refuses what no action has: no request would pass.
func validField(name string) error {
	if !slices.Contains(fieldNames, name) {
		return fmt.Errorf("%.64q is no field of an action: one of %s is expected", name, strings.Join(fieldNames, ", "))
	}
	return nil
}

// wildcard returns the field that a path segment in braces names.
func wildcard(segment string) (string, bool) {
	s, ok := strings.CutPrefix(segment, "{")
	if !ok {
		return "", false
	}
	return strings.CutSuffix(s, "}")
}

// Routes are the requests that pass; the first that matches counts. They
// implement [verify.Messages].
type Routes []Route

// Match finds the route of a request, and returns what compares its body with an
// action. Its errors and those are *[verify.Refusal].
func (routes Routes) Match(req *http.Request) (agrees func(a *scope.Action, body []byte) error, err error) {
	if !plainURL(req.URL) {
		return nil, refuse(verify.ReasonRequest, "a plain path without escapes and without a query is expected")
	}
	if v := req.Header.Values("Content-Encoding"); len(v) > 0 {
		return nil, refuse(verify.ReasonRequest, "a body without content coding is expected")
	}
	for i := range routes {
		r := &routes[i]
		path, ok := r.matches(req)
		if !ok {
			continue
		}
		if len(r.Body) > 0 {
			if err := isJSON(req.Header.Values("Content-Type")); err != nil {
				return nil, err
			}
		}
		return func(a *scope.Action, body []byte) error { return r.agrees(a, path, body) }, nil
	}
	return nil, refuse(verify.ReasonRoute, "no route takes %.16s %.80s", req.Method, req.URL.Path)
}

func refuse(reason verify.Reason, format string, a ...any) error {
	return &verify.Refusal{Reason: reason, Detail: fmt.Sprintf(format, a...)}
}

func (r *Route) matches(req *http.Request) (map[string]string, bool) {
	want, got := strings.Split(r.Path, "/"), strings.Split(req.URL.Path, "/")
	if r.Method != req.Method || len(want) != len(got) {
		return nil, false
	}
	path := make(map[string]string)
	for i, w := range want {
		field, ok := wildcard(w)
		switch {
		case !ok && w != got[i]:
			return nil, false
		case ok && field != "*":
			path[field] = got[i]
		}
	}
	return path, true
}

// plainURL: the path has one reading, whatever a backend makes of escapes, dots,
// empty segments, parameters and backslashes.
func plainURL(u *url.URL) bool {
	if u.Scheme != "" || u.Host != "" || u.Opaque != "" || u.User != nil || u.RawPath != "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return false
	}
	rest, ok := strings.CutPrefix(u.Path, "/")
	if !ok {
		return false
	}
	if rest == "" {
		return true
	}
	for segment := range strings.SplitSeq(rest, "/") {
		if !plainSegment(segment) {
			return false
		}
	}
	return true
}

// segmentCharacters are those that every reader of a path takes as they are.
const segmentCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_~:@"

func plainSegment(s string) bool {
	return s != "" && s != "." && s != ".." && strings.Trim(s, segmentCharacters) == ""
}

// isJSON: one content type, so that no backend reads the body as something else.
func isJSON(values []string) error {
	if len(values) == 1 {
		kind, parameters, err := mime.ParseMediaType(values[0])
		charset, given := parameters["charset"]
		if err == nil && kind == "application/json" && (len(parameters) == 0 || len(parameters) == 1 && given && strings.EqualFold(charset, "utf-8")) {
			return nil
		}
	}
	return refuse(verify.ReasonRequest, "exactly one Content-Type application/json is expected")
}
