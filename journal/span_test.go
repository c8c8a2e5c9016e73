package journal_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"inkan/attest"
	"inkan/journal"
)

// testimonies lists those in a journal.
func testimonies(t *testing.T, text []byte) (ids [][32]byte) {
	t.Helper()
	for l := range bytes.Lines(text) {
		var x struct {
			Testimony *struct{ Attest []byte }
		}
		if err := json.Unmarshal(l, &x); err != nil {
			t.Fatal(err)
		}
		if x.Testimony != nil {
			ids = append(ids, journal.TestimonyID(x.Testimony.Attest))
		}
	}
	return ids
}

// TestSpan: from testimony to testimony, a part at a time.
func TestSpan(t *testing.T) {
	b := newBench(t)
	b.signs(t, "one", "two")
	b.testify(t)
	b.signs(t, "three")
	b.testify(t)
	b.signs(t, "four")
	text, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	ids := testimonies(t, text)
	public, err := b.dev.AKPublic()
	if err != nil {
		t.Fatal(err)
	}
	name, err := attest.KeyName(public)
	if err != nil {
		t.Fatal(err)
	}
	ak := hex.EncodeToString(name)
	part := func(from, to int) (out []byte) {
		t.Helper()
		if err := b.j.Between(ids[from], ids[to], func(lines []byte) error { out = append(out, lines...); return nil }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	s := journal.NewSpan(ak, ids[0])
	for l := range bytes.Lines(part(0, 2)) {
		if err := s.Append(l); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := s.End(ids[2]); err != nil || r.Signatures != 3 || len(r.Lost) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := s.End(ids[1]); !errors.Is(err, &journal.Contradiction{Rule: journal.RuleForm}) {
		t.Errorf("ended elsewhere: %v", err)
	}
	for name, c := range map[string]struct {
		ak    string
		lines []byte
		rule  journal.Rule
	}{
		"nothing":                       {ak, nil, journal.RuleForm},
		"from later on":                 {ak, part(1, 2), journal.RuleForm},
		"not from a testimony":          {ak, bytes.Join(bytes.SplitAfter(part(0, 2), []byte("\n"))[1:], nil), journal.RuleForm},
		"not to the end":                {ak, part(0, 1), journal.RuleForm},
		"beyond the end":                {ak, append(part(0, 2), text[len(text)-len(lastLine(text)):]...), journal.RuleForm},
		"a line cut":                    {ak, part(0, 2)[:700], journal.RuleForm},
		"another attestation key":       {"00", part(0, 2), journal.RuleAK},
		"a signature that was left out": {ak, without(part(0, 2), 1, 2), journal.RuleOffTheBooks},
	} {
		s := journal.NewSpan(c.ak, ids[0])
		err := s.Append(c.lines)
		if err == nil {
			_, err = s.End(ids[2])
		}
		if !errors.Is(err, &journal.Contradiction{Rule: c.rule}) {
			t.Errorf("%s: %v, %s is expected", name, err, c.rule)
		}
	}
	if err := b.j.Between([32]byte{}, ids[2], nil); !errors.Is(err, journal.ErrNoTestimony) {
		t.Errorf("from what is not there: %v", err)
	}
	if err := b.j.Between(ids[2], [32]byte{}, nil); !errors.Is(err, journal.ErrNoTestimony) {
		t.Errorf("to what is not there: %v", err)
	}
	if got := part(2, 0); len(got) != 0 {
		t.Errorf("backwards: %d bytes", len(got))
	}
}

func lastLine(text []byte) []byte {
	lines := bytes.SplitAfter(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	return append(lines[len(lines)-1], '\n')
}

func without(text []byte, n ...int) []byte {
	lines := bytes.SplitAfter(text, []byte("\n"))
	for i, x := range n {
		lines = append(lines[:x-i], lines[x-i+1:]...)
	}
	return bytes.Join(lines, nil)
}

// TestLongJournal: what is asked for is found wherever it lies, and comes whole, in parts.
func TestLongJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	var text bytes.Buffer
	var begins []int
	testimony := func(n int) []byte { return fmt.Appendf(nil, "attest %d", n) }
	for n := range 4 {
		begins = append(begins, text.Len())
		fmt.Fprintf(&text, `{"testimony":{"ak":"","attest":"%s","signature":"","time":"2026-01-01T00:00:00Z"}}`+"\n", base64.StdEncoding.EncodeToString(testimony(n)))
		for i := range 9000 { // a megabyte and a bit, so that blocks end anywhere
			sum := sha256.Sum256([]byte{byte(n), byte(i), byte(i >> 8)})
			fmt.Fprintf(&text, `{"asked":{"digest":"%s","key":"%0*d"}}`+"\n", base64.StdEncoding.EncodeToString(sum[:]), 60+i%7, i)
		}
	}
	if err := os.WriteFile(path, text.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	j, err := journal.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	for from := range 4 {
		for to := from; to < 4; to++ {
			var got []byte
			if err := j.Between(journal.TestimonyID(testimony(from)), journal.TestimonyID(testimony(to)), func(part []byte) error {
				if len(part) > journal.MaxPart || part[len(part)-1] != '\n' {
					t.Errorf("a part of %d bytes", len(part))
				}
				got = append(got, part...)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			end := begins[to] + bytes.IndexByte(text.Bytes()[begins[to]:], '\n') + 1
			if !bytes.Equal(got, text.Bytes()[begins[from]:end]) {
				t.Errorf("from %d to %d: %d bytes", from, to, len(got))
			}
		}
	}
	stop := errors.New("stop")
	if err := j.Between(journal.TestimonyID(testimony(0)), journal.TestimonyID(testimony(3)), func([]byte) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("an error of the sender: %v", err)
	}
}

// BenchmarkSpan: an asked and a signed line, as the issuer takes them.
func BenchmarkSpan(b *testing.B) {
	sum := sha256.Sum256(nil)
	text := fmt.Appendf(nil, `{"asked":{"digest":"%s","key":"%068x"}}`+"\n"+`{"signed":"%s"}`+"\n",
		base64.StdEncoding.EncodeToString(sum[:]), 1, base64.StdEncoding.EncodeToString(make([]byte, 72)))
	var part []byte
	for len(part)+len(text) < journal.MaxPart {
		part = append(part, text...)
	}
	b.SetBytes(int64(len(part)))
	for b.Loop() {
		if _, err := journal.Verify(bytes.NewReader(part), journal.Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
