package scope_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"inkan/scope"
)

// randomLimits are limits over time, few of each kind.
func randomLimits(r *rand.Rand) map[string]any {
	d := make(map[string]any)
	window := func() any {
		return []any{map[string]any{"rolling_s": 60}, map[string]any{"rolling_s": 600}, map[string]any{"day_cut": "12:30"}, map[string]any{"day_cut": "17:30", "tz": "Europe/Paris"}}[r.IntN(4)]
	}
	some := func(name string, one func() map[string]any) {
		if r.IntN(2) == 0 {
			x := one()
			if r.IntN(4) == 0 {
				x["block"] = "soft"
			}
			if name == "max_open_orders" {
				d[name] = x
			} else {
				d[name] = []any{x}
			}
		}
	}
	some("max_notional_per_window", func() map[string]any {
		return map[string]any{"currency": "EUR", "amount": fmt.Sprint(20 + 20*r.IntN(4)), "window": window()}
	})
	some("max_qty_per_window", func() map[string]any {
		return map[string]any{"instrument": []string{"*", "symbol:X"}[r.IntN(2)], "qty": fmt.Sprint(10 + 10*r.IntN(3)), "window": window()}
	})
	some("max_orders_per_window", func() map[string]any { return map[string]any{"count": 2 + r.IntN(4), "window": window()} })
	some("max_messages_per_window", func() map[string]any {
		x := map[string]any{"count": 2 + r.IntN(4), "window": window()}
		if r.IntN(2) == 0 {
			x["venue"] = "XPAR"
		}
		return x
	})
	some("price_collar_window_bps", func() map[string]any { return map[string]any{"bps": 100 * r.IntN(4), "window": window()} })
	some("max_instruments", func() map[string]any { return map[string]any{"count": 1 + r.IntN(2), "window": window()} })
	some("max_venues", func() map[string]any { return map[string]any{"count": 1 + r.IntN(2), "window": window()} })
	some("max_open_orders", func() map[string]any { return map[string]any{"count": 1 + r.IntN(4)} })
	some("max_open_notional", func() map[string]any {
		return map[string]any{"currency": "EUR", "amount": fmt.Sprint(20 + 20*r.IntN(4))}
	})
	some("repeat_execution_throttle", func() map[string]any {
		x := map[string]any{"count": 2 + r.IntN(4), "window": window()}
		if r.IntN(2) == 0 {
			x["per"] = "strategy"
		}
		return x
	})
	if r.IntN(2) == 0 {
		d["duplicate_window_ms"] = 1000 * (1 + r.IntN(3))
	}
	return d
}

func withLimits(limits map[string]any) ([]byte, error) {
	d := map[string]any{"version": 1, "allowed_actions": []string{"order.new", "order.replace"}, "allowed_venues": []string{"XLON", "XPAR"}, "allowed_instruments": []any{map[string]any{"id": "symbol:X"}, map[string]any{"id": "symbol:Y"}},
		"allowed_sides": []string{"1"}, "allowed_ord_types": []string{"2"}, "allowed_tif": []string{"0", "3"}, "max_order_notional": []any{map[string]any{"currency": "EUR", "amount": "1000"}},
		"price_collar_bps": map[string]any{"bps": 1000000, "source": "S", "max_age_ms": 1000}}
	for k, v := range limits {
		d[k] = v
	}
	return json.Marshal(d)
}

// containsOverTime checks, for one pair of scopes and one history, that what the
// inner one permits the outer one permits too.
func containsOverTime(t *testing.T, r *rand.Rand) (contained bool) {
	limits := randomLimits(r)
	text, err := withLimits(limits)
	if err != nil {
		t.Fatal(err)
	}
	outer, err := scope.Parse(text)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	for k, v := range randomLimits(r) {
		if _, there := limits[k]; r.IntN(3) == 0 || !there && r.IntN(2) == 0 {
			limits[k] = v
		}
	}
	if text, err = withLimits(limits); err != nil {
		t.Fatal(err)
	}
	inner, err := scope.Parse(text)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	if scope.Contains(outer, inner) != nil {
		return false
	}
	book, at, one := scope.NewBook(), noon, int64(0)
	for i := range 40 {
		at = at.Add([]time.Duration{time.Millisecond, time.Second, 20 * time.Second, time.Hour}[r.IntN(4)])
		o := order{"order.new", fmt.Sprint(i), "", []string{"X", "Y"}[r.IntN(2)], []string{"1", "1.01", "1.03"}[r.IntN(3)], fmt.Sprint(1 + r.IntN(12)), []string{"0", "3"}[r.IntN(2)], "", []string{"", "A"}[r.IntN(2)], []string{"XPAR", "XLON"}[r.IntN(2)]}
		if r.IntN(3) == 0 && i > 0 {
			o.kind, o.replaces = "order.replace", fmt.Sprint(r.IntN(i))
		}
		u := o.use(t, inner, at)
		if book.Check(inner, u) != nil {
			continue
		}
		if refusal := book.Check(outer, u); refusal != nil {
			t.Fatalf("contained, but after %d orders the outer one refuses: %v\nouter %s\ninner %s", one, refusal, outer.Canonical(), inner.Canonical())
		}
		book.Add(u)
		one++
	}
	return true
}

func TestContainsOverTime(t *testing.T) {
	contained := 0
	for seed := range uint64(400) {
		if containsOverTime(t, rand.New(rand.NewPCG(seed, 3))) {
			contained++
		}
	}
	if contained < 40 {
		t.Errorf("only %d pairs were contained: the test shows nothing", contained)
	}
}

func FuzzContainsOverTime(f *testing.F) {
	f.Add(uint64(1), uint64(2))
	f.Fuzz(func(t *testing.T, a, b uint64) { containsOverTime(t, rand.New(rand.NewPCG(a, b))) })
}

// TestOpenIsBounded: under a limit of what is open no more is permitted than is
// remembered; otherwise the oldest is forgotten, and a chain of replacements
// does not grow without end.
func TestOpenIsBounded(t *testing.T) {
	s := fullScope(t)
	b := scope.NewBook()
	u := order{"order.new", "1", "", "X", "1", "1", "1", "", "", "XPAR"}.use(t, s, noon)
	for i := range scope.MaxOpen {
		u.ClOrdID = fmt.Sprint(i)
		b.Add(u)
	}
	u.ClOrdID, u.At = "one more", noon.Add(time.Second)
	few := overTime(t, `"max_open_orders":{"count":100000}`)
	if r := b.Check(few, u); r == nil || r.Rule != scope.RuleOpenOrders || r.Used != "100000" {
		t.Errorf("with %d open orders: %v", scope.MaxOpen, r)
	}
	worth, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.new"],"allowed_venues":["XPAR"],"allowed_instruments":[{"id":"symbol:X"}],"allowed_tif":["1"],"max_order_notional":[{"currency":"EUR","amount":"10"}],"max_open_notional":[{"currency":"EUR","amount":"100000000"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if r := b.Check(worth, u); r == nil || r.Rule != scope.RuleOpenNotional || !strings.Contains(r.Message, "no more are remembered") {
		t.Errorf("with %d open orders: %v", scope.MaxOpen, r)
	}
	b.Add(u) // as under a scope without such limits
	u.Kind, u.ClOrdID, u.Replaces = scope.OrderReplace, "r", "0"
	if got := b.Utilisation(worth, u)[0].Used; got != "100001" {
		t.Errorf("the oldest is forgotten, so its replacement is a new order: %s are open", got)
	}
	u.Replaces = "1"
	if got := b.Utilisation(worth, u)[0].Used; got != "100000" {
		t.Errorf("a replacement of the second one: %s are open", got)
	}

	// A chain.
	b = scope.NewBook()
	u.Kind, u.ClOrdID, u.Replaces = scope.OrderNew, "0", ""
	b.Add(u)
	u.Kind = scope.OrderReplace
	for i := 1; i < 256; i++ {
		u.ClOrdID, u.Replaces = fmt.Sprint(i), fmt.Sprint(i-1)
		b.Add(u)
	}
	u.ClOrdID, u.Replaces = "256", "255"
	if got := b.Utilisation(worth, u)[0].Used; got != "2" {
		t.Errorf("the 256th replacement counts as a new order: %s are open", got)
	}
}

func TestBadLimits(t *testing.T) {
	w := `"window":{"rolling_s":60}`
	for limits, want := range map[string]string{
		`"max_venues":[{"count":1,"window":{"day_cut":"22:00","tz":"Paris"}}]`:                    "time zone database",
		`"max_venues":[{"count":1,"window":{"day_cut":"22:00","tz":"Local"}}]`:                    "time zone database",
		`"max_venues":[{"count":1,"window":{"day_cut":"22:00","tz":"../../etc/localtime"}}]`:      "time zone database",
		`"max_venues":[{"count":1,"window":{"day_cut":"22:00","tz":"Europe/Nowhere"}}]`:           "time zone database",
		`"max_venues":[{"count":1,"window":{"rolling_s":60,"tz":"Europe/Paris"}}]`:                "tz belongs to day_cut",
		`"max_venues":[{"count":1,"window":{"rolling_s":86401}}]`:                                 "at most 86400",
		`"max_venues":[{"count":1,` + w + `},{"count":2,` + w + `}]`:                              "stands twice",
		`"price_collar_window_bps":[{"bps":1,` + w + `}]`:                                         "needs price_collar_bps",
		`"max_open_orders":{"count":100001}`:                                                      "at most 100000",
		`"max_open_orders":{"count":1,"block":"mild"}`:                                            "hard or soft",
		`"max_open_notional":[{"currency":"EUR","amount":"-1"}]`:                                  "at least 0",
		`"max_open_notional":[{"currency":"EUR","amount":"1"},{"currency":"EUR","amount":"2"}]`:   "stands twice",
		`"repeat_execution_throttle":[{"count":0,` + w + `}]`:                                     "count above 0",
		`"repeat_execution_throttle":[{"count":1,"per":"desk",` + w + `}]`:                        "agent or strategy",
		`"repeat_execution_throttle":[{"count":1,"per":"agent",` + w + `},{"count":2,` + w + `}]`: "stands twice",
		`"max_messages_per_window":[{"count":1,"venue":"paris",` + w + `}]`:                       "a MIC such as XPAR",
		`"duplicate_window_ms":3600001`:                                                           "at most 3600000",
	} {
		_, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],` + limits + `}`))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want something about %q", limits, err, want)
		}
	}
	// hard and agent have one spelling: absent.
	s, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"repeat_execution_throttle":[{"count":1,"per":"agent","block":"hard",` + w + `}]}`))
	if err != nil || !strings.HasSuffix(string(s.Canonical()), `"repeat_execution_throttle":[{"count":1,`+w+`}],"version":1}`) {
		t.Errorf("%s, %v", s.Canonical(), err)
	}
}

// TestExplainEach: every limit that refuses is named, with what is left.
func TestExplainEach(t *testing.T) {
	s := overTime(t, `"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"rolling_s":60}}],"max_orders_per_window":[{"count":1,"window":{"rolling_s":60},"block":"soft"}]`)
	b := scope.NewBook()
	b.Add(trade(t, s, noon, "order.new", "1", "", "X", "70"))
	all := b.Explain(s, trade(t, s, noon.Add(time.Second), "order.new", "2", "", "X", "31"))
	if len(all) != 2 || !errors.Is(all[0], &scope.Refusal{Rule: scope.RuleNotionalWindow}) || all[0].Used != "70" || all[0].Left != "30" || all[0].Value != "101" || all[0].Excess != "1" || all[0].Key != "EUR" ||
		!errors.Is(all[1], &scope.Refusal{Rule: scope.RuleOrdersWindow}) || all[1].Left != "0" || all[1].Block != scope.Soft {
		t.Errorf("%+v", all)
	}
	if all := b.Explain(s, trade(t, s, noon.Add(time.Minute), "order.new", "2", "", "X", "31")); all != nil {
		t.Errorf("a minute later: %v", all)
	}
}

// TestUsageOfStrategies: an agent that invents names does not flood the operators' view.
func TestUsageOfStrategies(t *testing.T) {
	s := overTime(t, `"repeat_execution_throttle":[{"count":10,"window":{"rolling_s":60},"per":"strategy"}]`)
	b := scope.NewBook()
	u := order{"order.new", "1", "", "X", "1", "1", "0", "", "", "XPAR"}.use(t, s, noon)
	for i := range 500 {
		u.Strategy, u.ClOrdID = fmt.Sprint(i), fmt.Sprint(i)
		b.Add(u)
	}
	u.Strategy = "499"
	b.Add(u)
	usage := b.Usage(s, noon)
	if len(usage) != 64 || usage[len(usage)-1].Key != "499" || usage[len(usage)-1].Used != "2" {
		t.Errorf("%d are listed: %v", len(usage), usage)
	}
	if usage := b.Usage(s, noon.Add(time.Minute)); len(usage) != 0 {
		t.Errorf("a minute later %d are listed", len(usage))
	}
}
