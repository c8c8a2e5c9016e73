package scope

import (
	"container/heap"
	"math"
	"slices"
	"time"
)

// MaxOpen bounds how many orders and replacements are known as open at a time.
// Beyond it the oldest is forgotten, but where a limit of open orders holds: there
// no more is permitted.
const MaxOpen = 100_000

// maxChain bounds the open links of a chain. A replacement of the last of so many
// counts as a new order.
const maxChain = 256

// dayOrder is how long an order counts as open that its venue ends by itself on
// its trading day.
const dayOrder = 24 * time.Hour

// forever is the end of what only an acknowledgement ends.
const forever = math.MaxInt64

// orderName is how a venue knows an order.
type orderName struct{ venue, id string }

// link is a new order, a quote or a replacement that counts as open.
type link struct {
	name       orderName
	counter    Counter
	at         int64
	end        int64 // the first microsecond at which it is not open
	instrument string
	side       string
	currency   string
	notional   Decimal
	qty        Decimal
	replaced   bool // by a later link
	gone       bool
	chain      *chain
}

// chain is an order and what replaces it, as far as they are open. A venue may
// refuse a replacement, so the largest of its links is what may be open.
type chain struct {
	links []*link
	most  Decimal // notional
}

// openOrders is what is open, as far as the record says.
type openOrders struct {
	named map[orderName]*link
	order []*link // by counter; some may be gone
	ends  byEnd   // those that end by themselves; some may be gone
	live  int     // links
	count int     // chains
	sums  map[string]Decimal
}

type byEnd []*link

func (h byEnd) Len() int           { return len(h) }
func (h byEnd) Less(i, j int) bool { return h[i].end < h[j].end }
func (h byEnd) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *byEnd) Push(x any)        { *h = append(*h, x.(*link)) }
func (h *byEnd) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return x
}

func newOpenOrders() openOrders {
	return openOrders{named: make(map[orderName]*link), sums: make(map[string]Decimal)}
}

// openUntil is when an order ends by itself; ok is false for one that never
// rests at a venue.
func openUntil(at int64, tif, expire string) (end int64, ok bool) {
	switch tif {
	case "3", "4": // the venue fills it at once or not at all
		return 0, false
	case "1":
		return forever, true
	case "6":
		t, err := time.Parse(time.RFC3339, expire)
		return t.UnixMicro(), err == nil && t.UnixMicro() > at
	}
	return at + dayOrder.Microseconds(), true
}

// expire removes what has ended by itself.
func (o *openOrders) expire(t int64) {
	for len(o.ends) > 0 && (o.ends[0].gone || o.ends[0].end <= t) {
		o.remove(heap.Pop(&o.ends).(*link))
	}
}

// replaces returns the open link that a replacement replaces; nil if it names
// none that it can replace.
func (o *openOrders) replaces(u *Use, t int64) *link {
	if u.Kind != OrderReplace {
		return nil
	}
	l := o.named[orderName{u.Audience, u.Replaces}]
	if l == nil || l.replaced || l.end <= t || len(l.chain.links) >= maxChain || l.instrument != u.Instrument || l.side != u.Side || l.currency != u.Currency {
		return nil
	}
	return l
}

// add opens an order.
func (o *openOrders) add(u *Use, t int64, old *link) {
	end, ok := openUntil(t, u.TIF, u.Expires)
	if !ok || u.ClOrdID == "" || u.Kind.reducesRisk() {
		return
	}
	l := &link{name: orderName{u.Audience, u.ClOrdID}, counter: u.Counter, at: t, end: end, instrument: u.Instrument, side: u.Side, currency: u.Currency, notional: u.Notional, qty: u.Qty}
	if same := o.named[l.name]; same != nil && same != old {
		o.remove(same) // the name is the newer one's
	}
	if o.live >= MaxOpen {
		o.remove(o.oldest())
	}
	if old != nil && !old.gone {
		old.replaced = true
		l.chain = old.chain
	} else {
		l.chain = new(chain)
	}
	o.insert(l)
}

// insert adds a link to its chain, as the latest.
func (o *openOrders) insert(l *link) {
	if len(l.chain.links) == 0 {
		o.count++
	}
	l.chain.links = append(l.chain.links, l)
	o.weigh(l.chain, l.currency)
	o.named[l.name] = l
	o.live++
	if len(o.order) > 2*o.live+1024 {
		o.order = slices.DeleteFunc(o.order, func(l *link) bool { return l.gone })
	}
	o.order = append(o.order, l)
	if l.end != forever {
		if len(o.ends) > 2*o.live+1024 {
			o.ends = slices.DeleteFunc(o.ends, func(l *link) bool { return l.gone })
			heap.Init(&o.ends)
		}
		heap.Push(&o.ends, l)
	}
}

// weigh renews what a chain counts.
func (o *openOrders) weigh(c *chain, currency string) {
	var most Decimal
	for _, l := range c.links {
		if l.notional.Cmp(most) > 0 {
			most = l.notional
		}
	}
	sum, _ := o.sums[currency].Sub(c.most)
	sum, _ = sum.Add(most)
	c.most = most
	if o.sums[currency] = sum; sum.Sign() == 0 {
		delete(o.sums, currency)
	}
}

// oldest is the oldest open link; nil if there is none.
func (o *openOrders) oldest() *link {
	for len(o.order) > 0 && o.order[0].gone {
		o.order = o.order[1:]
	}
	if len(o.order) == 0 {
		return nil
	}
	return o.order[0]
}

func (o *openOrders) remove(l *link) {
	if l.gone {
		return
	}
	l.gone = true
	o.live--
	if o.named[l.name] == l {
		delete(o.named, l.name)
	}
	l.chain.links = slices.DeleteFunc(l.chain.links, func(x *link) bool { return x == l })
	if len(l.chain.links) == 0 {
		o.count--
	}
	o.weigh(l.chain, l.currency)
}

// end is what an acknowledgement does: what the venue rejected never was, so an
// order that it would have replaced can be replaced again. What ended otherwise
// had taken the place of all that it replaced.
func (o *openOrders) end(name orderName, rejected bool) {
	l := o.named[name]
	if l == nil {
		return
	}
	before := l.chain.links[:slices.Index(l.chain.links, l)]
	if rejected {
		if len(before) > 0 {
			before[len(before)-1].replaced = false
		}
		o.remove(l)
		return
	}
	for _, x := range append(slices.Clone(before), l) {
		o.remove(x)
	}
}

// at returns how much is open at a moment that may be later than that of the
// next use: nothing is changed.
func (o *openOrders) at(t int64) (count int, sums map[string]Decimal) {
	if len(o.ends) == 0 || o.ends[0].end > t {
		return o.count, o.sums
	}
	most := make(map[*chain]Decimal)
	for _, l := range o.order {
		if l.gone || l.end <= t {
			continue
		}
		if m, ok := most[l.chain]; !ok || l.notional.Cmp(m) > 0 {
			most[l.chain] = l.notional
		}
	}
	sums = make(map[string]Decimal)
	for c, m := range most {
		currency := c.links[0].currency
		sums[currency], _ = sums[currency].Add(m)
	}
	return len(most), sums
}

// since is the number of the oldest order that is open at a moment and was signed
// before another one; 0: there is none.
func (o *openOrders) since(t, before int64) Counter {
	o.expire(t)
	if l := o.oldest(); l != nil && l.at < before {
		return l.counter
	}
	return 0
}
