package message

import (
	"os"
	"strings"
	"testing"
)

func TestParseRoutes(t *testing.T) {
	b, err := os.ReadFile("testdata/routes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	routes, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(routes) != 2 || routes[0].Body["side"].Values["buy"] != "1" || routes[1].Path != "/orders/{ord.OrigClOrdID}" {
		t.Errorf("got %+v", routes)
	}
	if err := routes[0].agrees(testAction(t), nil, []byte(testBody)); err != nil {
		t.Errorf("a good order: %v", err)
	}
	for name, c := range map[string]struct{ old, new, want string }{
		"an unknown member":    {"kinds:", "kind:", "unknown member"},
		"a duplicate member":   {"method: POST", "method: POST\n  method: PUT", "duplicate"},
		"a number":             {`ord.OrdType: "2"`, "ord.OrdType: 2", "ord.OrdType"},
		"an unknown kind":      {"order.new", "order.any", "route 1, POST /orders: kinds"},
		"a field of no action": {"{field: ord.Side", "{field: ord.Sid", `"ord.Sid" is no field of an action`},
		"implied of no action": {"ord.Currency: ", "ord.Curency: ", `implied: "ord.Curency" is no field`},
		"a path of no action":  {"{ord.OrigClOrdID}", "{OrigClOrdID}", `path: "OrigClOrdID" is no field`},
		"a member of nothing":  {"free: true", "free: false", "exactly one of"},
		"too large":            {"- method: POST", "#" + strings.Repeat("x", maxRoutes) + "\n- method: POST", "at most"},
	} {
		if !strings.Contains(string(b), c.old) {
			t.Fatalf("%s: the file has no %s", name, c.old)
		}
		if _, err := Parse([]byte(strings.Replace(string(b), c.old, c.new, 1))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// FuzzParseRoutes: what parses is a route that can be matched and compared.
func FuzzParseRoutes(f *testing.F) {
	b, err := os.ReadFile("testdata/routes.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("- {method: GET, path: /, kinds: [order.new]}"))
	a := testAction(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		routes, err := Parse(b)
		if err != nil {
			return
		}
		for i := range routes {
			r := &routes[i]
			if r.Method == "" || !strings.HasPrefix(r.Path, "/") || len(r.Kinds) == 0 {
				t.Errorf("accepted %+v", r)
			}
			_ = r.agrees(a, map[string]string{}, []byte(testBody))
		}
	})
}
