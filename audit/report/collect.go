// Package report makes a page for a person out of a record, or of a part of one:
// a [Collector] watches a verification, and [Collector.Page] says what was
// proven, what the agent was allowed, and what it did.
//
// The page is one HTML file that loads nothing and runs no script. All that is
// on it comes from entries that verified. An agent chooses identifiers and a host
// may be an attacker's, so no text is believed to be harmless.
package report

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"inkan/audit"
	"inkan/internal/certext"
	"inkan/scope"
)

// Maxima of what a page has. Beyond them it counts, and says that it did.
const (
	maxNames   = 1000 // names that are told apart, of instruments and the like
	maxSeries  = 64   // limits over time
	maxEvents  = 500
	maxEntries = 25  // the last entries, and the last refusals
	maxHistory = 500 // certificates, starts, scopes
)

// Collector gathers what a page needs while a record is verified. Memory is
// bounded, whatever the record's length. Its methods are called from one
// goroutine.
type Collector struct {
	records []*record
}

// Options returns o with the collector watching. An error of the verification
// goes to [Collector.Page] as well.
func (c *Collector) Options(o audit.VerifyOptions) audit.VerifyOptions {
	o.Observe = c.observe
	o.Head = func(_ *audit.Checkpoint, f *audit.Filter) { c.records = append(c.records, newRecord()) }
	return o
}

// record is what was seen of one record.
type record struct {
	activity    series // permits, denials, events
	kinds       tallies
	instruments tallies
	venues      tallies
	limits      map[limitKey]*limit
	moreLimits  bool // there are limits beyond maxSeries
	rules       tallies
	refused     []row // the last
	entries     []row // the last
	events      []happening
	eventCount  uint64 // of happenings
	first, last time.Time

	certificates map[scope.Digest]*certificate
	history      []*certificate // in the order of their first entry
	scopes       []*allowed
	starts       map[scope.Digest]*start
	started      []*start
}

func newRecord() *record {
	return &record{limits: make(map[limitKey]*limit), certificates: make(map[scope.Digest]*certificate), starts: make(map[scope.Digest]*start)}
}

type limitKey struct{ rule, key, window string }

// limit is what entries state of a limit over time.
type limit struct {
	limitKey
	series
	peak     float64 // of the limit, 0 to 1
	used, of string  // at the peak
	at       time.Time
	counter  uint64
}

// certificate is one under which entries stand.
type certificate struct {
	action      *certext.ActionCertificate
	digest      scope.Digest
	scope       scope.Digest
	first, last uint64
	entries     uint64
}

// allowed is a scope, and the entries that were decided under it.
type allowed struct {
	digest      scope.Digest
	scope       *scope.Scope
	first, last uint64
}

// start is how an agent's process was started.
type start struct {
	digest      scope.Digest
	document    *scope.StartDocument
	first, last uint64
	at          time.Time
}

// row is an entry in a table.
type row struct {
	Counter  uint64
	Time     time.Time
	Decision string
	Kind     string
	Venue    string
	What     string
	Rule     string
	Message  string
	Signed   bool
}

// tally counts entries of one name.
type tally struct {
	Name            string
	Permits, Others uint64
	First, Last     time.Time
	Example         string // of a refusal: why
	worth           map[string]*scope.Decimal
}

// tallies counts by name. Names beyond maxNames are counted together.
type tallies struct {
	byName map[string]*tally
}

const others = "all others"

func (t *tallies) of(name string) *tally {
	if t.byName == nil {
		t.byName = make(map[string]*tally)
	}
	x, ok := t.byName[name]
	if !ok && len(t.byName) >= maxNames {
		name = others
		x, ok = t.byName[name]
	}
	if !ok {
		x = &tally{Name: name, worth: make(map[string]*scope.Decimal)}
		t.byName[name] = x
	}
	return x
}

// sorted returns the most used first.
func (t *tallies) sorted() []*tally {
	return slices.SortedFunc(maps.Values(t.byName), func(a, b *tally) int {
		return cmp.Or(cmp.Compare(b.Permits+b.Others, a.Permits+a.Others), strings.Compare(a.Name, b.Name))
	})
}

func (t *tally) add(st *scope.Statement) {
	if t.First.IsZero() {
		t.First = st.Time.Time
	}
	t.Last = st.Time.Time
	if st.Decision.Decision != scope.DecisionPermit {
		t.Others++
		return
	}
	t.Permits++
	n := st.Decision.Notional
	if n == nil {
		return
	}
	sum := new(scope.Decimal)
	if before, ok := t.worth[n.Currency]; ok {
		if sum = before; sum == nil {
			return // too large to add up
		}
	}
	if total, ok := sum.Add(n.Amount); ok {
		t.worth[n.Currency] = &total
	} else {
		t.worth[n.Currency] = nil
	}
}

// Worth says what the permitted actions are worth, by currency.
func (t *tally) Worth() []string {
	var out []string
	for _, c := range slices.Sorted(maps.Keys(t.worth)) {
		if sum := t.worth[c]; sum != nil {
			out = append(out, grouped(sum.String())+" "+c)
		} else {
			out = append(out, "too much to add up, "+c)
		}
	}
	return out
}

func (c *Collector) observe(v *audit.Verified) {
	if v.Context {
		return // it shows where a period begins or ends
	}
	if len(c.records) == 0 {
		c.records = append(c.records, newRecord())
	}
	c.records[len(c.records)-1].add(v)
}

func (r *record) add(v *audit.Verified) {
	st, at := v.Statement, v.Statement.Time.Time
	if r.first.IsZero() {
		r.first = at
	}
	r.last = at
	n := uint64(st.Counter)
	x := row{Counter: n, Time: at, Decision: clip(st.Decision.Decision), Kind: clip(string(st.Kind)), Venue: clip(st.Audience), What: clip(st.Action().Describe()), Rule: clip(string(st.Decision.Rule)), Message: clip(st.Decision.Message), Signed: v.Entry.JWS != ""}
	switch x.Decision {
	case scope.DecisionPermit, scope.DecisionDeny:
		r.kinds.of(named(x.Kind)).add(st)
		r.venues.of(named(x.Venue)).add(st)
		r.instruments.of(named(clip(st.Action().Instrument()))).add(st)
	}
	switch x.Decision {
	case scope.DecisionPermit:
		r.activity.add(at, 0, 1)
	case scope.DecisionDeny:
		r.activity.add(at, 1, 1)
		t := r.rules.of(x.Rule)
		t.add(st)
		t.Example = x.Message
		r.refused = last(r.refused, x)
	default: // a fact that is no action, such as a kill
		r.activity.add(at, 2, 1)
	}
	for _, h := range happened(v) {
		if r.eventCount++; len(r.events) < maxEvents {
			r.events = append(r.events, h)
		}
		if x.What == "" {
			x.What = h.Text
		}
	}
	r.entries = last(r.entries, x)
	r.use(st)
	r.under(v)
	if v.Start != nil {
		s, ok := r.starts[st.Run.Start]
		if !ok && len(r.started) < maxHistory {
			s = &start{digest: st.Run.Start, document: v.Start, first: n, at: at}
			r.starts[st.Run.Start] = s
			r.started = append(r.started, s)
		}
		if s != nil {
			s.last = n
		}
	}
}

// last appends x and keeps the last maxEntries.
func last(list []row, x row) []row {
	if len(list) == maxEntries {
		copy(list, list[1:])
		list[maxEntries-1] = x
		return list
	}
	return append(list, x)
}

// named stands in for a name that an entry does not have.
func named(s string) string {
	if s == "" {
		return "none named"
	}
	return s
}

// use keeps what an entry states of limits over time.
func (r *record) use(st *scope.Statement) {
	for _, u := range st.Decision.Utilisation {
		k := limitKey{rule: clip(string(u.Limit)), key: clip(u.Key)}
		if u.Window != (scope.Window{}) {
			k.window = u.Window.String()
		}
		l, ok := r.limits[k]
		if !ok {
			if len(r.limits) == maxSeries {
				r.moreLimits = true
				continue
			}
			l = &limit{limitKey: k}
			r.limits[k] = l
		}
		ratio := u.Ratio()
		l.series.add(st.Time.Time, 0, ratio)
		if l.at.IsZero() || ratio > l.peak {
			l.peak, l.used, l.of, l.at, l.counter = ratio, u.Used, u.Of, st.Time.Time, uint64(st.Counter)
		}
	}
}

// under keeps under which certificate and scope an entry stands.
func (r *record) under(v *audit.Verified) {
	st, n := v.Statement, uint64(v.Statement.Counter)
	c, ok := r.certificates[st.Decision.Certificate]
	if !ok {
		c = &certificate{action: v.Certificate, digest: st.Decision.Certificate, scope: st.Decision.Scope, first: n}
		r.certificates[c.digest] = c
		r.history = append(r.history, c)
		if i := slices.IndexFunc(r.scopes, func(a *allowed) bool { return a.digest == c.scope }); i < 0 && len(r.scopes) < maxHistory {
			r.scopes = append(r.scopes, &allowed{digest: c.scope, scope: v.Scope, first: n})
		}
	}
	c.last = n
	c.entries++
	if i := slices.IndexFunc(r.scopes, func(a *allowed) bool { return a.digest == c.scope }); i >= 0 {
		r.scopes[i].last = n
	}
}
