package report

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	_ "embed" // the template and its style
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"inkan/audit"
	"inkan/scope"
)

// About says what a page is made of.
type About struct {
	Source string              // what was read, such as a file's name
	SHA256 []byte              // of what was read, where it was one unchanging file; nil: not stated
	CA     []*x509.Certificate // what was verified against
	At     time.Time           // when
}

// Page is what a person gets to see. Write it.
type Page struct {
	Title     string
	Source    string
	SHA256    string
	CA        []authority
	At        string
	Failure   *failure // it does not verify; then there is nothing else
	Records   []*view
	StyleHash string
	Style     template.CSS
}

type authority struct{ Name, SHA256, Until string }

type failure struct {
	Rule, Reason string
	Entry        uint64
}

// Page makes a page of what was seen, of what verification reported about it, and
// of the error with which it ended. If something does not verify the page says
// that and nothing more. Another error than an [*audit.Unproven] is returned.
func (c *Collector) Page(a About, reports []*audit.Report, err error) (*Page, error) {
	p := &Page{Title: "Record", Source: a.Source, At: minute(a.At), Style: template.CSS(style), StyleHash: styleHash()}
	if a.SHA256 != nil {
		p.SHA256 = fmt.Sprintf("%x", a.SHA256)
	}
	for _, ca := range a.CA {
		p.CA = append(p.CA, authority{ca.Subject.String(), fmt.Sprintf("%x", sha256.Sum256(ca.Raw)), minute(ca.NotAfter)})
	}
	u, unproven := errors.AsType[*audit.Unproven](err)
	switch {
	case unproven:
		p.Failure = &failure{string(u.Rule), clip(u.Reason), u.Counter}
		return p, nil
	case err != nil:
		return nil, err
	case len(reports) == 0 || len(c.records) > len(reports):
		return nil, errors.New("the report has other records than were verified")
	}
	var names []string
	for i, r := range reports {
		x := newRecord() // of a file without entries nothing was seen
		if i < len(c.records) {
			x = c.records[i]
		}
		v := newView(r, x)
		v.Number, v.Several = i+1, len(reports) > 1
		p.Records = append(p.Records, v)
		names = append(names, v.Name)
	}
	p.Title = "Record of " + strings.Join(names, ", ")
	return p, nil
}

//go:embed page.html
var pageText string

//go:embed page.css
var style string

// styleHash is how the page's own policy names its one style sheet (CSP 3, section 2.3.1).
func styleHash() string {
	sum := sha256.Sum256([]byte(style))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"minute": minute, "moment": moment, "stamp": stamp, "count": count, "plural": plural, "less": func(a int, b uint64) bool { return uint64(a) < b },
	"percent": func(f float64) string { return fmt.Sprintf("%.0f %%", f*100) },
}).Parse(pageText))

// Write writes the page as HTML.
func (p *Page) Write(w io.Writer) error {
	var b bytes.Buffer
	if err := page.Execute(&b, p); err != nil {
		return err
	}
	_, err := w.Write(visible(b.Bytes()))
	return err
}

// visible makes characters that change how others are shown, or that are not
// shown, into text that says which they are. Escaping is the template's.
func visible(b []byte) []byte {
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		switch {
		case r == utf8.RuneError && n == 1:
			out = append(out, "\u27e8not UTF-8\u27e9"...)
		case r == '\n' || r >= ' ' && r < 0x7f:
			out = append(out, b[:n]...)
		case unicode.In(r, unicode.C, unicode.Zl, unicode.Zp) || r == 0x115f || r == 0x1160 || r == 0x3164 || r == 0xffa0:
			out = fmt.Appendf(out, "\u27e8U+%04X\u27e9", r)
		default:
			out = append(out, b[:n]...)
		}
		b = b[n:]
	}
	return out
}

// maxShown bounds a text from the record, in characters.
const maxShown = 240

func clip(s string) string {
	if utf8.RuneCountInString(s) <= maxShown {
		return s
	}
	return string([]rune(s)[:maxShown]) + " ..."
}

func minute(t time.Time) string { return t.UTC().Format("2006-01-02 15:04") + " UTC" }

func moment(t time.Time) string { return t.UTC().Format(scope.TimeFormat) }

// stamp is a moment in a table, where date and time may stand below each other.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05.000000") }

// count writes a number with its thousands apart.
func count(n any) string { return grouped(fmt.Sprint(n)) }

// grouped sets the thousands of a decimal apart.
func grouped(s string) string {
	whole, fraction, _ := strings.Cut(s, ".")
	sign := ""
	if strings.HasPrefix(whole, "-") {
		sign, whole = "-", whole[1:]
	}
	if strings.Trim(whole, "0123456789") != "" {
		return s
	}
	var parts []string
	for len(whole) > 3 {
		parts = append([]string{whole[len(whole)-3:]}, parts...)
		whole = whole[:len(whole)-3]
	}
	out := sign + strings.Join(append([]string{whole}, parts...), "\u00a0")
	if fraction != "" {
		out += "." + fraction
	}
	return out
}

func plural(n uint64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return count(n) + " " + many
}
