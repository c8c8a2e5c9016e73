package scope_test

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"inkan/scope"
)

// TestKeptBook: what was changed anywhere, cut off or lengthened is no kept book.
func TestKeptBook(t *testing.T) {
	s := fullScope(t)
	book, _ := filled(t, s, rand.New(rand.NewPCG(1, 2)), 20)
	kept := scope.KeptBook{Book: book, UpTo: 20, Entry: [32]byte{1, 2, 3}}
	form, err := kept.AppendBinary([]byte("before"))
	if err != nil || !bytes.HasPrefix(form, []byte("before")) {
		t.Fatalf("appended to something: %q, %v", form[:min(20, len(form))], err)
	}
	form = form[len("before"):]
	var again scope.KeptBook
	if err := again.UnmarshalBinary(form); err != nil || again.UpTo != 20 || again.Entry != kept.Entry {
		t.Fatalf("read again: %+v, %v", again, err)
	}
	if form2, _ := again.AppendBinary(nil); !bytes.Equal(form, form2) {
		t.Error("the form of what was read is another one")
	}
	head := 8 + 8 + 32 // the magic, and what binds it to an entry: those are compared with the record
	for i := range form {
		changed := slices.Clone(form)
		changed[i] ^= 1
		if err := again.UnmarshalBinary(changed); (i < 8 || i >= head) && err == nil {
			t.Fatalf("byte %d was changed, and it was accepted", i)
		}
		if err := again.UnmarshalBinary(form[:i]); err == nil {
			t.Fatalf("the first %d bytes were accepted", i)
		}
	}
	if err := again.UnmarshalBinary(append(slices.Clone(form), 0)); err == nil {
		t.Error("a byte more was accepted")
	}
}
