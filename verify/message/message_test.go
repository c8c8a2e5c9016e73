package message

import (
	"encoding/json"
	"errors"
	"net/url"
	"strings"
	"testing"

	"inkan/scope"
	"inkan/verify"
)

func testRoute() *Route {
	return &Route{
		Method: "POST", Path: "/orders/{ord.Account}", Kinds: []scope.Kind{scope.OrderNew},
		Body: map[string]Member{
			"id":    {Field: "ord.ClOrdID"},
			"isin":  {Field: "ord.SecurityID"},
			"side":  {Field: "ord.Side", Values: map[string]string{"buy": "1", "sell": "2"}},
			"qty":   {Field: "ord.OrderQty"},
			"price": {Field: "ord.Price"},
			"stop":  {Field: "ord.StopPx"},
			"type":  {Const: "limit"},
			"tag":   {Free: true},
		},
		Implied: map[string]string{"ord.SecurityIDSource": "4", "ord.OrdType": "2", "ord.Currency": "*", "ord.TimeInForce": "0"},
	}
}

func testAction(t testing.TB) *scope.Action {
	t.Helper()
	a, err := scope.ParseAction([]byte(`{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-1","Account":"acc","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"61.24","OrderQty":"400","Currency":"EUR","TimeInForce":"0"},"pty":{"dec":{"algo":"x"}}}`))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

const testBody = `{"id":"A-1","isin":"FR0000120271","side":"buy","qty":400,"price":61.24,"type":"limit"}`

func TestAgrees(t *testing.T) {
	path := map[string]string{"ord.Account": "acc"}
	change := func(old, new string) string {
		if !strings.Contains(testBody, old) {
			t.Fatalf("the body has no %s", old)
		}
		return strings.Replace(testBody, old, new, 1)
	}
	for name, body := range map[string]string{
		"as it is":            testBody,
		"numbers as text":     change("61.24", `"61.24"`),
		"with space":          change(",", ", \n"),
		"with an escape":      change("buy", `b\u0075y`),
		"with a free member":  change("{", `{"tag":{"a":[1,2]},`),
		"in another order":    `{"type":"limit","price":61.24,"qty":400,"side":"buy","isin":"FR0000120271","id":"A-1"}`,
		"a free null":         change("{", `{"tag":null,`),
		"a free large number": change("{", `{"tag":1e999,`),
	} {
		if err := testRoute().agrees(testAction(t), path, []byte(body)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, body := range map[string]string{
		"no body":                     "",
		"not JSON":                    "a=b",
		"not an object":               "[]",
		"two documents":               testBody + testBody,
		"another quantity":            change("400", "401"),
		"another price":               change("61.24", "61.25"),
		"a price in another spelling": change("61.24", "61.240"),
		"a price with an exponent":    change("61.24", "6124e-2"),
		"a price close by":            change("61.24", "61.2400000000000000001"),
		"another side":                change("buy", "sell"),
		"a side that is not known":    change("buy", "1"),
		"a side in another case":      change("buy", "BUY"),
		"another type":                change("limit", "market"),
		"no type":                     change(`,"type":"limit"`, ""),
		"no price":                    change(`,"price":61.24`, ""),
		"a null price":                change("61.24", "null"),
		"a price in an object":        change("61.24", `{"v":61.24}`),
		"a list of prices":            change("61.24", "[61.24]"),
		"a member not known":          change("{", `{"leverage":10,`),
		"a member in another case":    change("{", `{"Qty":4000,`),
		"a member twice":              change("{", `{"qty":4000,`),
		"a member twice by escape":    change("{", `{"q\u0074y":4000,`),
		"a stop price beside":         change("{", `{"stop":60,`),
		"invalid UTF-8":               change("A-1", "A-1\xff"),
	} {
		if err := testRoute().agrees(testAction(t), path, []byte(body)); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonMismatch}) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]struct {
		reason verify.Reason
		route  func(*Route)
		action func(*scope.Action)
		path   string
	}{
		"another account in the path":     {path: "other"},
		"an action without the account":   {action: func(a *scope.Action) { a.Order.Account = "" }},
		"another implied value":           {action: func(a *scope.Action) { a.Order.TimeInForce = "1" }},
		"an implied value that is not":    {route: func(r *Route) { r.Implied["ord.OrderCapacity"] = "A" }},
		"a field nobody says":             {action: func(a *scope.Action) { a.Order.OrderCapacity = "P" }},
		"a stop that only the action has": {action: func(a *scope.Action) { a.Order.StopPx = a.Order.Price }},
		"another kind":                    {reason: verify.ReasonKind, action: func(a *scope.Action) { a.Kind = scope.OrderReplace }},
		"an opaque one, another account":  {route: func(r *Route) { r.Opaque = true }, path: "other"},
		"an opaque one, another kind":     {reason: verify.ReasonKind, route: func(r *Route) { r.Opaque = true; r.Kinds = []scope.Kind{scope.OrderCancel} }},
	} {
		r, a, p := testRoute(), testAction(t), "acc"
		if c.route != nil {
			c.route(r)
		}
		if c.action != nil {
			c.action(a)
		}
		if c.path != "" {
			p = c.path
		}
		reason := verify.ReasonMismatch
		if c.reason != "" {
			reason = c.reason
		}
		if err := r.agrees(a, map[string]string{"ord.Account": p}, []byte(testBody)); !errors.Is(err, &verify.Refusal{Reason: reason}) {
			t.Errorf("%s: %v, want %s", name, err, reason)
		}
	}
	// JSON's null is nothing, and not the text.
	null := testAction(t)
	null.Order.ClOrdID = "null"
	if err := testRoute().agrees(null, path, []byte(change(`"A-1"`, "null"))); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonMismatch}) {
		t.Errorf("null for the text null: %v", err)
	}
	list := testAction(t)
	list.Order.ClOrdID = "[1]"
	if err := testRoute().agrees(list, path, []byte(change(`"A-1"`, "[1]"))); !errors.Is(err, &verify.Refusal{Reason: verify.ReasonMismatch}) {
		t.Errorf("a list for the text of one: %v", err)
	}
	opaque := &Route{Kinds: []scope.Kind{scope.OrderNew}, Opaque: true}
	if err := opaque.agrees(testAction(t), nil, []byte("8=FIX.4.4")); err != nil {
		t.Errorf("an opaque body: %v", err)
	}
}

// FuzzAgrees: a body that agrees with an order has the order's values when
// another decoder reads it.
func FuzzAgrees(f *testing.F) {
	f.Add([]byte(testBody))
	f.Add([]byte(`{"qty":400,"QTY":1}`))
	a, r := testAction(f), testRoute()
	f.Fuzz(func(t *testing.T, body []byte) {
		if r.agrees(a, map[string]string{"ord.Account": "acc"}, body) != nil {
			return
		}
		// encoding/json takes names in any case and the last of duplicates.
		var got struct {
			ID, Isin, Side, Type string
			Qty, Price           json.Number
			Stop                 any
		}
		if err := json.Unmarshal(body, &got); err != nil {
			t.Fatalf("%q agrees and is not read: %v", body, err)
		}
		if got.ID != "A-1" || got.Isin != "FR0000120271" || got.Side != "buy" || got.Type != "limit" || got.Qty != "400" || got.Price != "61.24" || got.Stop != nil {
			t.Errorf("%q agrees and says %+v", body, got)
		}
	})
}

// FuzzPlainURL: a path that passes reads the same escaped, unescaped and
// joined to another.
func FuzzPlainURL(f *testing.F) {
	for _, s := range []string{"/orders", "/a/../b", "/%2e", "/a//b", "/a;b", "http://x/", "/a?b", "/", "/a\\b", "/%00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.ParseRequestURI(s)
		if err != nil || !plainURL(u) {
			return
		}
		if u.Path != s || u.EscapedPath() != s {
			t.Errorf("%q passes and reads %q, escaped %q", s, u.Path, u.EscapedPath())
		}
		base := &url.URL{Scheme: "http", Host: "x", Path: "/base"}
		if got := base.JoinPath(s).Path; s != "/" && got != "/base"+s {
			t.Errorf("%q passes and joins to %q", s, got)
		}
	})
}
