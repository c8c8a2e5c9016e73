package audit_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"inkan/scope"
)

// everyLimit is a scope with every limit over time, none of which a benchmark reaches.
func everyLimit(t testing.TB) string {
	t.Helper()
	w := `{"rolling_s":60}`
	s, err := scope.Parse([]byte(strings.Replace(scopeJSON, `"version":1`, `"price_collar_bps":{"bps":1000,"source":"S","max_age_ms":86400000},"duplicate_window_ms":1,
		"max_notional_per_window":[{"currency":"EUR","amount":"100000000000","window":`+w+`},{"currency":"EUR","amount":"1000000000000","window":{"day_cut":"17:30","tz":"Europe/Paris"}}],
		"max_qty_per_window":[{"instrument":"*","qty":"100000000","window":`+w+`}],"max_orders_per_window":[{"count":10000000,"window":`+w+`}],
		"max_messages_per_window":[{"count":10000000,"window":`+w+`},{"venue":"XPAR","count":10000000,"window":`+w+`}],"price_collar_window_bps":[{"bps":1000,"window":`+w+`}],
		"max_instruments":[{"count":5,"window":{"day_cut":"00:00"}}],"max_venues":[{"count":5,"window":{"day_cut":"00:00"}}],"max_open_orders":{"count":100000},
		"max_open_notional":[{"currency":"EUR","amount":"1000000000000"}],"repeat_execution_throttle":[{"count":10000000,"window":`+w+`},{"count":10000000,"window":`+w+`,"per":"strategy"}],"version":1`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(string(s.Canonical()), `"allowed_tif":["0"]`, `"allowed_tif":["3"]`, 1)
}

func BenchmarkRecord(b *testing.B) {
	benchmarkRecord(b, func(b *testing.B) (*desk, func(n uint64) *scope.Permit) {
		d := newDesk(b)
		return d, func(n uint64) *scope.Permit { return permit(b, d.scope, action(n, "100")) }
	})
}

// BenchmarkRecordEveryLimit is the same under every limit over time.
func BenchmarkRecordEveryLimit(b *testing.B) {
	price, _ := scope.ParseDecimal("50")
	benchmarkRecord(b, func(b *testing.B) (*desk, func(n uint64) *scope.Permit) {
		d := newDeskWith(b, everyLimit(b))
		return d, func(n uint64) *scope.Permit {
			a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":%q,"aud":"XPAR","act":"order.new","ord":{"ClOrdID":"A-%d","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"50","OrderQty":"%d","Currency":"EUR","TimeInForce":"3"},"pty":{"exe":{"algo":"A"}}}`, id(n), n, 1+n%499))
			if err != nil {
				b.Fatal(err)
			}
			now := time.Now()
			p, err := scope.Check(d.scope, a, scope.Env{Now: now, AttestedAt: now, Reference: &scope.ReferencePrice{Instrument: "isin:FR0000120271", Price: price, Currency: "EUR", Source: "S", Time: now.Add(-time.Second)}})
			if err != nil {
				b.Fatal(err)
			}
			return p
		}
	})
}

func benchmarkRecord(b *testing.B, start func(*testing.B) (*desk, func(uint64) *scope.Permit)) {
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			d, permit := start(b)
			var n atomic.Uint64
			var calls sync.WaitGroup
			b.ResetTimer()
			for range callers {
				calls.Go(func() {
					for {
						k := n.Add(1)
						if k > uint64(b.N) {
							return
						}
						if _, err := d.log.Record(context.Background(), permit(k), d.id); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			calls.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "decisions/s")
		})
	}
}
