package report

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"inkan/audit"
	"inkan/scope"
)

// maxListed bounds the rows of a table of names.
const maxListed = 25

// view is one record as the page shows it.
type view struct {
	Number  int
	Several bool
	Name    string // the last part of the agent's ID
	Report  *audit.Report
	Part    string // what the export selects, if it does

	Proven, Unproven []claim
	Unsigned         uint64 // permits without a stored signature

	Scopes     []scopeView
	Activity   *chart
	Tables     []table // by kind, venue and instrument
	Rules      table
	Limits     []limitView
	NotShown   bool // some limits are not among them
	Refused    []row
	Happened   []happening
	Happenings uint64 // in all
	Certs      []certificateView
	CertsLeft  int // that are not listed
	Life       *chart
	Starts     []startView
	Entries    []row
}

type claim struct{ Name, Title, Text string }

// titles of the claims that are known. docs/record.md has them all.
var titles = map[string]string{
	"authentic": "Authentic", "in_scope": "In scope", "limits_over_time": "Limits over time were held", "what_ran": "What ran", "in_order": "In order", "complete": "Complete",
	"nothing_after": "Nothing after it", "not_revoked": "Not revoked", "all_signed": "All signed",
}

type scopeView struct {
	Hash        string
	First, Last uint64
	Sentences   []string
}

// table counts by name.
type table struct {
	Caption, Head string
	Rows          []tableRow
	More          int // rows that are not shown
}

type tableRow struct {
	*tally
	Share, Denied float64 // of the longest row, in percent: for its bar
}

type limitView struct {
	Title, Name, Window string
	Peak                float64
	Used, Of            string
	At                  time.Time
	Counter             uint64
	Chart               *chart
}

type certificateView struct {
	Serial, SHA256        string
	NotBefore, NotAfter   time.Time
	First, Last, Entries  uint64
	Scope                 string // the beginning of its hash
	Attested              time.Time
	Evidence, Policy      string
	Device, Protection    string
	Mode, EK, Age, Reused string
}

type startView struct {
	At               time.Time
	First, Last      uint64
	Executable       scope.StartFile
	Files            []scope.StartFile
	Args             string
	User, Unit, Open string
	Landlock         int
}

func newView(r *audit.Report, x *record) *view {
	v := &view{Report: r, Name: clip(r.Agent[strings.LastIndex(r.Agent, "/")+1:]), Happenings: x.eventCount, Unsigned: r.Permits - r.Signed}
	if !r.Filter.All() {
		v.Part = clip(r.Filter.String())
	}
	for _, c := range r.Claims {
		title, ok := titles[c.Name]
		if !ok {
			title = strings.ReplaceAll(c.Name, "_", " ")
		}
		k := claim{c.Name, title, c.Text}
		if c.Proven {
			v.Proven = append(v.Proven, k)
		} else {
			v.Unproven = append(v.Unproven, k)
		}
	}
	for _, a := range x.scopes {
		s := scopeView{Hash: fmt.Sprintf("%x", a.digest[:]), First: a.first, Last: a.last}
		for _, line := range a.scope.Describe() {
			s.Sentences = append(s.Sentences, clip(line))
		}
		v.Scopes = append(v.Scopes, s)
	}
	v.Activity = activity(x)
	v.Tables = []table{tabulate("By kind of action", "Kind", &x.kinds), tabulate("By venue", "Venue", &x.venues), tabulate("By instrument", "Instrument", &x.instruments)}
	v.Rules = tabulate("By rule", "Rule", &x.rules)
	v.limits(x)
	v.Refused, v.Happened, v.Entries = shown(x.refused), x.events, shown(x.entries)
	v.certificates(x)
	for _, s := range x.started {
		d := s.document
		w := startView{At: s.at, First: s.first, Last: s.last, Executable: d.Executable, Files: d.Files, User: fmt.Sprint(d.UID), Unit: clip(d.Unit), Landlock: d.Landlock, Open: clip(strings.Join(d.Unenforced, ", "))}
		w.Args = clip(strings.Join(d.Args, " "))
		v.Starts = append(v.Starts, w)
	}
	return v
}

// shown returns rows with the latest first.
func shown(list []row) []row {
	out := slices.Clone(list)
	slices.Reverse(out)
	return out
}

func tabulate(caption, head string, t *tallies) table {
	list := t.sorted()
	out := table{Caption: caption, Head: head}
	if len(list) > maxListed {
		out.More = len(list) - maxListed
		list = list[:maxListed]
	}
	for _, x := range list {
		longest := float64(list[0].Permits + list[0].Others)
		out.Rows = append(out.Rows, tableRow{x, 100 * float64(x.Permits) / longest, 100 * float64(x.Others) / longest})
	}
	return out
}

// limitTitles say in words what limits bound; others are shown by their name.
var limitTitles = map[scope.Rule]string{
	scope.RuleNotionalWindow: "Worth of orders together", scope.RuleQtyWindow: "Quantity of orders together", scope.RuleOrdersWindow: "Number of orders", scope.RuleMessagesWindow: "Number of messages",
}

func (v *view) limits(x *record) {
	keys := slices.SortedFunc(maps.Keys(x.limits), func(a, b limitKey) int {
		return cmp.Or(strings.Compare(a.rule, b.rule), strings.Compare(a.key, b.key), strings.Compare(a.window, b.window))
	})
	for _, k := range keys {
		l := x.limits[k]
		title, ok := limitTitles[scope.Rule(k.rule)]
		if !ok {
			title = strings.ReplaceAll(k.rule, "_", " ")
		}
		if k.key != "" {
			title += ", " + clip(k.key)
		}
		v.Limits = append(v.Limits, limitView{Title: title, Name: k.rule, Window: k.window, Peak: l.peak, Used: grouped(l.used), Of: grouped(l.of), At: l.at, Counter: l.counter, Chart: usage(l, x)})
	}
	v.NotShown = x.moreLimits
}

func (v *view) certificates(x *record) {
	list := x.history
	if len(list) > maxHistory {
		v.CertsLeft = len(list) - maxHistory
		list = list[v.CertsLeft:]
	}
	v.Life = life(list)
	seen := make(map[string]bool)
	for _, c := range list {
		crt, att := c.action.Certificate, c.action.Attestation
		w := certificateView{Serial: crt.SerialNumber.Text(16), SHA256: base64.RawURLEncoding.EncodeToString(c.digest[:]), NotBefore: crt.NotBefore, NotAfter: crt.NotAfter, First: c.first, Last: c.last, Entries: c.entries,
			Scope: fmt.Sprintf("%x", c.scope[:4]), Attested: att.Time, Evidence: clip(att.EvidenceSHA256), Policy: clip(att.Policy), Device: clip(att.Device), Protection: protections[att.Protection], Mode: clip(att.Mode), EK: clip(att.EK)}
		if w.Protection == "" {
			w.Protection = clip(att.Protection)
		}
		if seen[w.Evidence] {
			w.Reused = "the same evidence as before"
		}
		seen[w.Evidence] = true
		w.Age = x.last.Sub(att.Time).Round(time.Minute).String()
		v.Certs = append(v.Certs, w)
	}
}

// protections of a key, in words.
var protections = map[string]string{
	"tpm": "made in the TPM, certified by it", "hsm-attested": "made in an HSM, as its maker attests", "hsm-declared": "in an HSM, as the host declares",
}
