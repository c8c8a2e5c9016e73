package audit_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"inkan/audit"
	"inkan/scope"
)

// TestAskedAhead: what was asked for a later moment and not recorded, since it was
// there already or was refused, takes nothing from what an earlier one counts.
func TestAskedAhead(t *testing.T) {
	text := strings.Replace(scopeJSON, `"max_order_notional"`, `"max_notional_per_window":[{"amount":"9000","currency":"EUR","window":{"rolling_s":60}}],"max_open_orders":{"count":9},"max_order_notional"`, 1)
	canonical, err := scope.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	d := newDeskWith(t, string(canonical.Canonical()))
	begin := time.Now().Add(-30 * time.Second).UTC().Truncate(time.Microsecond)
	record := func(n uint64, name string, at time.Time) {
		t.Helper()
		a := action(n, "100") // 5000
		a.Order.ClOrdID = name
		p, err := scope.Check(d.scope, a, scope.Env{Now: at, AttestedAt: at})
		if err != nil {
			t.Fatal(err)
		}
		r, err := d.log.Record(context.Background(), p, d.id)
		if err == nil {
			d.sign(t, r)
		}
		t.Logf("%d at %s: %v", n, at.Sub(begin), err)
	}
	record(1, "1", begin)
	record(1, "1", begin.Add(time.Minute)) // the first has left the window
	record(2, "2", begin.Add(time.Minute-time.Microsecond))
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.VerifyFile(t.Context(), d.path, audit.VerifyOptions{Roots: d.ca.Roots}); err != nil {
		t.Error(err)
	}
}
