package verify_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/scope"
	"inkan/verify"
)

// lifter sends orders with authorizations of a controller who may all, or of others.
type lifter struct {
	*venue
	risk, nobody *ecdsa.PrivateKey
	begin        time.Time
}

// newLifter is at a venue whose agent has a scope with some limits and a controller.
func newLifter(t *testing.T, members string) *lifter {
	t.Helper()
	x := &lifter{venue: newVenue(t), begin: time.Now().UTC().Truncate(us).Add(-10 * time.Second)}
	for _, k := range []**ecdsa.PrivateKey{&x.risk, &x.nobody} {
		var err error
		if *k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	key, err := scope.ControllerKey(&x.risk.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	x.rescope(t, fmt.Sprintf(`"controllers":[{"key":%q,"may":["approve","override"],"name":"risk"}],`, key)+members)
	return x
}

// signed makes an authorization of an action for a limit.
type signed func(*scope.Action) string

func (x *lifter) by(t *testing.T, key *ecdsa.PrivateKey, rule scope.Rule) signed {
	return func(a *scope.Action) string {
		t.Helper()
		return x.until(t, key, rule, time.Hour)(a)
	}
}

func (x *lifter) until(t *testing.T, key *ecdsa.PrivateKey, rule scope.Rule, life time.Duration) signed {
	return func(a *scope.Action) string {
		t.Helper()
		now := x.begin.Truncate(time.Second)
		text, err := scope.SignAuthorization(key, x.agent.ID, a, rule, "client is waiting", now, now.Add(life))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
}

// order is one of some shares at 50, the n-th of the record, which is from n
// seconds after the beginning.
func (x *lifter) order(t *testing.T, n, qty int, list ...signed) []byte {
	t.Helper()
	return []byte(x.action(t, func(s *scope.Statement) {
		s.Counter, s.Previous, s.Order.ClOrdID, s.Order.OrderQty = scope.Counter(n)+1, scope.Digest{1}, fmt.Sprint(n), dec(fmt.Sprint(qty))
		s.Time.Time = x.begin.Add(time.Duration(n) * time.Second)
		s.Expires = s.Time.Time.Add(time.Minute).Unix()
		for _, f := range list {
			s.Authorized = append(s.Authorized, f(s.Action()))
		}
		s.Decision.Notional.Amount = *dec(fmt.Sprint(50 * qty))
	}))
}

// eachStore runs a test with each kind of store. again is another receiver's view
// of the same store, or the same one where it has but one.
func eachStore(t *testing.T, test func(t *testing.T, again func(*testing.T) verify.ReplayStore)) {
	t.Run("memory", func(t *testing.T) {
		store := verify.NewMemoryStore(1000, time.Time{})
		test(t, func(*testing.T) verify.ReplayStore { return store })
	})
	t.Run("SQLite", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "seen.db")
		test(t, func(t *testing.T) verify.ReplayStore {
			return opened(t, func() (*verify.SQLStore, error) { return verify.OpenSQLiteStore(context.Background(), file) })
		})
	})
	t.Run("PostgreSQL", func(t *testing.T) {
		open := shared(t)
		test(t, func(t *testing.T) verify.ReplayStore { return opened(t, open) })
	})
}

// TestLifted: an authorization lifts the soft limit over time that it names, for its action, and
// what was lifted counts.
func TestLifted(t *testing.T) {
	eachStore(t, func(t *testing.T, again func(*testing.T) verify.ReplayStore) {
		x := newLifter(t, `"max_notional_per_window":[{"amount":"10000","block":"soft","currency":"EUR","window":{"rolling_s":60}},{"amount":"20000","currency":"EUR","window":{"rolling_s":3600}}],"max_orders_per_window":[{"count":4,"window":{"rolling_s":60}}]`)
		x.config.Replay = again(t)
		r := x.receiver(t)
		try := func(what string, want verify.Reason, text string, jws []byte) {
			t.Helper()
			_, err := r.Verify(t.Context(), jws, nil)
			reason(t, what, want, err)
			if want != "" && err != nil && !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v, something about %s is expected", what, err, text)
			}
		}
		lifts := x.by(t, x.risk, scope.RuleNotionalWindow)
		try("the first", "", "", x.order(t, 1, 150))
		try("the second", verify.ReasonLimits, "max_notional_per_window", x.order(t, 2, 100))
		try("another limit was lifted", verify.ReasonLimits, "max_notional_per_window", x.order(t, 2, 100, x.by(t, x.risk, scope.RuleOrdersWindow)))
		try("lifted by nobody", verify.ReasonScope, "control_key", x.order(t, 2, 100, x.by(t, x.nobody, scope.RuleNotionalWindow)))
		try("another signature", verify.ReasonScope, "control_signature", x.order(t, 2, 100, func(a *scope.Action) string { s := lifts(a); return s[:len(s)-8] + "AAAAAAAA" }))
		try("expired", verify.ReasonScope, "control_time", x.order(t, 2, 100, x.until(t, x.risk, scope.RuleNotionalWindow, time.Second)))
		try("for a smaller order", verify.ReasonScope, "authorization_action", x.order(t, 2, 100, func(a *scope.Action) string {
			o, less := *a.Order, *a
			o.OrderQty, less.Order = dec("99"), &o
			return lifts(&less)
		}))
		var used string
		second := x.order(t, 2, 100, func(a *scope.Action) string { used = lifts(a); return used }) // 12,500 with the first
		try("lifted", "", "", second)
		try("lifted, again", verify.ReasonReplay, "", second)
		try("used for another", verify.ReasonScope, "authorization_action", x.order(t, 3, 1, func(*scope.Action) string { return used }))
		x.config.Replay = again(t)
		r = x.receiver(t)
		try("what was lifted counts", verify.ReasonLimits, "max_notional_per_window", x.order(t, 3, 1))
		try("above the hard limit", verify.ReasonLimits, "authorization_hard", x.order(t, 3, 151, lifts))
		try("below it", "", "", x.order(t, 3, 100, lifts))
		try("the fourth", "", "", x.order(t, 4, 1, lifts))
		try("more orders than are allowed", verify.ReasonLimits, "max_orders_per_window", x.order(t, 5, 1, lifts))
		try("which is hard", verify.ReasonLimits, "authorization_hard", x.order(t, 5, 1, lifts, x.by(t, x.risk, scope.RuleOrdersWindow)))
	})
}

// TestLiftedBeforeLate: an action that arrives late must leave later ones inside
// their limits, but for those that were lifted for them.
func TestLiftedBeforeLate(t *testing.T) {
	eachStore(t, func(t *testing.T, again func(*testing.T) verify.ReplayStore) {
		for what, c := range map[string]struct {
			lifted scope.Rule
			want   verify.Reason
		}{
			"the limit was lifted for the later one":   {scope.RuleNotionalWindow, ""},
			"another limit was":                        {scope.RuleOrderNotional, verify.ReasonLimits},
			"a person approved it, and lifted nothing": {scope.RuleApproval, verify.ReasonLimits},
		} {
			for _, restart := range []bool{false, true} {
				x := newLifter(t, `"human_approval_above":[{"amount":"9000","currency":"EUR"}],"max_notional_per_window":[{"amount":"10000","block":"soft","currency":"EUR","window":{"rolling_s":60}},{"amount":"15000","currency":"EUR","window":{"rolling_s":3600}}]`)
				x.agent = x.ca.Agent(t, newID(), x.scope.Canonical(), nil)
				x.config.Replay = again(t)
				r := x.receiver(t)
				later := []signed{x.by(t, x.risk, c.lifted)}
				if c.lifted != scope.RuleApproval {
					later = append(later, x.by(t, x.risk, scope.RuleApproval))
				}
				if _, err := r.Verify(t.Context(), x.order(t, 5, 200, later...), nil); err != nil { // 10,000
					t.Fatal(err)
				}
				if restart {
					x.config.Replay = again(t)
					r = x.receiver(t)
				}
				_, err := r.Verify(t.Context(), x.order(t, 2, 80), nil) // 4,000
				reason(t, fmt.Sprintf("%s, restart %v", what, restart), c.want, err)
				if c.want != "" {
					continue
				}
				_, err = r.Verify(t.Context(), x.order(t, 1, 21), nil) // 15,050 with both
				reason(t, fmt.Sprintf("%s, above the hard limit, restart %v", what, restart), verify.ReasonLimits, err)
			}
		}
	})
}
