package scope_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"inkan/scope"
)

// allLimits has every limit over time.
const allLimits = `"price_collar_bps":{"bps":1000000,"source":"S","max_age_ms":1000},"duplicate_window_ms":5,
 "max_notional_per_window":[{"currency":"EUR","amount":"1000000","window":{"rolling_s":60}},{"currency":"EUR","amount":"100000000","window":{"day_cut":"22:00","tz":"Europe/Paris"}}],
 "max_qty_per_window":[{"instrument":"*","qty":"100000","window":{"rolling_s":3600}},{"instrument":"symbol:X","qty":"100000000","window":{"rolling_s":86400}}],
 "max_orders_per_window":[{"count":100000,"window":{"rolling_s":3600}}],
 "max_messages_per_window":[{"count":100000,"window":{"rolling_s":60}},{"venue":"XPAR","count":90000,"window":{"rolling_s":60}}],
 "price_collar_window_bps":[{"bps":100000,"window":{"rolling_s":60}}],
 "max_instruments":[{"count":2,"window":{"day_cut":"00:00"}}],"max_venues":[{"count":2,"window":{"day_cut":"00:00"}}],
 "max_open_orders":{"count":100000},"max_open_notional":[{"currency":"EUR","amount":"100000000"}],
 "repeat_execution_throttle":[{"count":100000,"window":{"rolling_s":60}},{"count":90000,"window":{"rolling_s":60},"per":"strategy"}]`

// order is an action with what tests vary.
type order struct {
	kind, id, replaces, symbol, price, qty, tif, expire, algo, venue string
}

func (o order) action(t testing.TB) *scope.Action {
	t.Helper()
	more := ""
	if o.replaces != "" {
		more += fmt.Sprintf(`"OrigClOrdID":%q,`, o.replaces)
	}
	if o.expire != "" {
		more += fmt.Sprintf(`"ExpireTime":%q,`, o.expire)
	}
	party := ""
	if o.algo != "" {
		party = fmt.Sprintf(`,"pty":{"exe":{"algo":%q}}`, o.algo)
	}
	if o.venue == "" {
		o.venue = "XPAR"
	}
	a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":"AAECAwQFBgcICQoLDA0ODw","aud":%q,"act":%q,"ord":{"ClOrdID":%q,%s"SecurityID":%q,"SecurityIDSource":"8","Side":"1","OrdType":"2","Price":%q,"OrderQty":%q,"Currency":"EUR","TimeInForce":%q}%s}`,
		o.venue, o.kind, o.id, more, o.symbol, o.price, o.qty, o.tif, party))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// use checks the order against the scope alone and returns what it uses.
func (o order) use(t testing.TB, s *scope.Scope, at time.Time) scope.Use {
	t.Helper()
	a := o.action(t)
	one, _ := scope.ParseDecimal("1")
	p, err := scope.Check(s, a, scope.Env{Now: at, AttestedAt: at, Reference: &scope.ReferencePrice{Instrument: a.Instrument(), Price: one, Currency: "EUR", Source: "S", Time: at}})
	if err != nil {
		t.Fatal(err)
	}
	return scope.UseOf(p, at)
}

func fullScope(t testing.TB) *scope.Scope {
	t.Helper()
	s, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.new","order.replace"],"allowed_venues":["XPAR","XLON"],"allowed_instruments":[{"id":"symbol:X"},{"id":"symbol:Y"}],
		"allowed_sides":["1"],"allowed_ord_types":["2"],"allowed_tif":["0","1","3","6"],"max_order_notional":[{"currency":"EUR","amount":"1000000"}],` + allLimits + `}`))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// filled is a book after a number of random orders, and the time of the last one.
func filled(t testing.TB, s *scope.Scope, r *rand.Rand, n int) (*scope.Book, time.Time) {
	b, at := scope.NewBook(), noon
	pick := func(all ...string) string { return all[r.IntN(len(all))] }
	for i := range n {
		at = at.Add(time.Duration(r.IntN(5_000_000)) * time.Microsecond)
		o := order{"order.new", fmt.Sprint(i), "", pick("X", "Y"), pick("1", "1.25", "3.00000000000000001"), fmt.Sprint(1 + r.IntN(50)), pick("0", "1", "3", "6"), "", pick("", "A", "B"), pick("XPAR", "XLON")}
		if o.tif == "6" {
			o.expire = at.Add(time.Duration(r.IntN(7200)) * time.Second).UTC().Truncate(time.Second).Format(time.RFC3339)
		}
		if i > 0 && r.IntN(3) == 0 {
			o.kind, o.replaces = "order.replace", fmt.Sprint(r.IntN(i))
		}
		u := o.use(t, s, at)
		u.Counter = scope.Counter(i + 1)
		b.Add(u)
	}
	return b, at
}

func TestBookBinary(t *testing.T) {
	s, r := fullScope(t), rand.New(rand.NewPCG(5, 6))
	for _, n := range []int{0, 1, 20, 5000} {
		b, at := filled(t, s, r, n)
		form, err := b.AppendBinary(nil)
		if err != nil {
			t.Fatal(err)
		}
		var again scope.Book
		if err := again.UnmarshalBinary(form); err != nil {
			t.Fatalf("%d uses: %v", n, err)
		}
		if form2, _ := again.AppendBinary(nil); !bytes.Equal(form, form2) {
			t.Errorf("%d uses: the form of what was read is another one", n)
		}
		// Both go on alike.
		for i := range 300 {
			at = at.Add(time.Duration(r.IntN(300)) * time.Second)
			u := order{"order.replace", fmt.Sprint(n + i), fmt.Sprint(r.IntN(n + i + 1)), "X", "1", fmt.Sprint(1 + r.IntN(60)), "0", "", "A", "XPAR"}.use(t, s, at)
			if x, y := b.Check(s, u), again.Check(s, u); !reflect.DeepEqual(x, y) {
				t.Fatalf("%d uses, then %d: %v and %v", n, i, x, y)
			}
			if x, y := b.Utilisation(s, u), again.Utilisation(s, u); !reflect.DeepEqual(x, y) {
				t.Fatalf("%d uses, then %d:\n%v\n%v", n, i, x, y)
			}
			b.Add(u)
			again.Add(u)
		}
		for i := range form { // never a panic, and never a book out of half a form
			if err := new(scope.Book).UnmarshalBinary(form[:i]); err == nil {
				t.Fatalf("%d uses: the first %d bytes were accepted", n, i)
			}
			if i > 2000 {
				break
			}
		}
	}
	if err := new(scope.Book).UnmarshalBinary([]byte{9}); err == nil {
		t.Error("another version was accepted")
	}
}

func FuzzBookBinary(f *testing.F) {
	s := fullScope(f)
	for _, n := range []int{0, 1, 30} {
		b, _ := filled(f, s, rand.New(rand.NewPCG(1, uint64(n))), n)
		form, _ := b.AppendBinary(nil)
		f.Add(form)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var b scope.Book
		if b.UnmarshalBinary(data) != nil {
			return
		}
		form, _ := b.AppendBinary(nil)
		var again scope.Book
		if err := again.UnmarshalBinary(form); err != nil {
			t.Fatalf("what was read cannot be read again: %v", err)
		}
		if form2, _ := again.AppendBinary(nil); !bytes.Equal(form, form2) {
			t.Fatal("its form is not stable")
		}
		b.Usage(s, noon)
	})
}

// TestBookMemory: what a use takes in memory, of the busiest kind of day.
func TestBookMemory(t *testing.T) {
	b, n := scope.NewBook(), 200_000
	s := fullScope(t)
	u := order{"order.new", "1", "", "X", "61.24", "400", "3", "", "A", "XPAR"}.use(t, s, noon)
	for i := range n {
		u.At = noon.Add(time.Duration(i) * 8 * time.Millisecond)
		b.Add(u)
	}
	form, _ := b.AppendBinary(nil)
	per := float64(len(form)) / float64(n)
	t.Logf("%.1f bytes a use", per)
	if per > 40 {
		t.Errorf("a use takes %.1f bytes, at most 40 are expected", per)
	}
}
