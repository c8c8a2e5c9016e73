package scope_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"inkan/scope"
)

// vector is a test vector; docs/scope.md describes the form for other languages.
type vector struct {
	Name   string          `json:"name"`
	Scope  json.RawMessage `json:"scope"`
	Action json.RawMessage `json:"action"`
	Env    struct {
		Now        time.Time             `json:"now"`
		AttestedAt time.Time             `json:"attested_at"`
		Clock      *scope.Clock          `json:"clock"`
		Reference  *scope.ReferencePrice `json:"reference"`
		Run        *scope.Run            `json:"run"`
		Source     *source               `json:"source"`

		Agent          string   `json:"agent"`
		Authorizations []string `json:"authorizations"`
	} `json:"env"`
	Expect   string `json:"expect"`
	Rule     string `json:"rule"`
	Notional string `json:"notional"`
}

// source is where a request comes from; a vector without one says nothing of it.
type source struct {
	Address string   `json:"address"`
	Regions []string `json:"regions"`
}

func (s *source) check(sc *scope.Scope) error {
	from := scope.Source{Regions: s.Regions}
	if s.Address != "" {
		from.Address = netip.MustParseAddr(s.Address)
	}
	return scope.CheckSource(sc, from)
}

func vectors(t testing.TB) []vector {
	t.Helper()
	files, err := filepath.Glob("testdata/vectors/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal("there are no vectors", err)
	}
	var all []vector
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var list []vector
		if err := json.Unmarshal(b, &list); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		all = append(all, list...)
	}
	return all
}

func schema(t testing.TB, of string) *jsonschema.Schema {
	t.Helper()
	b, err := scope.Schema(of)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource(of, doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile(of)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func valid(t testing.TB, s *jsonschema.Schema, b []byte) error {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return s.Validate(doc)
}

func TestVectors(t *testing.T) {
	actions, scopes := schema(t, "action"), schema(t, "scope")
	for _, v := range vectors(t) {
		t.Run(v.Name, func(t *testing.T) {
			s, err := scope.Parse(v.Scope)
			if err != nil {
				t.Fatal(err)
			}
			if err := valid(t, scopes, v.Scope); err != nil {
				t.Errorf("the schema refuses the scope: %v", err)
			}
			env := scope.Env{Now: v.Env.Now, AttestedAt: v.Env.AttestedAt, Reference: v.Env.Reference, Run: v.Env.Run, Clock: v.Env.Clock, Agent: v.Env.Agent, Authorizations: v.Env.Authorizations}
			a, err := scope.ParseAction(v.Action)
			if err == nil {
				if err := valid(t, actions, v.Action); err != nil {
					t.Errorf("the schema refuses the action: %v", err)
				}
				var p *scope.Permit
				p, err = scope.Check(s, a, env)
				if err == nil && v.Notional != "" {
					if n, _, ok := p.Notional(); !ok || n.String() != v.Notional {
						t.Errorf("notional is %s, want %s", n, v.Notional)
					}
				}
				all := scope.Explain(s, a, env)
				if (err == nil) != (len(all) == 0) {
					t.Errorf("Check says %v, Explain %v", err, all)
				}
				if err == nil && v.Env.Source != nil {
					err = v.Env.Source.check(s)
				}
			}
			r, denied := errors.AsType[*scope.Refusal](err)
			switch {
			case v.Expect == "permit" && err != nil:
				t.Errorf("refused: %v", err)
			case v.Expect == "deny" && (!denied || string(r.Rule) != v.Rule):
				t.Errorf("got %v, want a refusal by %s", err, v.Rule)
			}
		})
	}
}

func TestExamples(t *testing.T) {
	y, err := os.ReadFile("../examples/scope.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s, err := scope.ParseYAML(y)
	if err != nil {
		t.Fatal(err)
	}
	j, err := os.ReadFile("../examples/order.json")
	if err != nil {
		t.Fatal(err)
	}
	a, err := scope.ParseAction(j)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	p, err := scope.Check(s, a, scope.Env{Now: now, AttestedAt: now})
	if err != nil {
		t.Fatal(err)
	}
	if n, c, ok := p.Notional(); n.String() != "24496" || c != "EUR" || !ok {
		t.Errorf("notional is %s %s", n, c)
	}
}

func TestBadScopes(t *testing.T) {
	for text, want := range map[string]string{
		`{}`:            "version",
		`{"version":2}`: "version is 2",
		`{"version":1,"allowed_actions":[],"allowed_venues":["XPAR"]}`:                                                                               "must not be empty",
		`{"version":1,"allowed_actions":["order.new"],"allowed_venues":["XPAR"]}`:                                                                    "allowed_instruments is missing",
		`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["paris"]}`:                                                                "a MIC such as XPAR",
		`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"max_leverage":"2"}`:                                              "unknown member",
		`{"version":1,"allowed_actions":["order.cancel","order.cancel"],"allowed_venues":["XPAR"]}`:                                                  "stands twice",
		`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"trading_window":[{"days":["mon"],"from":"22:00","to":"06:00"}]}`: "over midnight",
		`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"max_order_notional":[{"currency":"euro","amount":"1"}]}`:         "ISO 4217",
		`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"max_order_notional":[{"currency":"EUR","amount":"1.0"}]}`:        "write 1",
		`{"version":1,"version":1}`:           "duplicate",
		strings.Repeat(`[`, 40):               "nested deeper",
		`{"version":1} {}`:                    "byte",
		strings.Repeat(" ", scope.MaxScope+1): "at most",
	} {
		_, err := scope.Parse([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: got %v, want something about %q", text, err, want)
		}
	}
}

func TestOneSpelling(t *testing.T) {
	a := `{"version":1,"allowed_venues":["XPAR","XLON"],"allowed_actions":["order.cancel"],"max_order_notional":[{"currency":"EUR","amount":"1","block":"hard"}]}`
	b := `{"allowed_actions":["order.cancel"],"allowed_venues":["XLON","XPAR"],"max_order_notional":[{"amount":"1","currency":"EUR"}],"version":1}`
	sa, err := scope.Parse([]byte(a))
	if err != nil {
		t.Fatal(err)
	}
	if string(sa.Canonical()) != b {
		t.Errorf("canonical form is\n%s, want\n%s", sa.Canonical(), b)
	}
	if _, err := scope.ParseCanonical([]byte(a)); err == nil {
		t.Error("another spelling was taken for the canonical one")
	}
	if _, err := scope.ParseCanonical([]byte(b)); err != nil {
		t.Error(err)
	}
}

func TestNothingIsNoScope(t *testing.T) {
	a := &scope.Action{}
	for _, s := range []*scope.Scope{nil, {}} {
		if p, err := scope.Check(s, a, scope.Env{Now: time.Now()}); err == nil || p.Valid() {
			t.Error("no scope allowed something")
		}
	}
	if (&scope.Permit{}).Valid() || (*scope.Permit)(nil).Valid() {
		t.Error("a permit that Check did not make is valid")
	}
}

// variations of scopes and actions, for the property of Contains.
func randomScope(r *rand.Rand) []byte {
	pick := func(all ...string) []string {
		var out []string
		for _, x := range all {
			if r.IntN(2) == 0 {
				out = append(out, x)
			}
		}
		return out
	}
	d := map[string]any{"version": 1, "allowed_actions": append(pick("order.replace", "quote.new"), "order.new"), "allowed_venues": append(pick("XLON"), "XPAR"),
		"allowed_instruments": []any{map[string]any{"id": "isin:FR0000120271"}}, "allowed_tif": append(pick("3"), "0"), "allowed_ord_types": pick("1", "2"), "allowed_sides": pick("1", "2", "5"),
		"max_order_notional": []any{map[string]any{"currency": "EUR", "amount": []string{"100", "200", "300"}[r.IntN(3)]}}}
	if r.IntN(2) == 0 {
		d["allowed_instruments"] = append(d["allowed_instruments"].([]any), map[string]any{"id": "symbol:X", "multiplier": []string{"1", "2"}[r.IntN(2)]})
	}
	if r.IntN(2) == 0 {
		d["allowed_accounts"] = pick("A", "B")
	}
	if r.IntN(2) == 0 {
		d["max_order_qty"] = []any{map[string]any{"instrument": []string{"*", "isin:FR0000120271"}[r.IntN(2)], "qty": []string{"1", "5", "9"}[r.IntN(3)]}}
	}
	if r.IntN(2) == 0 {
		d["price_collar_bps"] = map[string]any{"bps": 100 * (1 + r.IntN(3)), "source": "S", "max_age_ms": 1000}
	}
	if r.IntN(2) == 0 {
		d["trading_window"] = []any{map[string]any{"days": []string{"tue"}, "from": []string{"08:00", "10:00"}[r.IntN(2)], "to": "16:00"}}
	}
	if r.IntN(2) == 0 {
		d["max_attestation_age_s"] = []int{60, 3600}[r.IntN(2)]
		d["max_clock_divergence_us"] = []int{100, 1000}[r.IntN(2)]
	}
	if r.IntN(3) == 0 {
		d["source_networks"] = pick("192.0.2.0/25", "192.0.2.128/25", "2001:db8::/32")
		if r.IntN(2) == 0 {
			d["source_networks"] = []string{"192.0.2.0/24"}
		}
	}
	if r.IntN(3) == 0 {
		d["source_regions"] = pick("DE-HE", "FR", "FR-IDF"[:2+4*r.IntN(2)])
	}
	if r.IntN(3) == 0 {
		d["not_before"] = "2026-11-24T09:00:00Z"
	}
	b, _ := json.Marshal(d)
	return b
}

// mixed is a scope like one with a few members of another.
func mixed(r *rand.Rand, like, other []byte) []byte {
	a, b := make(map[string]any), make(map[string]any)
	if json.Unmarshal(like, &a) != nil || json.Unmarshal(other, &b) != nil {
		return nil
	}
	for _, k := range slices.Sorted(maps.Keys(b)) {
		if r.IntN(4) == 0 {
			a[k] = b[k]
		}
	}
	for _, k := range slices.Sorted(maps.Keys(a)) {
		if r.IntN(12) == 0 {
			delete(a, k)
		}
	}
	out, _ := json.Marshal(a)
	return out
}

func randomAction(r *rand.Rand) (*scope.Action, scope.Env) {
	o := map[string]any{"ClOrdID": "x", "SecurityID": "FR0000120271", "SecurityIDSource": "4", "Side": []string{"1", "2", "5"}[r.IntN(3)], "OrdType": "2",
		"Price": []string{"10", "10.2", "25"}[r.IntN(3)], "OrderQty": []string{"1", "5", "9", "12"}[r.IntN(4)], "Currency": "EUR", "TimeInForce": []string{"0", "3"}[r.IntN(2)]}
	if r.IntN(3) == 0 {
		o["SecurityID"], o["SecurityIDSource"] = "X", "8"
	}
	if r.IntN(3) == 0 {
		o["Account"] = []string{"A", "B"}[r.IntN(2)]
	}
	b, _ := json.Marshal(map[string]any{"id": "AAECAwQFBgcICQoLDA0ODw", "aud": []string{"XPAR", "XLON"}[r.IntN(2)], "act": "order.new", "ord": o})
	a, err := scope.ParseAction(b)
	if err != nil {
		panic(err)
	}
	now := time.Date(2026, 11, 24, 7+r.IntN(12), 0, 0, 0, time.UTC)
	price, _ := scope.ParseDecimal("10")
	return a, scope.Env{Now: now, Clock: &scope.Clock{Source: scope.ClockKernel, Divergence: uint64(r.IntN(1200))}, AttestedAt: now.Add(-time.Duration(r.IntN(120)) * time.Minute),
		Reference: &scope.ReferencePrice{Instrument: a.Instrument(), Price: price, Currency: "EUR", Source: "S", Time: now}}
}

// TestContains: what a contained scope permits, the other one permits too.
func TestContains(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	contained, permitted := 0, 0
	for range 20000 {
		outer, err := scope.Parse(randomScope(r))
		if err != nil {
			continue // allow_short and the like do not fit together
		}
		inner, err := scope.Parse(mixed(r, outer.Canonical(), randomScope(r)))
		if err != nil || scope.Contains(outer, inner) != nil {
			continue
		}
		contained++
		for range 20 {
			a, env := randomAction(r)
			if _, err := scope.Check(inner, a, env); err != nil {
				continue
			}
			permitted++
			if _, err := scope.Check(outer, a, env); err != nil {
				t.Fatalf("contained, but the outer one refuses: %v\nouter %s\ninner %s", err, outer.Canonical(), inner.Canonical())
			}
		}
	}
	if contained < 1000 || permitted < 100 {
		t.Fatalf("only %d pairs were contained and %d actions permitted: the test shows nothing", contained, permitted)
	}
}

func TestContainsItself(t *testing.T) {
	for _, v := range vectors(t) {
		s, err := scope.Parse(v.Scope)
		if err != nil {
			t.Fatal(err)
		}
		if err := scope.Contains(s, s); err != nil {
			t.Errorf("%s: a scope is wider than itself: %v", v.Name, err)
		}
	}
}

func FuzzDecimal(f *testing.F) {
	for _, s := range []string{"0", "61.24", "-1", "999999999999999999.99999999999999999", "1e5"} {
		f.Add(s, "2.5")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		x, err := scope.ParseDecimal(a)
		if err != nil {
			return
		}
		if x.String() != a {
			t.Fatalf("%q comes back as %q", a, x)
		}
		y, err := scope.ParseDecimal(b)
		if err != nil {
			return
		}
		rx, _ := new(big.Rat).SetString(a)
		ry, _ := new(big.Rat).SetString(b)
		if x.Cmp(y) != rx.Cmp(ry) {
			t.Errorf("Cmp(%s, %s) = %d", a, b, x.Cmp(y))
		}
		if sum, ok := x.Add(y); ok {
			rs, _ := new(big.Rat).SetString(sum.String())
			if rs.Cmp(rx.Add(rx, ry)) != 0 {
				t.Errorf("%s + %s = %s", a, b, sum)
			}
		}
	})
}

func FuzzParseScope(f *testing.F) {
	for _, v := range vectors(f) {
		f.Add([]byte(v.Scope))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := scope.Parse(b)
		if err != nil {
			return
		}
		again, err := scope.ParseCanonical(s.Canonical())
		if err != nil || again.Hash() != s.Hash() {
			t.Fatalf("the canonical form %s does not parse to itself: %v", s.Canonical(), err)
		}
		s.Describe()
	})
}

func FuzzParseAction(f *testing.F) {
	for _, v := range vectors(f) {
		f.Add([]byte(v.Action))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := scope.ParseAction(b)
		if err != nil {
			if r, ok := errors.AsType[*scope.Refusal](err); !ok || r.Rule != scope.RuleForm {
				t.Fatalf("an error without a rule: %v", err)
			}
			return
		}
		c, err := a.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := scope.ParseAction(c); err != nil || again.ID != a.ID {
			t.Fatalf("the canonical form does not parse: %v", err)
		}
	})
}

func statement(t testing.TB) []byte {
	t.Helper()
	j, err := os.ReadFile("../examples/order.json")
	if err != nil {
		t.Fatal(err)
	}
	a, err := scope.ParseAction(j)
	if err != nil {
		t.Fatal(err)
	}
	st := scope.Statement{Version: 1, Issuer: "CN=CA", Agent: "spiffe://e/agent/a", Audience: a.Audience, ID: a.ID, Counter: 1, Time: scope.Timestamp{Time: time.Unix(1, 0).UTC()}, Expires: 31,
		Kind: a.Kind, Order: a.Order, Party: a.Party, Decision: scope.Decision{Decision: scope.DecisionPermit}, Attestation: scope.Attestation{Time: scope.Timestamp{Time: time.Unix(0, 0).UTC()}}}
	b, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStatement(t *testing.T) {
	b := statement(t)
	if err := valid(t, schema(t, "statement"), b); err != nil {
		t.Errorf("the schema refuses the statement: %v", err)
	}
	if _, err := scope.ParseStatement(b); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{
		`"ver":1`: `"ver":2`, `"ctr":"1"`: `"ctr":"01"`, `{"act"`: `{ "act"`, `"dec":"permit"`: `"dec":"perhaps"`, `"ctr":"1" `: ``, `"ts":"1970-01-01T00:00:01.000000Z"`: `"ts":"1970-01-01T00:00:01Z"`,
		`"Price":"61.24"`: `"Price":"61.240"`, `"dec":"permit","`: `"dec":"deny","`,
	} {
		if changed := strings.Replace(string(b), from, to, 1); changed != string(b) {
			if _, err := scope.ParseStatement([]byte(changed)); err == nil {
				t.Errorf("%s in the place of %s was accepted", to, from)
			}
		}
	}
}

func FuzzStatement(f *testing.F) {
	f.Add(statement(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		st, err := scope.ParseStatement(b)
		if err != nil {
			return
		}
		again, err := st.Marshal()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("another spelling was accepted: %s", b)
		}
	})
}

// BenchmarkCheck permits an order under a scope that has a member of every kind.
func BenchmarkCheck(b *testing.B) {
	s, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.new","order.replace","quote.new"],"allowed_venues":["XLON","XPAR"],
		"allowed_instruments":[{"id":"isin:DE000A0F5UH1","multiplier":"10"},{"id":"isin:FR0000120271"},{"id":"symbol:X"}],"allowed_sides":["1","2"],"allowed_ord_types":["1","2"],"allowed_tif":["0","3"],
		"allowed_accounts":["A","B"],"allowed_clients":["C-1"],"max_order_notional":[{"currency":"EUR","amount":"25000"},{"currency":"USD","amount":"25000"}],"max_order_qty":[{"instrument":"*","qty":"1000"}],
		"trading_window":[{"days":["mon","tue","wed","thu","fri"],"from":"07:00","to":"15:30"}],"not_before":"2026-01-01T00:00:00Z","not_after":"2027-01-01T00:00:00Z","max_attestation_age_s":86400,` +
		strings.Replace(allLimits, "1000000,", "500,", 1) + `}`))
	if err != nil {
		b.Fatal(err)
	}
	a, err := scope.ParseAction([]byte(`{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-991","Account":"A","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2",
		"Price":"61.24","OrderQty":"400","Currency":"EUR","TimeInForce":"0"},"pty":{"client":"C-1","exe":{"algo":"LLM-MM-07"}}}`))
	if err != nil {
		b.Fatal(err)
	}
	price, _ := scope.ParseDecimal("61.2")
	env := scope.Env{Now: noon, AttestedAt: noon.Add(-time.Hour), Reference: &scope.ReferencePrice{Instrument: "isin:FR0000120271", Price: price, Currency: "EUR", Source: "S", Time: noon}}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := scope.Check(s, a, env); err != nil {
			b.Fatal(err)
		}
	}
}
