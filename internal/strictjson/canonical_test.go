package strictjson

import (
	"bytes"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
)

var documents = []string{
	`{}`, `[]`, `"a"`, `0`, `-1`, `true`, `null`, `{"b":1,"a":[{"d":"x","c":null},false]}`, `{"OrdType":"2","OrderID":"1","Order":{},"Ord":[]}`,
	`{"a":1,"a":2}`, `{"b":0,"a":1,"b":2}`, `-0`, `01`, `1.5`, `1e3`, `9007199254740993`, `"\u0041"`, `"é"`, `{"é":1,"e":2}`, ` {}`, `{"a" :1}`, `{"a":1,}`, `[1,]`, `[1}`, `{"a":1]`, `{"a"}`, `"`, `{`, `[`, `-`, ``, `nul`, `nullnull`, `{"a":1}{}`, `[true,false,null]`,
	strings.Repeat("[", 16) + strings.Repeat("]", 16), strings.Repeat("[", 40) + strings.Repeat("]", 40), "\"\x7f\"",
}

// sameAsCanonicalize: what is decided the quick way is what the general way says.
func sameAsCanonicalize(t *testing.T, doc []byte) (quick bool) {
	got, ok := canonical(nil, bytes.Clone(doc))
	if !ok {
		return false
	}
	want := jsontext.Value(bytes.Clone(doc))
	if err := want.Canonicalize(); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%q: %q, but the general way says %q, %v", doc, got, want, err)
	}
	return true
}

func TestCanonical(t *testing.T) {
	quick := 0
	for _, d := range documents {
		if sameAsCanonicalize(t, []byte(d)) {
			quick++
		}
	}
	if quick != 11 {
		t.Errorf("%d documents were decided the quick way, want 11", quick)
	}
}

func FuzzCanonical(f *testing.F) {
	for _, d := range documents {
		f.Add([]byte(d))
	}
	f.Fuzz(func(t *testing.T, doc []byte) { sameAsCanonicalize(t, doc) })
}

// TestManyMembers: an object with many members is for the general way.
func TestManyMembers(t *testing.T) {
	m := make(map[string]int)
	for i := range 200 {
		m[strings.Repeat("a", i+1)] = i
	}
	b, err := Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	want := jsontext.Value(bytes.Clone(b))
	if err := want.Canonicalize(); err != nil || !bytes.Equal(want, b) {
		t.Errorf("%v: it is not canonical", err)
	}
	if _, ok := canonical(nil, []byte(`{"`+strings.Repeat(`a":1,"`, maxMembers+1)+`b":1}`)); ok {
		t.Error("too many members were sorted the quick way")
	}
}
