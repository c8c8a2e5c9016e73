package scope

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"slices"
)

// chunkSize bounds a chunk of a series, in bytes. What is too old is forgotten
// a chunk at a time.
const chunkSize = 32 << 10

// series is what happened over time under one key, such as one currency: the
// latest is appended, the oldest forgotten. A day can have ten million entries,
// so they are packed: see entry.append.
type series struct {
	chunks  []chunk
	base    int     // number of chunks[0]: how many were forgotten before it
	last    int64   // time of the latest entry
	active  int64   // when something other than a cancel was last done under the key; 0: never
	floor   cursor  // a throttle counts from here on: it was armed again
	ref     Decimal // the last reference price
	windows []*running
}

type chunk struct {
	first int64 // time of the first entry
	data  []byte
}

// cursor is a place between two entries.
type cursor struct {
	chunk int // number
	off   int
	at    int64 // time of the entry before, or of the chunk's first one
}

// entry is what one action counts under a key.
type entry struct {
	at    int64 // microseconds since 1970
	order bool  // a new order or quote
	risk  bool  // anything but a cancel
	a, b  Decimal
}

// An entry is its distance in time from the one before in the chunk, a byte
// with these bits, and what they announce: the whole part of a number, and its
// fraction as digits without trailing zeros and how many zeros follow.
const (
	bitOrder = 1 << iota
	bitRisk
	bitA // a is not 0
	bitFractionA
	bitNegativeA
	bitB // b is not a
	bitFractionB
	bitNegativeB
)

// append adds an entry, which is not earlier than the last one.
func (s *series) append(e entry) {
	n := len(s.chunks)
	if n == 0 || len(s.chunks[n-1].data) > chunkSize-64 {
		s.chunks = append(s.chunks, chunk{first: e.at})
		s.last = e.at
		n++
	}
	c := &s.chunks[n-1]
	c.data = e.append(c.data, s.last)
	s.last = e.at
	for _, w := range s.windows {
		w.add(&e)
	}
}

func (e *entry) append(b []byte, last int64) []byte {
	var flags byte
	wholeA, fractionA := e.a.split()
	var wholeB, fractionB uint64
	if e.order {
		flags |= bitOrder
	}
	if e.risk {
		flags |= bitRisk
	}
	if e.a.Sign() != 0 {
		flags |= bitA
		if fractionA != 0 {
			flags |= bitFractionA
		}
		if e.a.negative {
			flags |= bitNegativeA
		}
	}
	if e.b != e.a {
		wholeB, fractionB = e.b.split()
		flags |= bitB
		if fractionB != 0 {
			flags |= bitFractionB
		}
		if e.b.negative {
			flags |= bitNegativeB
		}
	}
	b = append(binary.AppendUvarint(b, uint64(e.at-last)), flags)
	if flags&bitA != 0 {
		b = appendDecimal(b, wholeA, fractionA)
	}
	if flags&bitB != 0 {
		b = appendDecimal(b, wholeB, fractionB)
	}
	return b
}

func appendDecimal(b []byte, whole, fraction uint64) []byte {
	b = binary.AppendUvarint(b, whole)
	if fraction == 0 {
		return b
	}
	zeros := uint64(0)
	for _, z := range [...]struct{ power, zeros uint64 }{{1e8, 8}, {1e4, 4}, {1e2, 2}, {10, 1}, {10, 1}} {
		if fraction%z.power == 0 {
			fraction /= z.power
			zeros += z.zeros
		}
	}
	return binary.AppendUvarint(b, fraction<<5|zeros)
}

// maxWhole bounds the whole part of what an entry or an order has: the two sizes of
// a quote together have one digit more than a decimal.
const maxWhole = 2e18

// split returns the whole part and the fraction in 10^-17, of a decimal below maxWhole.
func (d *Decimal) split() (whole, fraction uint64) {
	return bits.Div64(d.scaled[1], d.scaled[0], unit[0]) // below 2 x 10^35, so the quotient has 64 bits
}

func joinDecimal(whole, fraction uint64, negative bool) (d Decimal) {
	hi, lo := bits.Mul64(whole, unit[0])
	var carry uint64
	d.scaled[0], carry = bits.Add64(lo, fraction, 0)
	d.scaled[1] = hi + carry
	d.negative = negative
	return d
}

var errSeries = errors.New("a series of entries is malformed")

// parse reads the entry at the head of b.
func (e *entry) parse(b []byte, last int64) (size int, err error) {
	d, n := binary.Uvarint(b)
	if n <= 0 || n >= len(b) || d > 1<<62 {
		return 0, errSeries
	}
	flags := b[n]
	n++
	*e = entry{at: last + int64(d), order: flags&bitOrder != 0, risk: flags&bitRisk != 0}
	read := func(fractional, negative bool) (Decimal, bool) {
		whole, k := binary.Uvarint(b[n:])
		if k <= 0 || whole >= maxWhole {
			return Decimal{}, false
		}
		n += k
		var fraction uint64
		if fractional {
			packed, k := binary.Uvarint(b[n:])
			zeros := packed & 31
			if k <= 0 || zeros > maxFractionDigits-1 {
				return Decimal{}, false
			}
			n += k
			if fraction = packed >> 5; fraction == 0 || fraction >= pow10[maxFractionDigits-zeros][0] {
				return Decimal{}, false
			}
			fraction *= pow10[zeros][0]
		}
		return joinDecimal(whole, fraction, negative), true
	}
	ok := true
	if flags&bitA != 0 {
		e.a, ok = read(flags&bitFractionA != 0, flags&bitNegativeA != 0)
	}
	e.b = e.a
	if ok && flags&bitB != 0 {
		e.b, ok = read(flags&bitFractionB != 0, flags&bitNegativeB != 0)
	}
	if !ok || e.at < last {
		return 0, errSeries
	}
	return n, nil
}

// start is the place before the oldest entry.
func (s *series) start() cursor {
	c := cursor{chunk: s.base}
	if len(s.chunks) > 0 {
		c.at = s.chunks[0].first
	}
	return c
}

// end is the place after the latest entry.
func (s *series) end() cursor {
	if len(s.chunks) == 0 {
		return cursor{chunk: s.base}
	}
	last := len(s.chunks) - 1
	return cursor{s.base + last, len(s.chunks[last].data), s.last}
}

// next reads the entry at a cursor and moves it; false at the end.
func (s *series) next(c *cursor, e *entry) bool {
	i := c.chunk - s.base
	if i < 0 { // what was there is forgotten
		*c, i = s.start(), 0
	}
	if i >= len(s.chunks) {
		return false
	}
	if c.off == len(s.chunks[i].data) {
		if i++; i >= len(s.chunks) {
			return false
		}
		*c = cursor{s.base + i, 0, s.chunks[i].first}
	}
	if c.off == 0 {
		c.at = s.chunks[i].first
	}
	n, err := e.parse(s.chunks[i].data[c.off:], c.at)
	if err != nil {
		return false // it was written by append, or checked when it was read
	}
	c.off += n
	c.at = e.at
	return true
}

// forget drops chunks that are wholly before a moment.
func (s *series) forget(before int64) {
	n := 0
	for n+1 < len(s.chunks) && s.chunks[n+1].first < before {
		n++
	}
	if n == 0 {
		return
	}
	for _, w := range s.windows {
		w.advance(s, before) // no window is so long
	}
	s.chunks = slices.Delete(s.chunks, 0, n)
	s.base += n
}

// counting is what a window sums up of its series.
type counting uint8

const (
	countAll    counting = iota
	countOrders          // new orders and quotes
	countRisk            // anything but cancels
	sumAmounts
	extremes // the least a and the largest b
	nothing  // only where the window begins matters
)

// running is what is in a window of a series, as it was last looked at.
type running struct {
	what  counting
	span  span
	first cursor // before the oldest in it
	head  int64  // begin of the window at the last look
	until int64  // a day's end: begin stays as it is until then
	sum   Decimal
	count uint64

	least, most []priced // candidates for the extremes, the oldest first
}

type priced struct {
	at int64
	px Decimal
}

// counts is what an entry counts.
func (w *running) counts(e *entry) uint64 {
	switch {
	case w.what == countAll, w.what == countOrders && e.order, w.what == countRisk && e.risk:
		return 1
	}
	return 0
}

// add counts the latest entry.
func (w *running) add(e *entry) {
	switch w.what {
	case sumAmounts:
		w.sum, _ = w.sum.Add(e.a) // it may pass 18 digits: there is room, and Check refuses it
	case extremes:
		for len(w.least) > 0 && e.a.Cmp(w.least[len(w.least)-1].px) <= 0 {
			w.least = w.least[:len(w.least)-1]
		}
		w.least = append(w.least, priced{e.at, e.a})
		for len(w.most) > 0 && e.b.Cmp(w.most[len(w.most)-1].px) >= 0 {
			w.most = w.most[:len(w.most)-1]
		}
		w.most = append(w.most, priced{e.at, e.b})
	case nothing:
	default:
		w.count += w.counts(e)
	}
}

// advance takes out what is before a moment.
func (w *running) advance(s *series, begin int64) {
	if begin <= w.head {
		return
	}
	w.head = begin
	switch w.what {
	case nothing:
		return
	case extremes:
		w.least, w.most = dropBefore(w.least, begin), dropBefore(w.most, begin)
		return
	}
	var e entry
	for c := w.first; s.next(&c, &e) && e.at < begin; w.first = c {
		if w.what == sumAmounts {
			w.sum, _ = w.sum.Sub(e.a)
		} else {
			w.count -= w.counts(&e)
		}
	}
}

func dropBefore(list []priced, begin int64) []priced {
	n := 0
	for n < len(list) && list[n].at < begin {
		n++
	}
	return list[n:]
}

// window returns the sums of a window that ends at t. No later call may ask for
// an earlier time.
func (s *series) window(what counting, in *span, t int64) *running {
	w := s.find(what, in)
	if in.rolling != 0 {
		w.advance(s, in.begin(t))
	} else if t >= w.until {
		begin := in.begin(t)
		w.until = in.end(begin)
		w.advance(s, begin)
	}
	return w
}

func (s *series) find(what counting, in *span) *running {
	for _, w := range s.windows {
		if w.what == what && w.span.Window == in.Window {
			return w
		}
	}
	w := &running{what: what, span: *in, first: s.start()}
	if what == countRisk {
		w.first = s.floor
	}
	var e entry
	for c := w.first; what != nothing && s.next(&c, &e); {
		w.add(&e)
	}
	s.windows = append(s.windows, w)
	return w
}

// look is window for a moment that may be later than that of the next entry:
// it changes no sum.
func (s *series) look(what counting, in *span, t int64) *running {
	w := *s.find(what, in)
	w.advance(s, in.begin(t))
	return &w
}

// restart makes throttles count from the end of the series on.
func (s *series) restart() {
	s.floor = s.end()
	for _, w := range s.windows {
		if w.what == countRisk {
			w.first, w.count = s.floor, 0
		}
	}
}
