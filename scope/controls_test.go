package scope_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"inkan/internal/jws"
	"inkan/internal/strictjson"
	"inkan/scope"
)

const agentID = "spiffe://example.org/agent/mm-07"

// roles are people with a key each, and a scope that names them.
type roles struct {
	keys  map[string]*ecdsa.PrivateKey
	scope *scope.Scope
}

// newRoles makes a scope with a role for each power, and one more key that is no
// role's; more are members of the scope beside the usual ones.
func newRoles(t testing.TB, more string) *roles {
	t.Helper()
	r := &roles{keys: make(map[string]*ecdsa.PrivateKey)}
	var list []string
	for _, name := range []string{"approve", "override", "policy", "rearm", "nobody"} {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		r.keys[name] = k
		text, err := scope.ControllerKey(&k.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if name != "nobody" {
			list = append(list, fmt.Sprintf(`{"key":%q,"may":[%q],"name":"the-%s"}`, text, name, name))
		}
	}
	r.scope = parse(t, limited(more)[:len(limited(more))-1]+`,"controllers":[`+strings.Join(list, ",")+`]}`)
	return r
}

func limited(more string) string {
	if more == "" {
		more = `"max_order_notional":[{"amount":"25000","currency":"EUR"}]`
	}
	return `{"version":1,"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XLON","XPAR"],` + more + `}`
}

func parse(t testing.TB, text string) *scope.Scope {
	t.Helper()
	s, err := scope.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var today = time.Date(2026, 7, 27, 9, 0, 0, 0, time.UTC)

// buy is an order for some shares at 50, the n-th.
func buy(t testing.TB, n byte, venue, qty string) *scope.Action {
	t.Helper()
	id := base64.RawURLEncoding.EncodeToString(append(make([]byte, 15), n))
	a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":%q,"aud":%q,"act":"order.new","ord":{"ClOrdID":"c%d","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"50","OrderQty":%q,"Currency":"EUR","TimeInForce":"0"}}`, id, venue, n, qty))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (r *roles) authorize(t testing.TB, who string, a *scope.Action, rule scope.Rule) string {
	t.Helper()
	text, err := scope.SignAuthorization(r.keys[who], agentID, a, rule, "client is waiting", today, today.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func env(authorizations ...string) scope.Env {
	return scope.Env{Now: today.Add(time.Minute), AttestedAt: today, Agent: agentID, Authorizations: authorizations}
}

func refusedBy(t testing.TB, what string, rule scope.Rule, err error) {
	t.Helper()
	if r, ok := errors.AsType[*scope.Refusal](err); rule == "" && err != nil || rule != "" && (!ok || r.Rule != rule) {
		t.Errorf("%s: %v, %q is expected to refuse", what, err, rule)
	}
}

// resign makes a document with another payload or header, signed by a key.
func resign(t testing.TB, key *ecdsa.PrivateKey, text string, change func(header, payload string) (string, string)) string {
	t.Helper()
	parts := strings.Split(text, ".")
	h, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil {
		t.Fatal(err)
	}
	p, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	header, payload := change(string(h), string(p))
	input := []byte(base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload)))
	sig, err := jws.Sign(key, input)
	if err != nil {
		t.Fatal(err)
	}
	return jws.Compact(input, sig)
}

func TestAuthorization(t *testing.T) {
	r := newRoles(t, `"max_order_notional":[{"amount":"25000","block":"soft","currency":"EUR"}],"max_order_qty":[{"instrument":"*","qty":"900"}],"human_approval_above":[{"amount":"40000","currency":"EUR"}]`)
	order, other := buy(t, 1, "XPAR", "600"), buy(t, 2, "XPAR", "600") // worth 30,000
	big := buy(t, 3, "XPAR", "850")                                    // worth 42,500
	huge := buy(t, 4, "XPAR", "1000")
	override := r.authorize(t, "override", order, scope.RuleOrderNotional)
	for name, c := range map[string]struct {
		action *scope.Action
		auth   []string
		rule   scope.Rule
		change func(*scope.Env)
	}{
		"none":                     {order, nil, scope.RuleOrderNotional, nil},
		"lifted":                   {order, []string{override}, "", nil},
		"another order":            {other, []string{override}, scope.RuleAuthorizationAction, nil},
		"a key that is no role":    {order, []string{r.authorize(t, "nobody", order, scope.RuleOrderNotional)}, scope.RuleControlKey, nil},
		"a role that may not":      {order, []string{r.authorize(t, "approve", order, scope.RuleOrderNotional)}, scope.RuleControlPower, nil},
		"a re-arm role":            {order, []string{r.authorize(t, "rearm", order, scope.RuleOrderNotional)}, scope.RuleControlPower, nil},
		"expired":                  {order, []string{override}, scope.RuleControlTime, func(e *scope.Env) { e.Now = today.Add(time.Hour) }},
		"at its last second":       {order, []string{override}, "", func(e *scope.Env) { e.Now = today.Add(time.Hour - time.Microsecond) }},
		"too early":                {order, []string{override}, scope.RuleControlTime, func(e *scope.Env) { e.Now = today.Add(-time.Minute - time.Microsecond) }},
		"another agent":            {order, []string{override}, scope.RuleControlAgent, func(e *scope.Env) { e.Agent += "8" }},
		"no agent":                 {order, []string{override}, scope.RuleControlAgent, func(e *scope.Env) { e.Agent = "" }},
		"another rule":             {order, []string{r.authorize(t, "override", order, scope.RuleOrderQty)}, scope.RuleOrderNotional, nil},
		"a hard limit":             {huge, []string{r.authorize(t, "override", huge, scope.RuleOrderQty), r.authorize(t, "override", huge, scope.RuleOrderNotional)}, scope.RuleAuthorizationHard, nil},
		"twice":                    {order, []string{override, r.authorize(t, "override", order, scope.RuleOrderNotional)}, scope.RuleAuthorizationTwice, nil},
		"no approval":              {big, []string{r.authorize(t, "override", big, scope.RuleOrderNotional)}, scope.RuleApproval, nil},
		"approved by an overrider": {big, []string{r.authorize(t, "override", big, scope.RuleOrderNotional), r.authorize(t, "override", big, scope.RuleApproval)}, scope.RuleControlPower, nil},
		"approved":                 {big, []string{r.authorize(t, "override", big, scope.RuleOrderNotional), r.authorize(t, "approve", big, scope.RuleApproval)}, "", nil},
		"approval lifts nothing":   {big, []string{r.authorize(t, "approve", big, scope.RuleApproval)}, scope.RuleOrderNotional, nil},
		"five":                     {order, []string{override, override, override, override, override}, scope.RuleControlForm, nil},
		"not a JWS":                {order, []string{"yes"}, scope.RuleControlForm, nil},
		"another signature":        {order, []string{override[:len(override)-4] + "AAAA"}, scope.RuleControlSignature, nil},
		"another typ":              {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) { return strings.Replace(h, "authorization", "policy", 1), p })}, scope.RuleControlForm, nil},
		"another header parameter": {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) { return strings.Replace(h, `{`, `{"a":1,`, 1), p })}, scope.RuleControlForm, nil},
		"the header's other form":  {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) { return strings.Replace(h, `{`, `{ `, 1), p })}, scope.RuleControlForm, nil},
		"a line end in the header": {order, []string{override[:10] + "\n" + override[10:]}, scope.RuleControlForm, nil},
		"alg none":                 {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) { return strings.Replace(h, "ES256", "none", 1), p })}, scope.RuleControlForm, nil},
		"the payload's other form": {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) { return h, strings.Replace(p, `{`, `{ `, 1) })}, scope.RuleControlForm, nil},
		"an unknown member":        {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) { return h, strings.Replace(p, `"issued"`, `"hint":"1","issued"`, 1) })}, scope.RuleControlForm, nil},
		"valid for too long":       {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) { return h, strings.Replace(p, "07-27T10", "08-27T10", 1) })}, scope.RuleControlForm, nil},
		"a rule that nobody lifts": {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) {
			return h, strings.Replace(p, "max_order_notional", "allowed_venues", 1)
		})}, scope.RuleControlForm, nil},
		"no reason":                  {order, []string{resign(t, r.keys["override"], override, func(h, p string) (string, string) { return h, strings.Replace(p, "client is waiting", " ", 1) })}, scope.RuleControlForm, nil},
		"signed by another than kid": {order, []string{resign(t, r.keys["nobody"], override, func(h, p string) (string, string) { return h, p })}, scope.RuleControlSignature, nil},
	} {
		e := env(c.auth...)
		if c.change != nil {
			c.change(&e)
		}
		_, err := scope.Check(r.scope, c.action, e)
		refusedBy(t, name, c.rule, err)
	}
	if _, err := scope.SignAuthorization(r.keys["override"], agentID, order, "allowed_venues", "x", today, today.Add(time.Hour)); err == nil {
		t.Error("an authorization for a rule that nobody lifts is signed")
	}
}

// TestSoftWindows: an authorization lifts a soft limit over time for its action,
// which counts all the same; a hard one with the same name stays.
func TestSoftWindows(t *testing.T) {
	r := newRoles(t, `"max_order_notional":[{"amount":"25000","currency":"EUR"}],"max_notional_per_window":[{"amount":"30000","block":"soft","currency":"EUR","window":{"rolling_s":60}},{"amount":"60000","currency":"EUR","window":{"rolling_s":3600}}]`)
	b := scope.NewBook()
	do := func(what string, a *scope.Action, rule scope.Rule, auth ...string) {
		t.Helper()
		p, err := scope.Check(r.scope, a, env(auth...))
		if err != nil {
			t.Fatal(err)
		}
		_, refusal := b.Decide(p, env().Now)
		if refusal == nil {
			b.Add(scope.UseOf(p, env().Now))
			refusedBy(t, what, rule, nil)
			return
		}
		refusedBy(t, what, rule, refusal)
	}
	first, second, third := buy(t, 1, "XPAR", "500"), buy(t, 2, "XPAR", "500"), buy(t, 3, "XPAR", "300")
	do("the first", first, "")
	do("the second", second, scope.RuleNotionalWindow)
	do("the second, lifted", second, "", r.authorize(t, "override", second, scope.RuleNotionalWindow))
	do("the third, lifted, above the hard limit", third, scope.RuleAuthorizationHard, r.authorize(t, "override", third, scope.RuleNotionalWindow))
}

func (r *roles) policy(t testing.TB, who string, version uint32, text string, life time.Duration) string {
	t.Helper()
	p, err := scope.SignPolicy(r.keys[who], agentID, version, parse(t, text), today, today.Add(life))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// happen replays an event if it is admitted.
func happen(t testing.TB, b *scope.Book, n scope.Counter, s *scope.Scope, kind scope.Kind, text string, at time.Time) error {
	t.Helper()
	e, err := scope.NewEvent(kind, text, s)
	if err != nil {
		return err
	}
	st := scope.Statement{Version: 1, Agent: agentID, Counter: n, Previous: scope.Digest{1}, Time: scope.Timestamp{Time: at}, Controls: b.Lasting(), Decision: scope.Decision{Scope: s.Hash()}, Attestation: scope.Attestation{Time: scope.Timestamp{Time: today}}}
	e.On(&st)
	raw, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := scope.ParseStatement(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := valid(t, schema(t, "statement"), raw); err != nil {
		t.Errorf("the schema refuses the event: %v", err)
	}
	if r := b.Admits(s, parsed); r != nil {
		return r
	}
	b.Replay(parsed)
	return nil
}

// decide holds an order against scope and book at a time.
func decide(b *scope.Book, s *scope.Scope, a *scope.Action, at time.Time) (*scope.Grounds, error) {
	p, err := scope.Check(s, a, scope.Env{Now: at, AttestedAt: today, Agent: agentID})
	if err != nil {
		return nil, err
	}
	out, r := b.Decide(p, at)
	if r != nil {
		return nil, r
	}
	return out, nil
}

func TestPolicy(t *testing.T) {
	r, b := newRoles(t, ""), scope.NewBook()
	narrow := limited(`"max_order_notional":[{"amount":"10000","currency":"EUR"}],"max_orders_per_window":[{"count":9,"window":{"rolling_s":60}}]`)
	at := today.Add(time.Minute)
	wide := limited(`"max_order_notional":[{"amount":"25001","currency":"EUR"}]`)
	good := r.policy(t, "policy", 7, narrow, time.Hour)
	unknown := resign(t, r.keys["policy"], good, func(h, p string) (string, string) {
		return h, strings.Replace(p, `"max_order_notional"`, `"max_order_madness":[],"max_order_notional"`, 1)
	})
	for name, c := range map[string]struct {
		text string
		rule scope.Rule
		at   time.Time
	}{
		"wider":               {r.policy(t, "policy", 1, wide, time.Hour), scope.RulePolicyWider, at},
		"a key that is none":  {r.policy(t, "nobody", 1, narrow, time.Hour), scope.RuleControlKey, at},
		"another role":        {r.policy(t, "override", 1, narrow, time.Hour), scope.RuleControlPower, at},
		"expired":             {r.policy(t, "policy", 1, narrow, time.Minute), scope.RuleControlTime, at},
		"not yet valid":       {r.policy(t, "policy", 1, narrow, time.Hour), scope.RuleControlTime, today.Add(-2 * time.Minute)},
		"another agent":       {resign(t, r.keys["policy"], good, func(h, p string) (string, string) { return h, strings.Replace(p, "mm-07", "mm-08", 1) }), scope.RuleControlAgent, at},
		"a changed signature": {good[:len(good)-4] + "AAAA", scope.RuleControlSignature, at},
	} {
		refusedBy(t, name, c.rule, happen(t, b, 2, r.scope, scope.EventPolicy, c.text, c.at))
	}
	for name, text := range map[string]string{
		"an unknown limit":                      unknown,
		"an order of lists that is not the one": resign(t, r.keys["policy"], good, func(h, p string) (string, string) { return h, strings.Replace(p, `"XLON","XPAR"`, `"XPAR","XLON"`, 1) }),
		"controllers": resign(t, r.keys["policy"], good, func(h, p string) (string, string) {
			return h, strings.Replace(p, `"max_order_notional"`, `"controllers":[],"max_order_notional"`, 1)
		}),
		"version 0": resign(t, r.keys["policy"], good, func(h, p string) (string, string) { return h, strings.Replace(p, `"version":7`, `"version":0`, 1) }),
		"a life of a month": resign(t, r.keys["policy"], good, func(h, p string) (string, string) {
			return h, strings.Replace(p, `"expires":"2026-07-27`, `"expires":"2026-08-27`, 1)
		}),
	} {
		if _, err := scope.ParsePolicy(text); err == nil {
			t.Errorf("%s: the policy parses", name)
		}
	}
	if _, err := scope.SignPolicy(r.keys["policy"], agentID, 1, r.scope, today, today.Add(time.Hour)); err == nil {
		t.Error("a policy with controllers is signed")
	}

	small, large := buy(t, 1, "XPAR", "200"), buy(t, 2, "XPAR", "201")
	if out, err := decide(b, r.scope, large, at); err != nil || out.Policy != nil || out.Utilisation != nil {
		t.Fatalf("before the policy: %+v, %v", out, err)
	}
	if err := happen(t, b, 3, r.scope, scope.EventPolicy, good, at); err != nil {
		t.Fatal(err)
	}
	p, err := scope.ParsePolicy(good)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := decide(b, r.scope, small, at); err != nil || out.Policy == nil || *out.Policy != p.Hash() || len(out.Utilisation) != 1 {
		t.Errorf("inside: %+v, %v", out, err)
	}
	_, err = decide(b, r.scope, large, at)
	refusedBy(t, "outside the policy", scope.RuleOrderNotional, err)
	refusedBy(t, "the same version", scope.RulePolicyVersion, happen(t, b, 4, r.scope, scope.EventPolicy, r.policy(t, "policy", 7, narrow, 2*time.Hour), at))
	refusedBy(t, "an older version", scope.RulePolicyVersion, happen(t, b, 4, r.scope, scope.EventPolicy, r.policy(t, "policy", 6, narrow, 2*time.Hour), at))

	// Under another certificate the policy is held against that one.
	other := newRoles(t, "")
	_, err = decide(b, other.scope, small, at)
	refusedBy(t, "a certificate with other controllers", scope.RuleControlKey, err)
	_, err = decide(b, r.scope, small, at)
	refusedBy(t, "and the first one again", "", err)

	// It ends, and nothing takes its place.
	end := today.Add(time.Hour)
	_, err = decide(b, r.scope, small, end)
	refusedBy(t, "after its end", scope.RulePolicyExpired, err)
	c, err := scope.ParseAction([]byte(`{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"2","OrigClOrdID":"1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := decide(b, r.scope, c, end); err != nil || out.Policy != nil {
		t.Errorf("a cancel after its end: %+v, %v", out, err)
	}
	if err := happen(t, b, 5, r.scope, scope.EventPolicy, r.policy(t, "policy", 8, limited(""), 3*time.Hour), end); err != nil {
		t.Fatal(err)
	}
	_, err = decide(b, r.scope, large, end)
	refusedBy(t, "under the next one", "", err)
}

// TestKillKnown: a kill of the issuer's list is taken over once, also after it
// was re-armed, while it still stands in the list.
func TestKillKnown(t *testing.T) {
	r, b := newRoles(t, ""), scope.NewBook()
	at := today.Add(time.Minute)
	text, err := strictjson.Marshal(&scope.Kill{Scope: scope.KillFirm, Reason: "stop all", By: "issuer", ID: "k1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := happen(t, b, 4, r.scope, scope.EventKill, string(text), at); err != nil {
		t.Fatal(err)
	}
	refusedBy(t, "the same kill", scope.RuleKillKnown, happen(t, b, 5, r.scope, scope.EventKill, string(text), at))
	rearm, err := scope.SignRearm(r.keys["rearm"], agentID, 4, "the cause was found", today, today.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if err := happen(t, b, 5, r.scope, scope.EventRearm, rearm, at); err != nil {
		t.Fatal(err)
	}
	refusedBy(t, "the same kill after the re-arm", scope.RuleKillKnown, happen(t, b, 6, r.scope, scope.EventKill, string(text), at))
	_, err = decide(b, r.scope, buy(t, 1, "XPAR", "1"), at)
	refusedBy(t, "an order", "", err)
}

func TestKillAndRearm(t *testing.T) {
	r, b := newRoles(t, ""), scope.NewBook()
	at := today.Add(time.Minute)
	order, elsewhere := buy(t, 1, "XPAR", "1"), buy(t, 2, "XLON", "1")
	sign := func(who string, kill scope.Counter) string {
		text, err := scope.SignRearm(r.keys[who], agentID, kill, "the cause was found", today, today.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	for n, k := range []scope.Kill{{Scope: scope.KillVenue, Venue: "XLON", Reason: "halted", By: "uid 0"}, {Scope: scope.KillFirm, Reason: "stop all", By: "issuer", ID: "k1"}} {
		text, err := strictjson.Marshal(&k)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			_, err := decide(b, r.scope, elsewhere, at)
			refusedBy(t, "before the kill", "", err)
		}
		if err := happen(t, b, scope.Counter(n+4), r.scope, scope.EventKill, string(text), at); err != nil {
			t.Fatal(err)
		}
		_, err = decide(b, r.scope, elsewhere, at)
		refusedBy(t, "at the venue", scope.RuleKill, err)
		_, err = decide(b, r.scope, order, at)
		refusedBy(t, "at another venue", []scope.Rule{"", scope.RuleKill}[n], err)
	}
	first := sign("rearm", 4)
	for name, c := range map[string]struct {
		text string
		rule scope.Rule
		at   time.Time
	}{
		"another role":         {sign("policy", 4), scope.RuleControlPower, at},
		"a key that is none":   {sign("nobody", 4), scope.RuleControlKey, at},
		"an entry that is not": {sign("rearm", 3), scope.RuleRearmUnknown, at},
		"expired":              {first, scope.RuleControlTime, today.Add(time.Hour)},
		"another agent":        {resign(t, r.keys["rearm"], first, func(h, p string) (string, string) { return h, strings.Replace(p, "mm-07", "mm-08", 1) }), scope.RuleControlAgent, at},
		"another signature":    {first[:len(first)-4] + "AAAA", scope.RuleControlSignature, at},
	} {
		refusedBy(t, name, c.rule, happen(t, b, 6, r.scope, scope.EventRearm, c.text, c.at))
	}
	if err := happen(t, b, 6, r.scope, scope.EventRearm, first, at); err != nil {
		t.Fatal(err)
	}
	refusedBy(t, "again", scope.RuleRearmUnknown, happen(t, b, 7, r.scope, scope.EventRearm, first, at))
	_, err := decide(b, r.scope, order, at)
	refusedBy(t, "the other kill is in force", scope.RuleKill, err)
	if err := happen(t, b, 7, r.scope, scope.EventRearm, sign("rearm", 5), at); err != nil {
		t.Fatal(err)
	}
	_, err = decide(b, r.scope, elsewhere, at)
	refusedBy(t, "after both were ended", "", err)
	if len(b.Kills()) != 0 || b.Lasting() != 7 {
		t.Errorf("%v, last event %d", b.Kills(), b.Lasting())
	}
}

func TestControllers(t *testing.T) {
	r := newRoles(t, "")
	if err := valid(t, schema(t, "scope"), r.scope.Canonical()); err != nil {
		t.Errorf("the schema refuses the scope: %v", err)
	}
	text := string(r.scope.Canonical())
	key, err := scope.ControllerKey(&r.keys["nobody"].PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	was, err := scope.ControllerKey(&r.keys["policy"].PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{
		"another key":   {was, key},
		"another name":  {"the-policy", "the-boss"},
		"another power": {`["policy"]`, `["override","policy"]`},
	} {
		inner := parse(t, strings.Replace(text, change[0], change[1], 1))
		if err := scope.Contains(r.scope, inner); err == nil || !strings.HasPrefix(err.Error(), "controllers") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := scope.Contains(r.scope, parse(t, limited(""))); err != nil {
		t.Errorf("without controllers: %v", err)
	}
	for name, change := range map[string][2]string{
		"no powers":       {`["policy"]`, `[]`},
		"unknown power":   {`["policy"]`, `["rule"]`},
		"a key twice":     {was, func() string { k, _ := scope.ControllerKey(&r.keys["rearm"].PublicKey); return k }()},
		"a name twice":    {"the-policy", "the-rearm"},
		"padding":         {was, was + "="},
		"no key":          {was, "AAAA"},
		"name with space": {"the-policy", "the policy"},
	} {
		if _, err := scope.Parse([]byte(strings.Replace(text, change[0], change[1], 1))); err == nil {
			t.Errorf("%s: the scope parses", name)
		}
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := scope.ControllerKey(&p384.PublicKey); err == nil {
		t.Error("a key on P-384 is a controller's")
	}
	if !strings.Contains(strings.Join(r.scope.Describe(), "\n"), "Controller the-rearm may: rearm.") {
		t.Errorf("%q", r.scope.Describe())
	}
	outer := parse(t, limited(`"human_approval_above":[{"amount":"10","currency":"EUR"}],"max_order_notional":[{"amount":"100","currency":"EUR"}]`))
	for more, wider := range map[string]bool{`"human_approval_above":[{"amount":"10","currency":"EUR"}],`: false, `"human_approval_above":[{"amount":"9","currency":"EUR"}],`: false, `"human_approval_above":[{"amount":"11","currency":"EUR"}],`: true, "": true} {
		if err := scope.Contains(outer, parse(t, limited(more+`"max_order_notional":[{"amount":"100","currency":"EUR"}]`))); (err != nil) != wider {
			t.Errorf("%q: %v", more, err)
		}
	}
}

// FuzzDocument: whatever parses as a control document parses to the same again,
// and says the same of its signature.
func FuzzDocument(f *testing.F) {
	r := newRoles(f, "")
	f.Add(r.authorize(f, "override", buy(f, 1, "XPAR", "1"), scope.RuleOrderNotional))
	f.Add(r.policy(f, "policy", 1, limited(""), time.Hour))
	rearm, err := scope.SignRearm(r.keys["rearm"], agentID, 1, "x", today, today.Add(time.Hour))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(rearm)
	f.Add("..")
	list, err := (&scope.KillList{Number: 1, ThisUpdate: today, NextUpdate: today.Add(time.Hour), Kills: []scope.IssuedKill{{ID: "k", Scope: scope.KillFirm, Reason: "drill", Since: today}}}).Sign(r.keys["nobody"])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(list)
	f.Fuzz(func(t *testing.T, text string) {
		if l, err := scope.ParseKillList(text, &r.keys["nobody"].PublicKey); err == nil && l.Number == 0 {
			t.Errorf("%q is a kill list", text)
		}
		if p, err := scope.ParsePolicy(text); err == nil && (p.Text() != text || len(text) > scope.MaxEvent) {
			t.Errorf("%q is another policy", text)
		}
		if a, err := scope.ParseAuthorization(text); err == nil && (a.Rule == "" || a.Reason == "" || !a.Issued.Before(a.Expires)) {
			t.Errorf("%+v", a)
		}
		if x, err := scope.ParseRearm(text); err == nil && (x.Entry == 0 || x.Reason == "") {
			t.Errorf("%+v", x)
		}
	})
}

// TestControlsDocumented: docs/controls.md has every rule's line.
func TestControlsDocumented(t *testing.T) {
	b, err := os.ReadFile("../docs/controls.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, rule := range []scope.Rule{scope.RuleKill, scope.RuleKillKnown, scope.RuleRearmUnknown, scope.RulePolicyWider, scope.RulePolicyVersion, scope.RulePolicyExpired, scope.RuleApproval,
		scope.RuleAuthorizationAction, scope.RuleAuthorizationHard, scope.RuleAuthorizationTwice, scope.RuleControlForm, scope.RuleControlKey, scope.RuleControlPower, scope.RuleControlSignature, scope.RuleControlAgent, scope.RuleControlTime} {
		if !strings.Contains(string(b), "\n| `"+string(rule)+"` | ") {
			t.Errorf("docs/controls.md has no line for %s", rule)
		}
	}
}
