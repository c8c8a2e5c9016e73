package issuer_test

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"inkan/attest"
	"inkan/internal/attester"
	"inkan/internal/problem"
	"inkan/internal/sqlite"
	"inkan/issuer"
)

// rows counts the rows of a table of the inventory.
func (o *office) rows(t *testing.T, table string) (n int) {
	t.Helper()
	db, err := sqlite.OpenReadOnly(filepath.Join(o.dir, "inventory.db"))
	o.must(t, err)
	defer db.Close()
	o.must(t, db.QueryRow("SELECT count(*) FROM "+table).Scan(&n))
	return n
}

// TestFlood: who has no exchange under way costs the issuer little (G7): what is
// sent is not kept, and after a number of attempts they are not even written down.
func TestFlood(t *testing.T) {
	for name, send := range map[string]func(*attester.Channel, int) error{
		"evidence of no exchange": func(c *attester.Channel, n int) error {
			return c.Post(t.Context(), "/v1/sessions/evidence", &attest.Evidence{Session: fmt.Appendf(nil, "%016d", n), Secret: make([]byte, 60<<10)}, new(attest.Grant))
		},
		"journal of no exchange": func(c *attester.Channel, n int) error {
			return c.PostLines(t.Context(), fmt.Sprintf("/v1/sessions/%032x/journal", n), []byte("{}\n"))
		},
		"declarations": func(c *attester.Channel, n int) error {
			return c.Post(t.Context(), "/v1/declarations", &attest.Declaration{Agent: fmt.Sprintf("nobody-%d", n)}, new(attest.Grant))
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t)
			c, err := attester.Dial(t.Context(), "https://"+o.addresses.Agent, o.roots)
			o.must(t, err)
			defer c.Close()
			before := o.rows(t, "event")
			var last error
			for n := range 120 {
				last = send(c, n)
			}
			p, ok := errors.AsType[*problem.Problem](last)
			if !ok || p.Status != http.StatusTooManyRequests || p.Check != "G7" {
				t.Errorf("after 120 attempts: %v, want G7", last)
			}
			if n := o.rows(t, "event") - before; n > 80 {
				t.Errorf("%d lines in the decision log of 120 attempts", n)
			}
			if n := o.rows(t, "evidence"); n != 0 {
				t.Errorf("%d documents were kept of a host that has no exchange", n)
			}
		})
	}
}

// TestLimitByNetwork: a host has all addresses of its IPv6 network, and no
// other bound for it.
func TestLimitByNetwork(t *testing.T) {
	allow := issuer.Limiter()
	passed := 0
	for n := range 200 {
		if allow(fmt.Sprintf("[2001:db8::%x]:1", n)) {
			passed++
		}
	}
	if passed > 80 {
		t.Errorf("%d of 200 exchanges from one network", passed)
	}
	for _, other := range []string{"[2001:db8:0:1::1]:1", "192.0.2.1:1", "192.0.2.2:1", "[::ffff:192.0.2.3]:1"} {
		if !allow(other) {
			t.Errorf("%s is refused for another network's exchanges", other)
		}
	}
	if allow("pipe") {
		t.Error("no address is let in")
	}
}

// TestDecisionLogIsReadable: nothing that a host sends keeps an administrator
// from reading the log.
func TestDecisionLogIsReadable(t *testing.T) {
	o := newOffice(t)
	for _, agent := range []string{strings.Repeat("a", 63) + "é", strings.Repeat("é", 300), strings.Repeat("\u202e", 64), "a\x00b", "\u2028"} {
		if _, err := o.enrol(t, o.dev, agent); err == nil {
			t.Errorf("%q was certified", agent)
		}
	}
	events, err := o.admin.Events(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(events); n < 5 || events[n-1].Check != "E9" {
		t.Errorf("the log ends with %+v", events[len(events)-1])
	}
}
