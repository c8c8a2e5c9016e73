package scope

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

func sortBy[T any](list []T, compare func(a, b T) int) { slices.SortFunc(list, compare) }

// maxDuplicateMS is the longest duplicate_window_ms.
const maxDuplicateMS = 3_600_000

// Utilisation says how much of a limit over time is used after an action.
type Utilisation struct {
	Limit    Rule   `json:"l"`
	Key      string `json:"key,omitzero"` // currency, instrument, venue or algorithm
	Window   Window `json:"win,omitzero"` // absent for limits of what is open
	Used     string `json:"used"`
	Of       string `json:"of"`
	Disabled bool   `json:"disabled,omitzero"` // by the throttle, until it is armed again; never in a statement
}

// Ratio is what is used as a part of the limit, for a gauge; 1 where the limit is 0.
func (u Utilisation) Ratio() float64 {
	used, err1 := strconv.ParseFloat(u.Used, 64)
	of, err2 := strconv.ParseFloat(u.Of, 64)
	if err1 != nil || err2 != nil || of == 0 || u.Disabled {
		return 1
	}
	return used / of
}

// Book sums up what was used. Uses are added in the order of their times. It
// is not safe for concurrent use: one writer owns it.
type Book struct {
	all         series // every permit
	venues      map[string]*series
	currencies  map[string]*series // notionals
	instruments map[string]*series // quantities
	prices      map[quoted]*series
	strategies  map[string]*series // all but cancels
	swept       int                // strategies that were left at the last sweep

	open     openOrders
	disabled map[string]trip // algorithms, and "" for the agent

	// Orders by sameness and when they were last signed, of this hour and the one before.
	same, sameBefore map[[16]byte]int64
	sameSince        int64

	lasting Counter         // the last entry whose effect lasts
	kills   []ActiveKill    // in force
	issued  map[string]bool // kills of the issuer that were ever taken over, by id
	unknown time.Time       // of the last recovery: what was done before is not all known

	policy      *Policy // in effect, expired or not
	policyEvent Counter // the number of its entry
	narrowed    narrowed
}

// trip is when a throttle disabled something: its refusal is the entry.
type trip struct {
	since time.Time
	entry Counter
}

// quoted is an instrument in a currency: prices in one are not those in another.
type quoted struct{ instrument, currency string }

// NewBook returns an empty book.
func NewBook() *Book {
	return &Book{venues: make(map[string]*series), currencies: make(map[string]*series), instruments: make(map[string]*series),
		prices: make(map[quoted]*series), strategies: make(map[string]*series), open: newOpenOrders(), disabled: make(map[string]trip),
		same: make(map[[16]byte]int64), sameBefore: make(map[[16]byte]int64), issued: make(map[string]bool)}
}

// counted is a use with what it counts (rule G5).
type counted struct {
	*Use
	t        int64
	old      *link // what it replaces
	notional Decimal
	qty      Decimal
}

// resolve computes what the use counts: a replacement counts what it adds to
// the open order that it replaces; everything else all of it.
func (b *Book) resolve(u *Use) counted {
	c := counted{Use: u, t: u.At.UnixMicro(), notional: u.Notional, qty: u.Qty}
	if c.old = b.open.replaces(u, c.t); c.old != nil {
		added := func(now, old Decimal) Decimal {
			if d, fits := now.Sub(old); fits && d.Sign() > 0 {
				return d
			}
			return Decimal{}
		}
		c.notional, c.qty = added(u.Notional, c.old.notional), added(u.Qty, c.old.qty)
	}
	return c
}

// Check says whether a scope's limits over time allow one more use, and changes
// nothing. Cancels always pass (rule G7).
func (b *Book) Check(s *Scope, u Use) *Refusal {
	if u.Kind.reducesRisk() {
		return nil
	}
	if r := b.forgotten(s, &u); r != nil {
		return r
	}
	if r := b.refusesDisabled(&u); r != nil {
		return r
	}
	if r := b.refusesSame(s, &u); r != nil {
		return r
	}
	c := b.resolve(&u)
	for i := range s.limits {
		l := &s.limits[i]
		if key, ok := l.applies(s, &u); ok {
			if r := lift(u.lifts, b.refuses(l, key, &c)); r != nil {
				return r
			}
		}
		if r := b.refusesName(l, &c); r != nil { // also in another currency than that of the limit: names are the venue's
			return r
		}
	}
	return nil
}

// refuses holds a use against a limit that applies to it.
func (b *Book) refuses(l *limit, key string, c *counted) *Refusal {
	if l.rule == RuleQtyWindow && c.byAmount {
		return &Refusal{Rule: l.rule, Key: key, Field: "ord.CashOrderQty", Limit: l.sum.String(), Message: "an order by amount has no quantity that max_qty_per_window could bound: give OrderQty"}
	}
	m := b.measure(l, key, c, c.t, false)
	if l.exceeded(&m) {
		return b.refusal(l, key, c, &m)
	}
	return nil
}

// exceeded says that the limit refuses. What adds nothing is not refused, even
// where more is used than is allowed now.
func (l *limit) exceeded(m *measure) bool {
	if l.counts() {
		return m.countAfter > l.count && (m.countAfter > m.count || l.rule == RuleCollarWindow && m.unknown)
	}
	return m.sumAfter.Cmp(l.sum) > 0 && m.sumAfter.Cmp(m.sum) > 0
}

func (b *Book) refusesSame(s *Scope, u *Use) *Refusal {
	ms := s.doc.DuplicateMS
	if ms == 0 || u.same == [16]byte{} {
		return nil
	}
	micros, ok := b.same[u.same]
	if !ok {
		micros, ok = b.sameBefore[u.same]
	}
	last := time.UnixMicro(micros)
	free := last.Add(time.Duration(ms) * time.Millisecond)
	if !ok || !free.After(u.At) {
		return nil
	}
	return &Refusal{Rule: RuleDuplicate, Value: u.At.Sub(last).String(), Limit: fmt.Sprint(ms), FreeAt: free,
		Message: fmt.Sprintf("the same order was signed %d ms ago, at least %d ms must pass", u.At.Sub(last).Milliseconds(), ms)}
}

// refusesName: under limits of what is open each open order has its own name,
// and no more of them than are remembered.
func (b *Book) refusesName(l *limit, u *counted) *Refusal {
	if l.rule != RuleOpenOrders && l.rule != RuleOpenNotional || u.ClOrdID == "" {
		return nil
	}
	if _, rests := openUntil(u.t, u.TIF, u.Expires); !rests {
		return nil
	}
	same := b.open.named[orderName{u.Audience, u.ClOrdID}]
	if same != nil && (l.rule == RuleOpenOrders || l.key == same.currency || l.key == u.Currency) {
		return &Refusal{Rule: l.rule, Field: "ord.ClOrdID", Value: u.ClOrdID, Message: fmt.Sprintf("an order %s is open at %s: give each order its own ClOrdID", u.ClOrdID, u.Audience)}
	}
	if b.open.live >= MaxOpen {
		return &Refusal{Rule: l.rule, Value: fmt.Sprint(b.open.live + 1), Limit: fmt.Sprint(MaxOpen), Block: Hard, Message: fmt.Sprintf("%d orders and replacements are open, and no more are remembered", b.open.live)}
	}
	return nil
}

// Add counts a use. Its time is not before that of the use before it.
func (b *Book) Add(u Use) {
	t := u.At.UnixMicro()
	b.open.expire(t)
	c := b.resolve(&u)
	old := t - (MaxWindow + time.Minute).Microseconds()
	risk := !u.Kind.reducesRisk()
	e := entry{at: t, order: u.Kind == OrderNew || u.Kind == QuoteNew, risk: risk}
	count := func(s *series, a, high Decimal) {
		e.a, e.b = a, high
		s.append(e)
		s.forget(old)
		if risk {
			s.active = t
		}
	}
	count(&b.all, Decimal{}, Decimal{})
	count(under(b.venues, u.Audience), Decimal{}, Decimal{})
	if !risk {
		return
	}
	if u.Currency != "" && c.notional.Sign() != 0 {
		count(under(b.currencies, u.Currency), c.notional, c.notional)
	}
	if u.Instrument != "" {
		s := under(b.instruments, u.Instrument)
		if s.active = t; c.qty.Sign() != 0 {
			count(s, c.qty, c.qty)
		}
	}
	if u.priced {
		s := under(b.prices, quoted{u.Instrument, u.Currency})
		count(s, u.low, u.high)
		s.ref = u.Reference
	}
	count(under(b.strategies, u.Strategy), Decimal{}, Decimal{})
	if len(b.strategies) > 2*b.swept+256 {
		maps.DeleteFunc(b.strategies, func(_ string, s *series) bool { return s.active < old })
		b.swept = len(b.strategies)
	}
	b.open.add(&u, t, c.old)
	if u.same != [16]byte{} {
		if t-b.sameSince > maxDuplicateMS*1000 {
			b.sameBefore, b.same, b.sameSince = b.same, make(map[[16]byte]int64), t
		}
		b.same[u.same] = t
	}
}

func under[K comparable](m map[K]*series, key K) *series {
	s := m[key]
	if s == nil {
		s = new(series)
		m[key] = s
	}
	return s
}

// Utilisation returns what a use leaves used of each limit over time that
// applies to it. The use is not added yet.
func (b *Book) Utilisation(s *Scope, u Use) []Utilisation {
	if len(s.limits) == 0 {
		return nil
	}
	out := make([]Utilisation, 0, len(s.limits))
	c := b.resolve(&u)
	for i := range s.limits {
		l := &s.limits[i]
		if key, ok := l.applies(s, &u); ok {
			m := b.measure(l, key, &c, c.t, false)
			out = append(out, l.utilisation(key, &m))
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

func (l *limit) utilisation(key string, m *measure) Utilisation {
	x := Utilisation{Limit: l.rule, Key: key, Window: l.span.Window}
	if l.counts() {
		x.Used, x.Of = strconv.FormatUint(m.countAfter, 10), strconv.FormatUint(l.count, 10)
	} else {
		x.Used, x.Of = m.sumAfter.String(), l.sum.String()
	}
	return x
}

// Usage returns what is used of each limit over time at a moment, which may be
// later than that of the next use: nothing is changed. A limit for any
// instrument stands once for each instrument that something was done in.
func (b *Book) Usage(s *Scope, at time.Time) []Utilisation {
	var out []Utilisation
	t := at.UnixMicro()
	add := func(l *limit, key string) *Utilisation {
		m := b.measure(l, key, nil, t, true)
		out = append(out, l.utilisation(key, &m))
		return &out[len(out)-1]
	}
	for i := range s.limits {
		l := &s.limits[i]
		switch {
		case l.rule == RuleThrottle && l.key == "":
			_, off := b.disabled[""]
			add(l, "").Disabled = off
		case l.rule == RuleThrottle:
			for _, key := range b.busiest(l, t) {
				_, off := b.disabled[key]
				add(l, key).Disabled = off
			}
		case l.key == "*":
			for _, key := range slices.Sorted(maps.Keys(b.instruments)) {
				if !(l.own && s.ownQty(key)) {
					add(l, key)
				}
			}
		default:
			add(l, l.key)
		}
	}
	isQty := func(u Utilisation) bool { return u.Limit == RuleQtyWindow }
	if first := slices.IndexFunc(out, isQty); first >= 0 { // by instrument, whatever entry it is from
		n := first
		for n < len(out) && isQty(out[n]) {
			n++
		}
		slices.SortStableFunc(out[first:n], func(a, b Utilisation) int { return strings.Compare(a.Key, b.Key) })
	}
	return out
}

// maxStrategies bounds how many algorithms [Book.Usage] lists: their names come from the agent.
const maxStrategies = 64

// busiest lists the algorithms that are disabled or were executed in a window: if
// they are many, those that were executed most often.
func (b *Book) busiest(l *limit, t int64) []string {
	type used struct {
		key string
		off bool
		n   uint64
	}
	var all []used
	for key := range b.strategies {
		m := b.measure(l, key, nil, t, true)
		_, off := b.disabled[key]
		if off || m.count > 0 {
			all = append(all, used{key, off, m.count})
		}
	}
	slices.SortFunc(all, func(a, b used) int {
		if a.off != b.off {
			if a.off {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(b.n, a.n), strings.Compare(a.key, b.key))
	})
	var keys []string
	for _, x := range all[:min(len(all), maxStrategies)] {
		keys = append(keys, x.key)
	}
	slices.Sort(keys)
	return keys
}
