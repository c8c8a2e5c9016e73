package scope_test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"inkan/scope"
)

// history is a vector of limits over time; docs/scope.md describes the form.
type history struct {
	Name  string          `json:"name"`
	Scope json.RawMessage `json:"scope"`
	Steps []struct {
		scope.Step
		Expect string               `json:"expect"`
		Rule   string               `json:"rule"`
		Util   *[]scope.Utilisation `json:"util"`    // absent: not said
		FreeAt *string              `json:"free_at"` // absent: not said; empty: no time frees it
	} `json:"steps"`
}

func histories(t testing.TB) map[string][]history {
	t.Helper()
	files, err := filepath.Glob("testdata/histories/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal("there are no histories", err)
	}
	all := make(map[string][]history)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var list []history
		if err := json.Unmarshal(b, &list); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		all[filepath.Base(f)] = list
	}
	return all
}

func TestHistories(t *testing.T) {
	scopes := schema(t, "scope")
	rules := make(map[scope.Rule]bool)
	for _, list := range histories(t) {
		for _, h := range list {
			t.Run(h.Name, func(t *testing.T) {
				s, err := scope.Parse(h.Scope)
				if err != nil {
					t.Fatal(err)
				}
				if err := valid(t, scopes, h.Scope); err != nil {
					t.Errorf("the schema refuses the scope: %v", err)
				}
				if err := scope.Contains(s, s); err != nil {
					t.Errorf("it is wider than itself: %v", err)
				}
				var plain scope.History
				for _, x := range h.Steps {
					plain.Steps = append(plain.Steps, x.Step)
				}
				text, err := json.Marshal(plain)
				if err != nil {
					t.Fatal(err)
				}
				parsed, err := scope.ParseHistory(text)
				if err != nil {
					t.Fatal(err)
				}
				_, out, err := parsed.Play(s)
				if err != nil {
					t.Fatal(err)
				}
				for i, x := range h.Steps {
					r, n := out[i].Refusal, i+1
					switch {
					case x.Expect == "permit" && r != nil:
						t.Fatalf("step %d: refused: %v", n, r)
					case x.Expect == "deny" && (r == nil || string(r.Rule) != x.Rule):
						t.Fatalf("step %d: got %v, want a refusal by %s", n, r, x.Rule)
					case x.Expect != "permit" && x.Expect != "deny":
						t.Fatalf("step %d expects nothing", n)
					}
					if x.Util != nil && !(len(*x.Util) == 0 && len(out[i].Utilisation) == 0) && !reflect.DeepEqual(*x.Util, out[i].Utilisation) {
						t.Errorf("step %d: utilisation is %+v, want %+v", n, out[i].Utilisation, *x.Util)
					}
					if r == nil {
						continue
					}
					rules[r.Rule] = true
					if x.FreeAt != nil {
						free := ""
						if !r.FreeAt.IsZero() {
							free = r.FreeAt.UTC().Format(scope.TimeFormat)
						}
						if free != *x.FreeAt {
							t.Errorf("step %d: free at %q, want %q", n, free, *x.FreeAt)
						}
					}
					if !r.FreeAt.IsZero() && !r.FreeAt.After(x.At.Time) {
						t.Errorf("step %d: free at %v, which is over", n, r.FreeAt)
					}
				}
			})
		}
	}
	want := []scope.Rule{scope.RuleDuplicate, scope.RuleNotionalWindow, scope.RuleQtyWindow, scope.RuleOrdersWindow, scope.RuleMessagesWindow, scope.RuleCollarWindow,
		scope.RuleInstrumentCount, scope.RuleVenueCount, scope.RuleOpenOrders, scope.RuleOpenNotional, scope.RuleDisabled, scope.RuleThrottle, scope.RuleAckUnknown, scope.RuleAckTime}
	for _, r := range want {
		if !rules[r] {
			t.Errorf("no history ends in a refusal by %s: %v", r, slices.Sorted(maps.Keys(rules)))
		}
	}
}

func FuzzParseHistory(f *testing.F) {
	f.Add([]byte(`{"steps":[{"at":"2026-11-24T12:00:00.000000Z","rearm":"1"}]}`))
	f.Add([]byte(`{"steps":[{"at":"2026-11-24T12:00:00.000000Z","acknowledge":{"venue":"XPAR","ClOrdID":"1","status":"filled","time":"2026-11-24T12:00:00.000000Z"}}]}`))
	s := fullScope(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := scope.ParseHistory(b)
		if err != nil {
			return
		}
		_, _, _ = h.Play(s) // whatever it says, it must not panic
	})
}

func FuzzAcknowledgement(f *testing.F) {
	f.Add([]byte(`{"venue":"XPAR","ClOrdID":"1","status":"filled","time":"2026-11-24T12:00:00.000000Z"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := scope.ParseAcknowledgement(b)
		if err != nil {
			return
		}
		if _, err := k.Event("uid 0", fullScope(t)); err != nil {
			t.Fatalf("an acknowledgement is no event: %v", err)
		}
	})
}
