package scope

import (
	"fmt"
	"math"
	"time"

	"github.com/holiman/uint256"
)

// measure is how much of a limit is used before and after a use. One of the
// pairs is set: see limit.counts.
type measure struct {
	count, countAfter uint64
	sum, sumAfter     Decimal
	series            *series
	window            *running // nil: nothing was done
	unknown           bool     // there is no reference to measure against
}

// measure takes the measure of a limit. u is nil, and look true, for a moment
// that may be later than that of the next use: then nothing changes.
func (b *Book) measure(l *limit, key string, u *counted, t int64, look bool) (m measure) {
	in := func(s *series, what counting) {
		if m.series = s; s == nil {
			return
		}
		if look {
			m.window = s.look(what, &l.span, t)
		} else {
			m.window = s.window(what, &l.span, t)
		}
		m.sum, m.count = m.window.sum, m.window.count
	}
	one := uint64(0)
	if u != nil {
		one = 1
	}
	switch l.rule {
	case RuleNotionalWindow:
		in(b.currencies[key], sumAmounts)
		if m.sumAfter = m.sum; u != nil {
			m.sumAfter, _ = m.sum.Add(u.notional)
		}
	case RuleQtyWindow:
		in(b.instruments[key], sumAmounts)
		if m.sumAfter = m.sum; u != nil {
			m.sumAfter, _ = m.sum.Add(u.qty)
		}
	case RuleOrdersWindow:
		in(&b.all, countOrders)
		if m.countAfter = m.count; u != nil && (u.Kind == OrderNew || u.Kind == QuoteNew) {
			m.countAfter++
		}
	case RuleMessagesWindow:
		if key == "" {
			in(&b.all, countAll)
		} else {
			in(b.venues[key], countAll)
		}
		m.countAfter = m.count + one
	case RuleThrottle:
		if l.key == "" {
			in(&b.all, countRisk)
		} else {
			in(b.strategies[key], countRisk)
		}
		m.countAfter = m.count + one
	case RuleInstrumentCount:
		b.distinct(&m, l, b.instruments, u, func(u *counted) string { return u.Instrument }, t, look)
	case RuleVenueCount:
		b.distinct(&m, l, b.venues, u, func(u *counted) string { return u.Audience }, t, look)
	case RuleCollarWindow:
		b.spread(&m, l, key, u, t, look)
	case RuleOpenOrders, RuleOpenNotional:
		b.measureOpen(&m, key, u, t, look)
	}
	return m
}

// distinct counts the keys under which something was done in the window.
func (b *Book) distinct(m *measure, l *limit, all map[string]*series, u *counted, key func(*counted) string, t int64, look bool) {
	var begin int64
	if look {
		begin = l.span.begin(t)
	} else {
		begin = b.all.window(nothing, &l.span, t).head
	}
	for _, s := range all {
		if s.active >= begin {
			m.count++
		}
	}
	if m.countAfter = m.count; u != nil {
		if s := all[key(u)]; s == nil || s.active < begin {
			m.countAfter++
		}
	}
}

// spread is how far prices in the window are apart, in basis points of the
// reference, rounded up: the limit is a whole number.
func (b *Book) spread(m *measure, l *limit, instrument string, u *counted, t int64, look bool) {
	if u == nil {
		// Of several currencies the widest one counts.
		for q, s := range b.prices {
			if q.instrument == instrument {
				w := s.look(extremes, &l.span, t)
				if n, ok := w.spread(nil, s.ref); ok {
					m.count = max(m.count, n)
				}
			}
		}
		m.countAfter = m.count
		return
	}
	if m.series = b.prices[quoted{instrument, u.Currency}]; m.series != nil {
		if look {
			m.window = m.series.look(extremes, &l.span, t)
		} else {
			m.window = m.series.window(extremes, &l.span, t)
		}
	}
	m.count, _ = m.window.spread(nil, u.Reference)
	var ok bool
	m.countAfter, ok = m.window.spread(u, u.Reference)
	m.unknown = !ok
}

// spread returns how far the prices in a window and those of a use are apart;
// ok is false without a reference. No prices are 0 apart.
func (w *running) spread(u *counted, reference Decimal) (bps uint64, ok bool) {
	if reference.Sign() <= 0 {
		return math.MaxUint32, false
	}
	var low, high Decimal
	switch {
	case w != nil && len(w.least) > 0:
		low, high = w.least[0].px, w.most[0].px
		if u != nil && u.low.Cmp(low) < 0 {
			low = u.low
		}
		if u != nil && u.high.Cmp(high) > 0 {
			high = u.high
		}
	case u != nil:
		low, high = u.low, u.high
	}
	apart, _ := high.Sub(low) // at most 2 x 10^18, for which there is room
	var n, rest uint256.Int
	n.Mul(&apart.scaled, uint256.NewInt(10_000))
	n.DivMod(&n, &reference.scaled, &rest)
	if !rest.IsZero() {
		n.AddUint64(&n, 1)
	}
	if !n.IsUint64() || n.Uint64() > math.MaxUint32 {
		return math.MaxUint32, true
	}
	return n.Uint64(), true
}

func (b *Book) measureOpen(m *measure, currency string, u *counted, t int64, look bool) {
	if !look {
		b.open.expire(t)
	}
	count, sums := b.open.count, b.open.sums
	if look {
		count, sums = b.open.at(t)
	}
	m.count, m.sum = uint64(count), sums[currency]
	m.countAfter, m.sumAfter = m.count, m.sum
	if u == nil {
		return
	}
	if _, rests := openUntil(t, u.TIF, u.Expires); !rests {
		return
	}
	if u.old == nil {
		m.countAfter++
		m.sumAfter, _ = m.sum.Add(u.Notional)
	} else if more, _ := u.Notional.Sub(u.old.chain.most); more.Sign() > 0 {
		m.sumAfter, _ = m.sum.Add(more)
	}
}

// refusal says what a limit that is exceeded refuses.
func (b *Book) refusal(l *limit, key string, u *counted, m *measure) *Refusal {
	if m.unknown {
		return &Refusal{Rule: l.rule, Key: key, Limit: fmt.Sprint(l.count), Block: l.block, Message: "there is no reference price of " + key + ", so the distance of prices cannot be checked"}
	}
	r := &Refusal{Rule: l.rule, Key: key, Block: l.block, FreeAt: b.free(l, u, m)}
	if l.counts() {
		r.Used, r.Value, r.Limit = fmt.Sprint(m.count), fmt.Sprint(m.countAfter), fmt.Sprint(l.count)
		r.Excess, r.Left = fmt.Sprint(m.countAfter-l.count), fmt.Sprint(l.count-min(l.count, m.count))
	} else {
		left, _ := l.sum.Sub(m.sum)
		if left.Sign() < 0 {
			left = Decimal{}
		}
		over, _ := m.sumAfter.Sub(l.sum)
		r.Used, r.Value, r.Limit, r.Excess, r.Left = m.sum.String(), m.sumAfter.String(), l.sum.String(), over.String(), left.String()
	}
	to := ""
	if key != "" {
		to = " to " + key
	}
	switch l.rule {
	case RuleNotionalWindow, RuleQtyWindow:
		r.Message = fmt.Sprintf("the sum of %s in %s is %s, at most %s is allowed: %s is used, %s is left", key, l.span, r.Value, r.Limit, r.Used, r.Left)
	case RuleOpenNotional:
		r.Message = fmt.Sprintf("open orders are worth %s %s, at most %s is allowed: %s is open, %s is left", r.Value, key, r.Limit, r.Used, r.Left)
	case RuleOpenOrders:
		r.Message = fmt.Sprintf("%s orders are open, at most %s are allowed", r.Value, r.Limit)
	case RuleOrdersWindow:
		r.Message = fmt.Sprintf("%s orders in %s, at most %s are allowed", r.Value, l.span, r.Limit)
	case RuleMessagesWindow:
		r.Message = fmt.Sprintf("%s messages%s in %s, at most %s are allowed", r.Value, to, l.span, r.Limit)
	case RuleCollarWindow:
		r.Message = fmt.Sprintf("prices of %s in %s are %s basis points of the reference %s apart, at most %s are allowed", key, l.span, r.Value, u.Reference, r.Limit)
	case RuleInstrumentCount:
		r.Message = fmt.Sprintf("%s instruments in %s, at most %s are allowed", r.Value, l.span, r.Limit)
	case RuleVenueCount:
		r.Message = fmt.Sprintf("%s venues in %s, at most %s are allowed", r.Value, l.span, r.Limit)
	case RuleThrottle:
		who := "the agent"
		if key != "" {
			who = "the algorithm " + key
		}
		r.FreeAt = time.Time{}
		r.Message = fmt.Sprintf("%s was executed %s times in %s, at most %s are allowed: it is disabled until a person enables it again", who, r.Value, l.span, r.Limit)
	}
	return r
}

// walk bounds how many entries are looked through for the moment at which
// enough has left a window.
const walk = 1000

// free is a moment before which the limit refuses the use again; zero where no
// time makes it possible.
func (b *Book) free(l *limit, u *counted, m *measure) time.Time {
	switch l.rule {
	case RuleOpenOrders, RuleOpenNotional:
		if len(b.open.ends) > 0 {
			return time.UnixMicro(b.open.ends[0].end).UTC()
		}
		return time.Time{}
	case RuleInstrumentCount, RuleVenueCount:
		all, first := b.instruments, int64(math.MaxInt64)
		if l.rule == RuleVenueCount {
			all = b.venues
		}
		begin := l.span.begin(u.t)
		for _, s := range all {
			if s.active >= begin {
				first = min(first, s.active)
			}
		}
		if l.count == 0 || first == math.MaxInt64 {
			return time.Time{}
		}
		return time.UnixMicro(l.span.end(first)).UTC()
	case RuleCollarWindow:
		return l.freePrices(u, m)
	}
	if m.series == nil {
		return time.Time{}
	}
	w, c, left, after := m.window, m.window.first, m.window.count, m.sumAfter
	var e entry
	at := int64(0)
	for n := 0; n < walk && m.series.next(&c, &e); n++ {
		if l.counts() {
			if w.counts(&e) == 0 {
				continue
			}
			left--
			if at = e.at; left+m.countAfter-m.count <= l.count {
				break
			}
			continue
		}
		if e.a.Sign() == 0 {
			continue
		}
		at = e.at
		if after, _ = after.Sub(e.a); after.Cmp(l.sum) <= 0 {
			break
		}
	}
	alone := l.counts() && l.count == 0
	if !l.counts() {
		own := u.notional
		if l.rule == RuleQtyWindow {
			own = u.qty
		}
		alone = own.Cmp(l.sum) > 0
	}
	if at == 0 || alone {
		return time.Time{}
	}
	return time.UnixMicro(l.span.end(at)).UTC()
}

// freePrices is when what is too far away from the use's prices has left the window.
func (l *limit) freePrices(u *counted, m *measure) time.Time {
	far := func(low, high Decimal) bool {
		w := running{least: []priced{{px: low}}, most: []priced{{px: high}}}
		n, ok := w.spread(nil, u.Reference)
		return !ok || n > l.count
	}
	if far(u.low, u.high) || m.window == nil || len(m.window.least) == 0 {
		return time.Time{}
	}
	var last int64 // of the prices that are too far away
	for i := 0; i < walk && i < len(m.window.least) && far(m.window.least[i].px, u.high); i++ {
		last = max(last, m.window.least[i].at)
	}
	for i := 0; i < walk && i < len(m.window.most) && far(u.low, m.window.most[i].px); i++ {
		last = max(last, m.window.most[i].at)
	}
	if last == 0 { // those in the window are too far apart themselves, since the limit was wider
		last = min(m.window.least[0].at, m.window.most[0].at)
	}
	return time.UnixMicro(l.span.end(last)).UTC()
}
