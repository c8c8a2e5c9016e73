package scope_test

import (
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"inkan/scope"
)

// overTime is a scope with limits over time.
func overTime(t testing.TB, limits string) *scope.Scope {
	t.Helper()
	s, err := scope.Parse(fmt.Appendf(nil, `{"version":1,"allowed_actions":["order.new","order.replace"],"allowed_venues":["XPAR"],"allowed_instruments":[{"id":"symbol:X"},{"id":"symbol:Y"}],
		"allowed_sides":["1"],"allowed_ord_types":["2"],"allowed_tif":["0"],"max_order_notional":[{"currency":"EUR","amount":"1000000"}],%s}`, limits))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// trade is an order at a price of 1, so that its quantity is its notional.
func trade(t testing.TB, s *scope.Scope, at time.Time, kind, clOrdID, replaces, symbol, qty string) scope.Use {
	t.Helper()
	orig := ""
	if replaces != "" {
		orig = fmt.Sprintf(`"OrigClOrdID":%q,`, replaces)
	}
	a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":%q,"ord":{"ClOrdID":%q,%s"SecurityID":%q,"SecurityIDSource":"8","Side":"1","OrdType":"2","Price":"1","OrderQty":%q,"Currency":"EUR","TimeInForce":"0"}}`, kind, clOrdID, orig, symbol, qty))
	if err != nil {
		t.Fatal(err)
	}
	p, err := scope.Check(s, a, scope.Env{Now: at, AttestedAt: at})
	if err != nil {
		t.Fatal(err)
	}
	return scope.UseOf(p, at)
}

var noon = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// step is an order some time after noon, and what the book says.
type step struct {
	after   time.Duration
	kind    string
	id, old string
	symbol  string
	qty     string
	rule    scope.Rule // empty: allowed
}

func TestWindows(t *testing.T) {
	const us = time.Microsecond
	neu := func(after time.Duration, id, qty string, rule scope.Rule) step {
		return step{after, "order.new", id, "", "X", qty, rule}
	}
	for name, c := range map[string]struct {
		limits string
		steps  []step
	}{
		"a rolling window's sum, at and above its bound": {`"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "60", ""), neu(1, "2", "40.01", scope.RuleNotionalWindow), neu(2, "3", "40", ""), neu(3, "4", "0.00000000000000001", scope.RuleNotionalWindow)}},
		"a rolling window's edge to the microsecond": {`"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "100", ""), neu(60*time.Second-us, "2", "1", scope.RuleNotionalWindow), neu(60*time.Second, "3", "100", "")}},
		"salami slices": {`"max_notional_per_window":[{"currency":"EUR","amount":"3","window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "1", ""), neu(1, "2", "1", ""), neu(2, "3", "1", ""), neu(3, "4", "1", scope.RuleNotionalWindow), neu(4, "5", "0.1", scope.RuleNotionalWindow)}},
		"a day's edge to the microsecond": {`"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"day_cut":"12:30"}}]`, []step{
			neu(0, "1", "100", ""), neu(30*time.Minute-us, "2", "1", scope.RuleNotionalWindow), neu(30*time.Minute, "3", "100", ""), neu(24*time.Hour, "4", "1", scope.RuleNotionalWindow), neu(24*time.Hour+30*time.Minute, "5", "1", "")}},
		"quantities of each instrument": {`"max_qty_per_window":[{"instrument":"*","qty":"5","window":{"rolling_s":60}},{"instrument":"symbol:Y","qty":"2","window":{"rolling_s":60}}]`, []step{
			{0, "order.new", "1", "", "X", "5", ""}, {1, "order.new", "2", "", "X", "1", scope.RuleQtyWindow}, {2, "order.new", "3", "", "Y", "3", scope.RuleQtyWindow}, {3, "order.new", "4", "", "Y", "2", ""}}},
		"numbers of orders": {`"max_orders_per_window":[{"count":2,"window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "1", ""), neu(1, "2", "1", ""), neu(2, "3", "1", scope.RuleOrdersWindow), {3, "order.replace", "4", "2", "X", "1", ""}, neu(60*time.Second, "5", "1", "")}},
		"numbers of messages": {`"max_messages_per_window":[{"count":2,"window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "1", ""), {1, "order.replace", "2", "1", "X", "1", ""}, {2, "order.replace", "3", "2", "X", "1", scope.RuleMessagesWindow}, neu(3, "4", "1", scope.RuleMessagesWindow)}},
		"a replacement counts what it adds": {`"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "90", ""), {1, "order.replace", "2", "1", "X", "100", ""}, {2, "order.replace", "3", "2", "X", "100.1", scope.RuleNotionalWindow}, {3, "order.replace", "3", "2", "X", "50", ""}, {4, "order.replace", "4", "3", "X", "51", scope.RuleNotionalWindow}}},
		"a replacement of an unknown order counts whole": {`"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "90", ""), {1, "order.replace", "2", "unknown", "X", "11", scope.RuleNotionalWindow}}},
		"an order is replaced once": {`"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "90", ""), {1, "order.replace", "2", "1", "X", "90", ""}, {2, "order.replace", "3", "1", "X", "90", scope.RuleNotionalWindow}, {3, "order.replace", "3", "2", "X", "90", ""}}},
		"a replacement in another instrument counts whole": {`"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "90", ""), {1, "order.replace", "2", "1", "Y", "11", scope.RuleNotionalWindow}}},
		"a replacement after a day counts whole": {`"max_notional_per_window":[{"currency":"EUR","amount":"100","window":{"rolling_s":60}}]`, []step{
			neu(0, "1", "90", ""), neu(24*time.Hour-time.Second, "2", "50", ""), {24*time.Hour + 1000, "order.replace", "3", "1", "X", "90", scope.RuleNotionalWindow}}},
		"the same order again": {`"duplicate_window_ms":1000`, []step{
			neu(0, "1", "7", ""), neu(time.Second-us, "2", "7", scope.RuleDuplicate), neu(time.Second-us, "3", "8", ""), neu(time.Second, "4", "7", "")}},
	} {
		t.Run(name, func(t *testing.T) {
			s, b := overTime(t, c.limits), scope.NewBook()
			if err := scope.Contains(s, s); err != nil {
				t.Errorf("it is wider than itself: %v", err)
			}
			if err := valid(t, schema(t, "scope"), s.Canonical()); err != nil {
				t.Errorf("the schema refuses it: %v", err)
			}
			for i, x := range c.steps {
				u := trade(t, s, noon.Add(x.after), x.kind, x.id, x.old, x.symbol, x.qty)
				r := b.Check(s, u)
				if x.rule == "" {
					if r != nil {
						t.Fatalf("step %d: refused: %v", i+1, r)
					}
					b.Add(u)
					continue
				}
				if r == nil || !errors.Is(r, &scope.Refusal{Rule: x.rule}) {
					t.Fatalf("step %d: got %v, want %s", i+1, r, x.rule)
				}
				if !r.FreeAt.IsZero() && !r.FreeAt.After(u.At) { // zero: it is too much on its own
					t.Errorf("step %d: free at %v", i+1, r.FreeAt)
				}
			}
		})
	}
}

// TestBookAgainstModel: over random histories the book decides as one that adds
// everything up anew each time.
func TestBookAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 40 {
		w := []string{`{"rolling_s":1}`, `{"rolling_s":60}`, `{"rolling_s":3600}`, `{"day_cut":"12:00"}`, `{"day_cut":"23:59"}`}[r.IntN(5)]
		limit := int64(1 + r.IntN(200))
		s := overTime(t, fmt.Sprintf(`"max_notional_per_window":[{"currency":"EUR","amount":"%d","window":%s}],"max_orders_per_window":[{"count":%d,"window":%s}]`, limit, w, limit/7+1, w))
		b := scope.NewBook()
		type done struct {
			at  time.Time
			qty *big.Rat
		}
		var history []done
		at := noon
		for i := range 400 {
			at = at.Add(time.Duration(r.Int64N(int64([]time.Duration{time.Microsecond, time.Second, time.Minute, 6 * time.Hour}[r.IntN(4)]) + 1)).Truncate(time.Microsecond))
			qty := fmt.Sprint(1 + r.IntN(40))
			u := trade(t, s, at, "order.new", fmt.Sprint(i), "", "X", qty)
			// The model.
			inside := func(x time.Time) bool {
				switch w[2] {
				case 'r':
					var secs int
					fmt.Sscanf(w, `{"rolling_s":%d}`, &secs)
					return x.After(at.Add(-time.Duration(secs) * time.Second))
				}
				cut := time.Date(at.Year(), at.Month(), at.Day(), 12, 0, 0, 0, time.UTC)
				if w == `{"day_cut":"23:59"}` {
					cut = time.Date(at.Year(), at.Month(), at.Day(), 23, 59, 0, 0, time.UTC)
				}
				if cut.After(at) {
					cut = cut.AddDate(0, 0, -1)
				}
				return !x.Before(cut)
			}
			sum, count := new(big.Rat), int64(0)
			for _, h := range history {
				if inside(h.at) {
					sum.Add(sum, h.qty)
					count++
				}
			}
			q, _ := new(big.Rat).SetString(qty)
			allowed := sum.Add(sum, q).Cmp(new(big.Rat).SetInt64(limit)) <= 0 && count < limit/7+1
			got := b.Check(s, u)
			if (got == nil) != allowed {
				t.Fatalf("window %s, limit %d, order %d: the book says %v, the model %v (sum %s, %d orders)", w, limit, i, got, allowed, sum.FloatString(0), count)
			}
			if got == nil {
				b.Add(u)
				history = append(history, done{at, q})
			}
		}
	}
}

// BenchmarkBook is what the record's writer does for an action under every limit
// over time: check, state what is used, count. The book has 100,000 uses.
func BenchmarkBook(b *testing.B) {
	s := fullScope(b)
	a := order{"order.new", "1", "", "X", "1.25", "40", "3", "", "A", "XPAR"}.action(b)
	u := order{"order.new", "1", "", "X", "1.25", "40", "3", "", "A", "XPAR"}.use(b, s, noon)
	fill := func() (*scope.Book, time.Time) {
		book, at := scope.NewBook(), noon
		for range 100_000 {
			at = at.Add(time.Second)
			u.At = at
			book.Add(u)
		}
		return book, at
	}
	one, _ := scope.ParseDecimal("1")
	p, err := scope.Check(s, a, scope.Env{Now: noon, AttestedAt: noon, Reference: &scope.ReferencePrice{Instrument: "symbol:X", Price: one, Currency: "EUR", Source: "S", Time: noon}})
	if err != nil {
		b.Fatal(err)
	}
	b.Run("use", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			scope.UseOf(p, noon)
		}
	})
	b.Run("check", func(b *testing.B) {
		book, at := fill()
		b.ReportAllocs()
		for b.Loop() {
			at = at.Add(time.Second)
			u.At = at
			if r := book.Check(s, u); r != nil {
				b.Fatal(r)
			}
		}
	})
	b.Run("utilisation", func(b *testing.B) {
		book, at := fill()
		b.ReportAllocs()
		for b.Loop() {
			at = at.Add(time.Second)
			u.At = at
			book.Utilisation(s, u)
		}
	})
	b.Run("add", func(b *testing.B) {
		book, at := fill()
		b.ReportAllocs()
		for b.Loop() {
			at = at.Add(time.Second)
			u.At = at
			book.Add(u)
		}
	})
	b.Run("check, utilisation and add", func(b *testing.B) {
		book, at := fill()
		b.ReportAllocs()
		for b.Loop() {
			at = at.Add(time.Second)
			u.At = at
			if r := book.Check(s, u); r != nil {
				b.Fatal(r)
			}
			book.Utilisation(s, u)
			book.Add(u)
		}
	})
}

func TestUsage(t *testing.T) {
	s := overTime(t, `"max_notional_per_window":[{"currency":"EUR","amount":"1000","window":{"rolling_s":60}},{"currency":"USD","amount":"5","window":{"rolling_s":60}}],
		"max_qty_per_window":[{"instrument":"*","qty":"1000","window":{"day_cut":"22:00"}},{"instrument":"symbol:X","qty":"20","window":{"day_cut":"22:00"}}],
		"max_orders_per_window":[{"count":3,"window":{"rolling_s":60}}]`)
	b := scope.NewBook()
	list := func(at time.Time) string {
		var out []string
		for _, u := range b.Usage(s, at) {
			out = append(out, fmt.Sprintf("%s %s %s/%s", u.Limit, u.Key, u.Used, u.Of))
		}
		return strings.Join(out, "\n")
	}
	if got, want := list(noon), "max_notional_per_window EUR 0/1000\nmax_notional_per_window USD 0/5\nmax_qty_per_window symbol:X 0/20\nmax_orders_per_window  0/3"; got != want {
		t.Errorf("an empty book:\n%s", got)
	}
	b.Add(trade(t, s, noon, "order.new", "1", "", "Y", "600"))
	if got, want := list(noon), "max_notional_per_window EUR 600/1000\nmax_notional_per_window USD 0/5\nmax_qty_per_window symbol:X 0/20\nmax_qty_per_window symbol:Y 600/1000\nmax_orders_per_window  1/3"; got != want {
		t.Errorf("after one order:\n%s", got)
	}
	if got, want := list(noon.Add(time.Minute)), "max_notional_per_window EUR 0/1000\nmax_notional_per_window USD 0/5\nmax_qty_per_window symbol:X 0/20\nmax_qty_per_window symbol:Y 600/1000\nmax_orders_per_window  0/3"; got != want {
		t.Errorf("a minute later:\n%s", got)
	}
	// A look ahead frees nothing for an order that comes with an earlier time.
	if r := b.Check(s, trade(t, s, noon.Add(time.Second), "order.new", "2", "", "Y", "500")); r == nil || r.Rule != scope.RuleNotionalWindow {
		t.Errorf("after a look at a later moment the window lets %v", r)
	}
}

// The two sizes of a quote are more together than a decimal can be. What stands
// after them in a series counts all the same.
func TestSizesOfAQuote(t *testing.T) {
	parse := func(m string) *scope.Scope {
		s, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.new","quote.new"],"allowed_venues":["XPAR"],"allowed_instruments":[{"id":"symbol:X"},{"id":"symbol:Y"}],
		"allowed_sides":["1","2"],"allowed_ord_types":["2"],"allowed_tif":["3"],"max_order_notional":[{"currency":"EUR","amount":"1000000"}]` + m + `}`))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	free, bound := parse(""), parse(`,"max_qty_per_window":[{"instrument":"symbol:X","qty":"10","window":{"rolling_s":60}}]`)
	b := scope.NewBook()
	use := func(s *scope.Scope, at time.Time, body string) scope.Use {
		a, err := scope.ParseAction([]byte(body))
		if err != nil {
			t.Fatal(err)
		}
		p, err := scope.Check(s, a, scope.Env{Now: at, AttestedAt: at})
		if err != nil {
			t.Fatal(err)
		}
		return scope.UseOf(p, at)
	}
	b.Add(use(free, noon, `{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"quote.new","ord":{"ClOrdID":"1","SecurityID":"X","SecurityIDSource":"8","BidPx":"0","BidSize":"999999999999999999","OfferPx":"0","OfferSize":"999999999999999999","Currency":"EUR","TimeInForce":"3"}}`))
	one := `{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"order.new","ord":{"ClOrdID":"1","SecurityID":"X","SecurityIDSource":"8","Side":"1","OrdType":"2","Price":"1","OrderQty":"6","Currency":"EUR","TimeInForce":"3"}}`
	b.Add(use(free, noon.Add(30*time.Second), one))
	text, _ := b.AppendBinary(nil)
	if err := scope.NewBook().UnmarshalBinary(text); err != nil {
		t.Error(err)
	}
	later := noon.Add(61 * time.Second)
	if b.Check(bound, use(bound, later, one)) == nil {
		t.Error("6 and 6 are more than 10")
	}
}
