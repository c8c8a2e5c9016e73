package report

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"time"

	"inkan/audit"
	"inkan/scope"
)

// TestSeries: whatever the times, nothing is lost and bins stay in their places.
func TestSeries(t *testing.T) {
	sources := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		var s series
		at := time.Date(2026, 7, 27, 9, 30, 0, sources.IntN(1e9), time.UTC)
		var times []time.Time
		for range 300 {
			at = at.Add(time.Duration(sources.Int64N(int64(1) << (10 + sources.IntN(40)))))
			times = append(times, at)
			s.add(at, 0, 1)
			if last := s.bins[len(s.bins)-1].at; last >= maxBins {
				t.Fatalf("bin %d of %d", last, maxBins)
			}
		}
		total, i := 0.0, 0
		for _, b := range s.bins {
			total += b.sum[0]
			from := s.begin.Add(time.Duration(b.at) * s.width)
			for ; i < len(times) && times[i].Before(from.Add(s.width)); i++ {
				if times[i].Before(from) {
					t.Fatalf("%v is in the bin from %v, width %v", times[i], from, s.width)
				}
			}
		}
		if total != 300 || i != 300 {
			t.Fatalf("%v in %d bins, %d in their places", total, len(s.bins), i)
		}
	}
}

func TestVisible(t *testing.T) {
	for in, want := range map[string]string{
		"plain\n":            "plain\n",
		"gr\u00fc\u00dfe":    "gr\u00fc\u00dfe",
		"a\u202eb":           "a\u27e8U+202E\u27e9b",
		"a\u200b\x1b[2J":     "a\u27e8U+200B\u27e9\u27e8U+001B\u27e9[2J",
		"a\xffb":             "a\u27e8not UTF-8\u27e9b",
		"\u2028\ue000\ufeff": "\u27e8U+2028\u27e9\u27e8U+E000\u27e9\u27e8U+FEFF\u27e9",
	} {
		if got := string(visible([]byte(in))); got != want {
			t.Errorf("%q is shown as %q, want %q", in, got, want)
		}
	}
	if s := clip(strings.Repeat("\u00e9", 1000)); len([]rune(s)) > maxShown+4 {
		t.Errorf("%d characters", len([]rune(s)))
	}
	for in, want := range map[string]string{"1": "1", "1234": "1 234", "-1234567.25": "-1 234 567.25", "12x4": "12x4"} {
		if got := strings.ReplaceAll(grouped(in), "\u00a0", " "); got != want {
			t.Errorf("%s is grouped as %q", in, got)
		}
	}
}

func TestInWords(t *testing.T) {
	signed := "e30." + base64.RawURLEncoding.EncodeToString([]byte(`{"reason":"x","count":3,"scope":{"a":1}}`)) + ".sig"
	for in, want := range map[string]string{
		`{"by":"uid 0","scope":"agent"}`: "by: uid 0; scope: agent",
		signed:                           "count: 3; reason: x",
		"not JSON":                       "not JSON",
		"a.b.c":                          "a.b.c",
		"":                               "",
	} {
		if got := inWords(in, nil); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

// TestUnknownEvent: what a later version may write has its place all the same.
func TestUnknownEvent(t *testing.T) {
	for kind, want := range map[scope.Kind]string{"control.later": "control.later", "": "later"} {
		st := &scope.Statement{Counter: 7, Kind: kind, Event: `{"x":1}`, Decision: scope.Decision{Decision: "later"}}
		if got := happened(&audit.Verified{Statement: st}); len(got) != 1 || got[0].Title != want || got[0].Text != "x: 1" {
			t.Errorf("%+v", got)
		}
	}
}

// TestPolicy: the page's own policy lets its one style sheet in and nothing else,
// and it names nothing that would be loaded.
func TestPolicy(t *testing.T) {
	var c Collector
	p, err := c.Page(About{}, nil, &audit.Unproven{Rule: audit.RuleForm, Reason: "<b>x"})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := p.Write(&b); err != nil {
		t.Fatal(err)
	}
	page := b.String()
	sheet := regexp.MustCompile(`(?s)<style>(.*)</style>`).FindStringSubmatch(page)
	sum := sha256.Sum256([]byte(sheet[1]))
	want := "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	policy := regexp.MustCompile(`Content-Security-Policy" content="([^"]*)"`).FindStringSubmatch(page)
	if !strings.HasPrefix(strings.NewReplacer("&#39;", "'", "&#43;", "+").Replace(policy[1]), want) {
		t.Errorf("the policy is %s, want %s", policy[1], want)
	}
	for _, bad := range []string{"http:", "https:", "url(", "@import", "<script", "<b>", " src=", " style="} {
		if strings.Contains(page, bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	broken := errors.New("disk")
	if _, err := c.Page(About{}, nil, broken); !errors.Is(err, broken) {
		t.Errorf("an error that says nothing about the record: %v", err)
	}
	if _, err := c.Page(About{}, nil, nil); err == nil {
		t.Error("a page of nothing")
	}
}

// TestNames: more names than a page tells apart are counted together.
func TestNames(t *testing.T) {
	var x tallies
	for i := range 3 * maxNames {
		x.of(strings.Repeat("x", i%7)+time.Duration(i).String()).Permits++
	}
	list := x.sorted()
	total := uint64(0)
	for _, n := range list {
		total += n.Permits
	}
	if len(list) != maxNames+1 || total != 3*maxNames || list[0].Name != others {
		t.Errorf("%d names, %d in all, most of %s", len(list), total, list[0].Name)
	}
}
