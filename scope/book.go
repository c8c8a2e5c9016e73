package scope

import (
	"fmt"
	"slices"
	"strconv"
	"time"
)

func sortBy[T any](list []T, compare func(a, b T) int) { slices.SortFunc(list, compare) }

// Use is what one permitted action uses of the limits over time. It is derived
// from the action's statement, so that the record is the only truth.
type Use struct {
	At         time.Time
	Kind       Kind
	ClOrdID    string
	Replaces   string // OrigClOrdID
	Audience   string
	Side       string
	Instrument string
	Currency   string
	Notional   Decimal
	Qty        Decimal
	Duplicate  string // equal for orders that are the same but for their ids

	newNotional, newQty Decimal // what it counts
}

// UseOf returns what a permit's action uses, if it is done at a time.
func UseOf(p *Permit, at time.Time) Use {
	return useOf(p.action, p.notional, p.currency, at)
}

// UseOfStatement returns what a permitted statement used.
func UseOfStatement(s *Statement) Use {
	var n Amount
	if s.Decision.Notional != nil {
		n = *s.Decision.Notional
	}
	return useOf(s.Action(), n.Amount, n.Currency, s.Time.Time)
}

func useOf(a *Action, notional Decimal, currency string, at time.Time) Use {
	u := Use{At: at, Kind: a.Kind, Audience: a.Audience, Instrument: a.Instrument(), Currency: currency, Notional: notional}
	o := a.Order
	if o == nil {
		return u
	}
	u.ClOrdID, u.Replaces, u.Side = o.ClOrdID, o.OrigClOrdID, o.Side
	for _, q := range [...]*Decimal{o.OrderQty, o.BidSize, o.OfferSize} {
		if q != nil {
			u.Qty, _ = u.Qty.Add(*q) // three sizes of 18 digits: what overflows was refused by its notional
		}
	}
	if a.Kind == OrderNew || a.Kind == OrderReplace {
		u.Duplicate = fmt.Sprint(o.Account, "|", u.Instrument, "|", o.Side, "|", o.OrdType, "|", o.Price, "|", o.StopPx, "|", o.OrderQty, "|", o.CashOrderQty, "|", o.Currency)
	}
	return u
}

// Utilisation says how much of a limit over time is used after an action.
type Utilisation struct {
	Limit  Rule   `json:"l"`
	Key    string `json:"key,omitzero"` // currency or instrument
	Window Window `json:"win"`
	Used   string `json:"used"`
	Of     string `json:"of"`
}

// Ratio is what is used as a part of the limit, for a gauge; 1 where the limit is 0.
func (u Utilisation) Ratio() float64 {
	used, err1 := strconv.ParseFloat(u.Used, 64)
	of, err2 := strconv.ParseFloat(u.Of, 64)
	if err1 != nil || err2 != nil || of == 0 {
		return 1
	}
	return used / of
}

// Book sums up what was used. Uses are added in the order of their times. It
// is not safe for concurrent use: one writer owns it.
type Book struct {
	uses    []Use
	base    int // how many were dropped before uses[0]
	windows map[windowKey]*running
	orders  map[string]Use // by ClOrdID, of those in uses
	same    map[string]time.Time

	lasting Counter      // the last event whose effect lasts
	kills   []ActiveKill // in force
}

type windowKey struct {
	rule   Rule
	key    string
	window Window
}

// running is the sum of what is in a window; first is the oldest in it.
type running struct {
	first int
	sum   Decimal
	count uint32
}

// NewBook returns an empty book.
func NewBook() *Book {
	return &Book{windows: make(map[windowKey]*running), orders: make(map[string]Use), same: make(map[string]time.Time)}
}

// resolve computes what the use counts (rule G5): a replacement counts what it
// adds to the order that it replaces, if that is one of the last MaxWindow at the same
// venue, in the same instrument, currency and on the same side, and was not
// replaced before; otherwise all of it.
func (b *Book) resolve(u Use) Use {
	u.newNotional, u.newQty = u.Notional, u.Qty
	old, ok := b.orders[u.Replaces]
	if u.Kind != OrderReplace || !ok || old.At.Before(u.At.Add(-MaxWindow)) ||
		old.Audience != u.Audience || old.Instrument != u.Instrument || old.Side != u.Side || old.Currency != u.Currency {
		return u
	}
	added := func(now, old Decimal) Decimal {
		if d, fits := now.Sub(old); fits && d.Sign() > 0 {
			return d
		}
		return Decimal{}
	}
	u.newNotional, u.newQty = added(u.Notional, old.Notional), added(u.Qty, old.Qty)
	return u
}

// counts is what a resolved use counts for a limit.
func (u *Use) counts(k windowKey) (amount Decimal, count uint32) {
	switch {
	case k.rule == RuleNotionalWindow && u.Currency == k.key:
		return u.newNotional, 0
	case k.rule == RuleQtyWindow && u.Instrument == k.key:
		return u.newQty, 0
	case k.rule == RuleOrdersWindow && (u.Kind == OrderNew || u.Kind == QuoteNew), k.rule == RuleMessagesWindow:
		return Decimal{}, 1
	}
	return Decimal{}, 0
}

func (w *running) add(amount Decimal, count uint32) {
	if sum, ok := w.sum.Add(amount); ok {
		w.sum = sum
	} else {
		w.sum.scaled.Sub(&tooLarge, &pow10[0]) // the largest there is: every limit refuses
	}
	w.count += count
}

// window returns the running sum of a window as it was last looked at.
func (b *Book) window(k windowKey) *running {
	w := b.windows[k]
	if w == nil {
		w = &running{first: b.base}
		for i := range b.uses {
			w.add(b.uses[i].counts(k))
		}
		b.windows[k] = w
	}
	return w
}

// at returns what is in a window that ends at t. No later call may ask for an earlier time.
func (b *Book) at(k windowKey, t time.Time) *running {
	w := b.window(k)
	b.advance(w, k, t)
	return w
}

// advance takes out what has left the window by t.
func (b *Book) advance(w *running, k windowKey, t time.Time) {
	edge, inclusive := k.window.begin(t)
	for ; w.first < b.base+len(b.uses); w.first++ {
		u := &b.uses[w.first-b.base]
		if u.At.After(edge) || inclusive && u.At.Equal(edge) {
			break
		}
		amount, count := u.counts(k)
		w.sum, _ = w.sum.Sub(amount)
		w.count -= count
	}
}

// limitsOf lists the limits over time that apply to an action of the scope.
func (s *Scope) limitsOf(u *Use, each func(k windowKey, of Decimal, count uint32) *Refusal) *Refusal {
	d := &s.doc
	for _, l := range d.NotionalWindows {
		if l.Currency == u.Currency {
			if r := each(windowKey{RuleNotionalWindow, l.Currency, l.Window}, l.Amount, 0); r != nil {
				return r
			}
		}
	}
	own := slices.ContainsFunc(d.QtyWindows, func(l QtyWindow) bool { return l.Instrument == u.Instrument })
	for _, l := range d.QtyWindows {
		if u.Instrument != "" && (l.Instrument == u.Instrument || l.Instrument == "*" && !own) {
			if r := each(windowKey{RuleQtyWindow, u.Instrument, l.Window}, l.Qty, 0); r != nil {
				return r
			}
		}
	}
	for _, l := range d.OrderWindows {
		if r := each(windowKey{RuleOrdersWindow, "", l.Window}, Decimal{}, l.Count); r != nil {
			return r
		}
	}
	for _, l := range d.MessageWindows {
		if r := each(windowKey{RuleMessagesWindow, "", l.Window}, Decimal{}, l.Count); r != nil {
			return r
		}
	}
	return nil
}

// Check says whether a scope's limits over time allow one more use, and changes
// nothing. Cancels always pass (rule G7).
func (b *Book) Check(s *Scope, u Use) *Refusal {
	if u.Kind.reducesRisk() {
		return nil
	}
	if r := b.killed(u.Kind, u.Audience); r != nil {
		return r
	}
	d := &s.doc
	if last, ok := b.same[u.Duplicate]; ok && u.Duplicate != "" && d.DuplicateMS != 0 {
		if left := last.Add(time.Duration(d.DuplicateMS) * time.Millisecond).Sub(u.At); left > 0 {
			return &Refusal{Rule: RuleDuplicate, Value: u.At.Sub(last).String(), Limit: fmt.Sprint(d.DuplicateMS), FreeAt: u.At.Add(left),
				Message: fmt.Sprintf("the same order was signed %d ms ago, at least %d ms must pass", u.At.Sub(last).Milliseconds(), d.DuplicateMS)}
		}
	}
	u = b.resolve(u)
	return s.limitsOf(&u, func(k windowKey, of Decimal, count uint32) *Refusal {
		w := b.at(k, u.At)
		amount, n := u.counts(k)
		if n > 0 {
			if w.count < count {
				return nil
			}
			return &Refusal{Rule: k.rule, Value: fmt.Sprint(w.count + 1), Limit: fmt.Sprint(count), Excess: "1", FreeAt: b.free(k, w),
				Message: fmt.Sprintf("%d in %s, at most %d are allowed", w.count+1, k.window, count)}
		}
		sum, ok := w.sum.Add(amount)
		if ok && sum.Cmp(of) <= 0 || amount.Sign() == 0 {
			return nil
		}
		r := exceeds(k.rule, "", fmt.Sprintf("the sum of %s in %s", k.key, k.window), sum, of, "")
		r.FreeAt = b.free(k, w)
		return r
	})
}

// free is when the oldest use leaves a window: only then can more be possible.
func (b *Book) free(k windowKey, w *running) time.Time {
	for i := w.first; i < b.base+len(b.uses); i++ {
		u := &b.uses[i-b.base]
		if amount, count := u.counts(k); count > 0 || amount.Sign() > 0 {
			return k.window.end(u.At)
		}
	}
	return time.Time{}
}

// Add counts a use. Its time is not before that of the use before it.
func (b *Book) Add(u Use) {
	u = b.resolve(u)
	b.uses = append(b.uses, u)
	for k, w := range b.windows {
		w.add(u.counts(k))
	}
	if u.Kind == OrderReplace {
		delete(b.orders, u.Replaces) // it is replaced once
	}
	if u.ClOrdID != "" && !u.Kind.reducesRisk() {
		b.orders[u.ClOrdID] = u
	}
	if u.Duplicate != "" {
		b.same[u.Duplicate] = u.At
	}
	b.drop(u.At.Add(-MaxWindow - time.Minute))
}

// drop forgets what is in no window any more.
func (b *Book) drop(before time.Time) {
	n := 0
	for n < len(b.uses) && b.uses[n].At.Before(before) {
		n++
	}
	if n < 1024 && n < len(b.uses)/2 || n == 0 {
		return // seldom and much at a time
	}
	for k, w := range b.windows {
		for ; w.first < b.base+n; w.first++ {
			amount, count := b.uses[w.first-b.base].counts(k)
			w.sum, _ = w.sum.Sub(amount)
			w.count -= count
		}
	}
	for _, u := range b.uses[:n] {
		if o, ok := b.orders[u.ClOrdID]; ok && o.At.Equal(u.At) {
			delete(b.orders, u.ClOrdID)
		}
		if at, ok := b.same[u.Duplicate]; ok && at.Equal(u.At) {
			delete(b.same, u.Duplicate)
		}
	}
	b.uses = slices.Clone(b.uses[n:])
	b.base += n
}

// Utilisation returns what a use leaves used of each limit over time that
// applies to it. The use is not added yet.
func (b *Book) Utilisation(s *Scope, u Use) []Utilisation {
	var out []Utilisation
	u = b.resolve(u)
	s.limitsOf(&u, func(k windowKey, of Decimal, count uint32) *Refusal {
		w := *b.at(k, u.At)
		w.add(u.counts(k))
		x := Utilisation{Limit: k.rule, Key: k.key, Window: k.window, Used: w.sum.String(), Of: of.String()}
		if k.rule == RuleOrdersWindow || k.rule == RuleMessagesWindow {
			x.Used, x.Of = fmt.Sprint(w.count), fmt.Sprint(count)
		}
		out = append(out, x)
		return nil
	})
	return out
}

// Usage returns what is used of each limit over time at a moment, which may be
// later than that of the next use: nothing is changed. A limit for any
// instrument stands once for each instrument that something was done in.
func (b *Book) Usage(s *Scope, at time.Time) []Utilisation {
	var out []Utilisation
	add := func(k windowKey, of Decimal, count uint32) *Refusal {
		w := *b.window(k)
		b.advance(&w, k, at)
		x := Utilisation{Limit: k.rule, Key: k.key, Window: k.window, Used: w.sum.String(), Of: of.String()}
		if k.rule == RuleOrdersWindow || k.rule == RuleMessagesWindow {
			x.Used, x.Of = fmt.Sprint(w.count), fmt.Sprint(count)
		}
		out = append(out, x)
		return nil
	}
	d := &s.doc
	var instruments []string
	for i := range b.uses {
		instruments = append(instruments, b.uses[i].Instrument)
	}
	for _, l := range d.QtyWindows {
		instruments = append(instruments, l.Instrument)
	}
	slices.Sort(instruments)
	instruments = slices.DeleteFunc(slices.Compact(instruments), func(i string) bool { return i == "" || i == "*" })
	var currencies []string
	for _, l := range d.NotionalWindows {
		currencies = append(currencies, l.Currency)
	}
	for _, c := range slices.Compact(currencies) { // they are sorted
		s.limitsOf(&Use{Currency: c}, func(k windowKey, of Decimal, count uint32) *Refusal {
			if k.rule == RuleNotionalWindow {
				add(k, of, count)
			}
			return nil
		})
	}
	for _, i := range instruments {
		s.limitsOf(&Use{Instrument: i}, func(k windowKey, of Decimal, count uint32) *Refusal {
			if k.rule == RuleQtyWindow {
				add(k, of, count)
			}
			return nil
		})
	}
	s.limitsOf(&Use{}, add) // what depends on neither
	return out
}
