package scope_test

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"inkan/scope"
)

const withoutDestinations = `{"version":1,"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"]`

func withDestinations(t *testing.T, list string) *scope.Scope {
	t.Helper()
	s, err := scope.Parse([]byte(withoutDestinations + `,"destinations":[` + list + `]}`))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDestinations(t *testing.T) {
	s := withDestinations(t, `{"host":"gate.example.org","port":8443},{"host":"192.0.2.7","port":443,"server_name":"gate.example.org"},{"host":"2001:db8::1","port":443,"server_name":"2001:db8::1"}`)
	if err := valid(t, schema(t, "scope"), s.Canonical()); err != nil {
		t.Errorf("the schema refuses it: %v", err)
	}
	if strings.Contains(string(s.Canonical()), `"server_name":"2001`) {
		t.Error("a server name that is the host has two spellings")
	}
	d, refusal := s.Destination("192.0.2.7", 443)
	if refusal != nil || d.Name() != "gate.example.org" || d.Address() != "192.0.2.7:443" {
		t.Errorf("got %v, %v", d, refusal)
	}
	if d, _ := s.Destination("gate.example.org", 8443); d.Name() != "gate.example.org" {
		t.Errorf("the name is %q", d.Name())
	}
	none, err := scope.Parse([]byte(withoutDestinations + "}"))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		s    *scope.Scope
		host string
		port uint16
	}{{s, "gate.example.org", 443}, {s, "other.example.org", 8443}, {s, "GATE.example.org", 8443}, {none, "gate.example.org", 8443}, {nil, "gate.example.org", 8443}} {
		if _, r := x.s.Destination(x.host, x.port); !errors.Is(r, &scope.Refusal{Rule: scope.RuleDestinations}) {
			t.Errorf("%s %d: got %v", x.host, x.port, r)
		}
	}
	if text := strings.Join(s.Describe(), "\n"); !strings.Contains(text, "192.0.2.7:443 as gate.example.org") {
		t.Errorf("the description lacks them:\n%s", text)
	}
}

func TestBadDestinations(t *testing.T) {
	for list, want := range map[string]string{
		`{"host":"","port":1}`:                                    "a DNS name",
		`{"host":"Gate.example.org","port":1}`:                    "a DNS name",
		`{"host":"gate.example.org.","port":1}`:                   "a DNS name",
		`{"host":"192.0.2.07","port":1}`:                          "a DNS name",
		`{"host":"0x7f.1","port":1}`:                              "a DNS name",
		`{"host":"::ffff:192.0.2.7","port":1}`:                    "a DNS name",
		`{"host":"fe80::1%eth0","port":1}`:                        "a DNS name",
		`{"host":"a b","port":1}`:                                 "a DNS name",
		`{"host":"a","port":0}`:                                   "1 to 65535",
		`{"host":"a","port":65536}`:                               "port",
		`{"host":"a","port":1,"server_name":"*.b"}`:               "server_name",
		`{"host":"a","port":1},{"host":"a","port":1}`:             "stands twice",
		`{"host":"a","port":1,"ports":[1]}`:                       "ports",
		`{"host":"a","port":1},{"host":"` + "x/y" + `","port":1}`: "a DNS name",
	} {
		if _, err := scope.Parse([]byte(withoutDestinations + `,"destinations":[` + list + `]}`)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want something about %q", list, err, want)
		}
	}
}

func TestDestinationsContain(t *testing.T) {
	all := []string{`{"host":"a","port":1}`, `{"host":"a","port":2}`, `{"host":"b","port":1}`, `{"host":"b","port":3,"server_name":"a"}`, `{"host":"c","port":1}`}
	r := rand.New(rand.NewPCG(1, 2))
	pick := func() (map[string]bool, *scope.Scope) {
		in, list := make(map[string]bool), []string{}
		for _, i := range r.Perm(len(all)) {
			if r.IntN(2) == 0 {
				in[all[i]], list = true, append(list, all[i])
			}
		}
		return in, withDestinations(t, strings.Join(list, ","))
	}
	for range 500 {
		o, outer := pick()
		i, inner := pick()
		subset := true
		for d := range i {
			subset = subset && o[d]
		}
		if got := scope.Contains(outer, inner) == nil; got != subset {
			t.Fatalf("%s contains %s: got %v", outer.Canonical(), inner.Canonical(), got)
		}
	}
	named := withDestinations(t, `{"host":"a","port":1,"server_name":"x"}`)
	if scope.Contains(withDestinations(t, all[0]), named) == nil {
		t.Error("another server name was taken for narrower")
	}
}
