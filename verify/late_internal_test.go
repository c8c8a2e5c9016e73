package verify

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"inkan/scope"
)

// TestRefusedAgain: a statement that arrives late and is refused may be sent again as
// fast as its sender can; it is judged once, until something is accepted.
func TestRefusedAgain(t *testing.T) {
	const n = 5000
	s, err := scope.Parse(fmt.Appendf(nil, `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"max_orders_per_window":[{"count":%d,"window":{"rolling_s":3600}}],"version":1}`, n))
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now().UTC().Truncate(time.Microsecond)
	one := func(i int, at time.Time) past {
		a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":"AAECAwQFBgcICQoLDA0ODw","aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-%d","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"61.24","OrderQty":"4","Currency":"EUR","TimeInForce":"0"}}`, i))
		if err != nil {
			t.Fatal(err)
		}
		p, err := scope.Check(s, a, scope.Env{Now: at, AttestedAt: at})
		if err != nil {
			t.Fatal(err)
		}
		u := scope.UseOf(p, at)
		u.Counter = scope.Counter(i + 1)
		return past{use: u, scope: s}
	}
	h := newHistory()
	for i := range n {
		count, err := h.admit(one(i, begin.Add(time.Duration(i)*time.Millisecond)), [32]byte{byte(i), byte(i >> 8), 1})
		if err != nil {
			t.Fatal(err)
		}
		count()
	}
	p, sum := one(n, begin.Add((n-5)*time.Millisecond)), [32]byte{2}
	took := func(times int) time.Duration {
		begun := time.Now()
		for range times {
			if _, err := h.admit(p, sum); !errors.Is(err, &Refusal{Reason: ReasonLimits}) {
				t.Fatal(err)
			}
		}
		return time.Since(begun)
	}
	first := took(1)
	if again := took(100); again > 20*first {
		t.Errorf("it took %s once, and %s a hundred times", first, again)
	}
	// When something is accepted it is judged anew.
	count, err := h.admit(one(n+1, begin.Add(2*time.Hour)), [32]byte{3})
	if err != nil {
		t.Fatal(err)
	}
	count()
	if len(h.refused) != 0 {
		t.Error("what was refused is remembered after a change")
	}
}
