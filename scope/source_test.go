package scope_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"inkan/scope"
)

func TestBadSources(t *testing.T) {
	many := make([]string, 257)
	for i := range many {
		many[i] = fmt.Sprintf(`"10.0.%d.%d/32"`, i/256, i%256)
	}
	for members, want := range map[string]string{
		`"source_networks":["192.0.2.1/24"]`:                  "without host bits",
		`"source_networks":["192.0.2.1"]`:                     "no '/'",
		`"source_networks":["::ffff:192.0.2.0/120"]`:          "IPv4 is written as IPv4",
		`"source_networks":["192.0.2.0/24","192.0.2.0/24"]`:   "is in 192.0.2.0/24",
		`"source_networks":["192.0.2.128/25","192.0.2.0/24"]`: "192.0.2.128/25 is in 192.0.2.0/24",
		`"source_networks":["fe80::1%eth0/128"]`:              "zone",
		`"source_networks":[` + strings.Join(many, ",") + `]`: "at most 256",
		`"source_regions":["UK"]`:                             "ISO 3166-1",
		`"source_regions":["fr"]`:                             "ISO 3166-1",
		`"source_regions":["FR-"]`:                            "ISO 3166-2",
		`"source_regions":["FR-IDFX"]`:                        "ISO 3166-2",
		`"source_regions":["R "]`:                             "ISO 3166-1",
		`"source_regions":["FR","FR"]`:                        "stands twice",
		`"source_regions":["FR-IDF","FR"]`:                    "FR-IDF is in FR",
		`"source_region":["FR"]`:                              "unknown member",
	} {
		_, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],` + members + `}`))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: got %v, want something about %q", members, err, want)
		}
	}
}

// TestSourceContains: who may call under a contained scope may call under the other one.
func TestSourceContains(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	contained, allowed := 0, 0
	for range 20000 {
		outer, err := scope.Parse(randomScope(r))
		if err != nil {
			continue
		}
		inner, err := scope.Parse(mixed(r, outer.Canonical(), randomScope(r)))
		if err != nil || scope.Contains(outer, inner) != nil {
			continue
		}
		if located, _ := outer.Located(); located {
			contained++
		}
		for _, address := range []string{"192.0.2.1", "192.0.2.200", "198.51.100.1", "::ffff:192.0.2.1", "2001:db8::1", ""} {
			from := scope.Source{}
			if address != "" {
				from.Address = netip.MustParseAddr(address)
			}
			for _, from.Regions = range [][]string{nil, {"DE"}, {"DE", "DE-HE"}, {"FR", "FR-IDF"}, {"US"}} {
				if scope.CheckSource(inner, from) != nil {
					continue
				}
				allowed++
				if err := scope.CheckSource(outer, from); err != nil {
					t.Fatalf("contained, but from %v the outer one says %v\nouter %s\ninner %s", from, err, outer.Canonical(), inner.Canonical())
				}
			}
		}
	}
	if contained < 300 || allowed < 1000 {
		t.Fatalf("only %d pairs with a place were contained and %d allowed: the test shows nothing", contained, allowed)
	}
}

func TestSourceWider(t *testing.T) {
	parse := func(members string) *scope.Scope {
		s, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"]` + members + `}`))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, c := range []struct {
		outer, inner string
		limit        scope.Rule
	}{
		{`,"source_networks":["192.0.2.0/24"]`, ``, scope.RuleSourceNetwork},
		{`,"source_networks":["192.0.2.0/24"]`, `,"source_networks":["192.0.0.0/16"]`, scope.RuleSourceNetwork},
		{`,"source_networks":["0.0.0.0/0"]`, `,"source_networks":["::/0"]`, scope.RuleSourceNetwork},
		{`,"source_regions":["FR-IDF"]`, `,"source_regions":["FR"]`, scope.RuleSourceRegion},
		{`,"source_regions":["FR"]`, ``, scope.RuleSourceRegion},
		{`,"source_regions":["FR"]`, `,"source_regions":["FR-IDF"]`, ""},
		{``, `,"source_networks":["192.0.2.0/24"],"source_regions":["FR"]`, ""},
	} {
		err := scope.Contains(parse(c.outer), parse(c.inner))
		wider, _ := errors.AsType[*scope.Wider](err)
		if c.limit == "" && err != nil || c.limit != "" && (wider == nil || wider.Limit != c.limit) {
			t.Errorf("outer {%s}, inner {%s}: got %v, want %q", c.outer, c.inner, err, c.limit)
		}
	}
	if err := scope.CheckSource(nil, scope.Source{}); err == nil {
		t.Error("no scope allowed something")
	}
	if located, regions := (*scope.Scope)(nil).Located(); located || regions {
		t.Error("no scope names a place")
	}
}
