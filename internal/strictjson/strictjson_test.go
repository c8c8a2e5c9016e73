package strictjson_test

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"inkan/internal/strictjson"
)

type document struct {
	Name string   `json:"name"`
	N    int      `json:"n,omitzero"`
	List []string `json:"list,omitempty"`
}

func TestRefuses(t *testing.T) {
	for text, want := range map[string]string{
		`{"name":"a","name":"b"}`: "duplicate",
		`{"Name":"a"}`:            "unknown member",
		`{"name":"a"}x`:           "byte",
		`{"name":1}`:              "/name",
		"{\"name\":\"\xff\"}":     "UTF-8",
		``:                        "EOF",
		strings.Repeat(" ", 101):  "at most 100",
		strings.Repeat("[", 20):   "nested deeper",
		`{"name":"a","n":1e2}`:    "/n",
	} {
		var d document
		if err := strictjson.Unmarshal([]byte(text), 100, &d); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: got %v, want something about %q", text, err, want)
		}
	}
}

func TestYAML(t *testing.T) {
	var d document
	if err := strictjson.UnmarshalYAML([]byte("name: a # a comment\nn: 5\nlist: [x, \"1.50\"]\n"), 1000, &d); err != nil || d.Name != "a" || d.N != 5 || d.List[1] != "1.50" {
		t.Errorf("%+v, %v", d, err)
	}
	for text, want := range map[string]string{
		"name: 1.5":             "must be quoted",
		"name: &x a":            "anchors",
		"name: a\nname: b":      "duplicate",
		"name: a\n---\nname: b": "more than one document",
		"name: 0x10":            "plain integer",
		"name: 010":             "plain integer",
		"name: ~":               "missing",
		"name: !foo a":          "",
		"? [a]\n: b":            "plain string",
		"colour: a":             "unknown member",
		"{name: a}\nn: 5":       "after the document",
		"{name: a}}":            "after the document",
		"":                      "YAML",
		"n: yes":                "/n",
	} {
		var d document
		if err := strictjson.UnmarshalYAML([]byte(text), 1000, &d); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want something about %q", text, err, want)
		}
	}
}

// TestToYAML: what is written for people reads back as it was, texts that look
// like numbers or nothing too.
func TestToYAML(t *testing.T) {
	d := document{Name: "true", N: 5, List: []string{"1.50", "", "a: b", "0x10", "# no", "~"}}
	b, err := strictjson.ToYAML(d)
	if err != nil || !strings.Contains(string(b), "\nn: 5\n") {
		t.Fatalf("%s, %v", b, err)
	}
	var back document
	if err := strictjson.UnmarshalYAML(b, 1000, &back); err != nil || !reflect.DeepEqual(back, d) {
		t.Errorf("%s: %+v, %v", b, back, err)
	}
	if err := strictjson.UnmarshalYAML(append(b, "colour: a\n"...), 1000, &back); err == nil || !strings.Contains(err.Error(), "unknown member") {
		t.Errorf("a member that was added at the end: %v", err)
	}
}

func FuzzYAML(f *testing.F) {
	f.Add([]byte("name: a\nlist: [x]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := strictjson.FromYAML(b, 10_000)
		if err != nil {
			return
		}
		c, err := strictjson.Canonical(j, 100_000)
		if err != nil {
			return // a name twice in another escape, say
		}
		again, err := strictjson.Canonical(c, 100_000)
		if err != nil || !bytes.Equal(c, again) {
			t.Fatalf("%s is not canonical: %v", c, err)
		}
	})
}
