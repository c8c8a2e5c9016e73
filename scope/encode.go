package scope

import (
	"cmp"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// bookVersion is the first byte of a book's binary form.
const bookVersion = 1

// maxKey bounds a name in a book's binary form, in bytes.
const maxKey = 128

// AppendBinary appends the binary form of what the book sums up: the uses that are
// young enough to count, the orders that are open, and what the throttle disabled.
// It is for starting faster than by replaying the record, and no truth of its own.
// What lasting events lead to is not in it: they are recalled one by one (see
// [Book.Recall]). Its error is always nil.
func (b *Book) AppendBinary(out []byte) ([]byte, error) {
	out = append(out, bookVersion)
	out = binary.AppendUvarint(out, uint64(b.lasting))
	unknown := int64(0)
	if !b.unknown.IsZero() {
		unknown = b.unknown.UnixMicro()
	}
	out = binary.AppendVarint(out, unknown)
	out = b.all.appendBinary(out)
	for _, m := range []map[string]*series{b.venues, b.currencies, b.instruments, b.strategies} {
		out = binary.AppendUvarint(out, uint64(len(m)))
		for _, k := range slices.Sorted(maps.Keys(m)) {
			out = m[k].appendBinary(appendName(out, k))
		}
	}
	out = binary.AppendUvarint(out, uint64(len(b.prices)))
	for _, q := range slices.SortedFunc(maps.Keys(b.prices), quoted.compare) {
		out = b.prices[q].appendBinary(appendName(appendName(out, q.instrument), q.currency))
	}
	out = b.open.appendBinary(out)
	out = binary.AppendUvarint(out, uint64(len(b.disabled)))
	for _, k := range slices.Sorted(maps.Keys(b.disabled)) {
		out = binary.AppendVarint(appendName(out, k), b.disabled[k].since.UnixMicro())
		out = binary.AppendUvarint(out, uint64(b.disabled[k].entry))
	}
	out = binary.AppendVarint(out, b.sameSince)
	for _, m := range []map[[16]byte]int64{b.same, b.sameBefore} {
		out = binary.AppendUvarint(out, uint64(len(m)))
		for _, k := range slices.SortedFunc(maps.Keys(m), func(a, b [16]byte) int { return slices.Compare(a[:], b[:]) }) {
			out = binary.AppendVarint(append(out, k[:]...), m[k])
		}
	}
	return out, nil
}

// UnmarshalBinary reads the form of AppendBinary, strictly, in the place of what
// the book holds. It does not keep data.
func (b *Book) UnmarshalBinary(data []byte) error {
	r := &bookReader{left: data}
	fresh := NewBook()
	if v := r.bytes(1); len(v) == 1 && v[0] != bookVersion {
		return fmt.Errorf("book: version %d, this program knows %d", v[0], bookVersion)
	}
	fresh.lasting = Counter(r.uvarint())
	if unknown := r.varint(); unknown != 0 {
		fresh.unknown = time.UnixMicro(unknown).UTC()
	}
	r.series(&fresh.all)
	for _, m := range []map[string]*series{fresh.venues, fresh.currencies, fresh.instruments, fresh.strategies} {
		last := ""
		for i := range r.count(8) {
			k := r.name()
			r.check(i == 0 || last < k)
			r.series(under(m, k))
			last = k
		}
	}
	var last quoted
	for i := range r.count(8) {
		q := quoted{r.name(), r.name()}
		r.check(i == 0 || last.compare(q) < 0)
		r.series(under(fresh.prices, q))
		last = q
	}
	r.open(&fresh.open)
	lastKey := ""
	for i := range r.count(3) {
		k := r.name()
		r.check(i == 0 || lastKey < k)
		fresh.disabled[k] = trip{since: time.UnixMicro(r.varint()).UTC(), entry: Counter(r.uvarint())}
		lastKey = k
	}
	fresh.sameSince = r.varint()
	for _, m := range []map[[16]byte]int64{fresh.same, fresh.sameBefore} {
		var last [16]byte
		for i := range r.count(17) {
			var k [16]byte
			copy(k[:], r.bytes(16))
			r.check(i == 0 || slices.Compare(last[:], k[:]) < 0)
			m[k] = r.varint()
			last = k
		}
	}
	if r.bad || len(r.left) > 0 {
		return errBook
	}
	*b = *fresh
	return nil
}

// Recall counts what a lasting event leads to, in a book that was read from its
// binary form after the event. Events come in their order ([LastingEvents]).
func (b *Book) Recall(st *Statement) {
	if st.Decision.Decision == DecisionEvent && st.fact != nil {
		st.fact.apply(b, st)
	}
}

var errBook = errors.New("book: the binary form is malformed")

func (q quoted) compare(o quoted) int {
	return cmp.Or(strings.Compare(q.instrument, o.instrument), strings.Compare(q.currency, o.currency))
}

func appendName(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func (d *Decimal) appendBinary(b []byte) []byte {
	whole, fraction := d.split()
	flags := byte(0)
	if d.negative {
		flags |= 1
	}
	if fraction != 0 {
		flags |= 2
	}
	return appendDecimal(append(b, flags), whole, fraction)
}

func (s *series) appendBinary(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(s.base))
	b = binary.AppendVarint(binary.AppendVarint(b, s.last), s.active)
	b = binary.AppendUvarint(binary.AppendUvarint(b, uint64(s.floor.chunk)), uint64(s.floor.off))
	b = binary.AppendVarint(b, s.floor.at)
	b = s.ref.appendBinary(b)
	b = binary.AppendUvarint(b, uint64(len(s.chunks)))
	for i := range s.chunks {
		c := &s.chunks[i]
		b = binary.AppendVarint(b, c.first)
		b = append(binary.AppendUvarint(b, uint64(len(c.data))), c.data...)
	}
	return b
}

func (o *openOrders) appendBinary(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(o.live))
	chains := make(map[*chain]uint64)
	for _, l := range o.order {
		if l.gone {
			continue
		}
		n, ok := chains[l.chain]
		if !ok {
			n = uint64(len(chains))
			chains[l.chain] = n
		}
		flags := byte(0)
		if l.replaced {
			flags |= 1
		}
		if o.named[l.name] == l {
			flags |= 2
		}
		b = binary.AppendUvarint(append(b, flags), n)
		for _, s := range [...]string{l.name.venue, l.name.id, l.instrument, l.side, l.currency} {
			b = appendName(b, s)
		}
		b = binary.AppendUvarint(b, uint64(l.counter))
		b = binary.AppendVarint(binary.AppendVarint(b, l.at), l.end)
		b = l.qty.appendBinary(l.notional.appendBinary(b))
	}
	return b
}

// bookReader reads a binary form. After the first mistake it is bad and yields zeros.
type bookReader struct {
	left []byte
	bad  bool
}

func (r *bookReader) check(ok bool) {
	if !ok {
		r.bad, r.left = true, nil
	}
}

func (r *bookReader) uvarint() uint64 {
	v, n := binary.Uvarint(r.left)
	if r.check(n > 0 && n == uvarintLen(v)); r.bad {
		return 0
	}
	r.left = r.left[n:]
	return v
}

// uvarintLen is the size of the one spelling of v.
func uvarintLen(v uint64) int {
	n := 1
	for ; v >= 0x80; v >>= 7 {
		n++
	}
	return n
}

func (r *bookReader) varint() int64 {
	v := r.uvarint()
	return int64(v>>1) ^ -int64(v&1)
}

// count reads how many elements of at least so many bytes follow.
func (r *bookReader) count(size int) int {
	n := r.uvarint()
	if r.check(n <= uint64(len(r.left)/size)); r.bad {
		return 0
	}
	return int(n)
}

func (r *bookReader) bytes(n int) []byte {
	if r.check(n <= len(r.left)); r.bad {
		return make([]byte, min(n, maxKey))
	}
	out := r.left[:n]
	r.left = r.left[n:]
	return out
}

func (r *bookReader) name() string {
	n := r.uvarint()
	r.check(n <= maxKey)
	if r.bad {
		return ""
	}
	return string(r.bytes(int(n)))
}

func (r *bookReader) decimal() Decimal {
	flags := r.bytes(1)[0]
	whole := r.uvarint()
	var fraction uint64
	if flags&2 != 0 {
		packed := r.uvarint()
		zeros := packed & 31
		if r.check(zeros < maxFractionDigits); r.bad {
			return Decimal{}
		}
		fraction = packed >> 5
		r.check(fraction != 0 && fraction%10 != 0 && fraction < pow10[maxFractionDigits-zeros][0])
		fraction *= pow10[zeros][0]
	}
	r.check(flags <= 3 && whole < maxWhole && (flags&1 == 0 || whole|fraction != 0))
	return joinDecimal(whole, fraction, flags&1 != 0)
}

func (r *bookReader) small() int {
	n := r.uvarint()
	r.check(n < math.MaxInt32)
	return int(n)
}

func (r *bookReader) series(s *series) {
	s.base = r.small()
	s.last, s.active = r.varint(), r.varint()
	s.floor = cursor{r.small(), r.small(), r.varint()}
	s.ref = r.decimal()
	for range r.count(4) {
		c := chunk{first: r.varint()}
		n := r.uvarint()
		r.check(n > 0 && n <= chunkSize)
		c.data = slices.Clone(r.bytes(int(min(n, chunkSize))))
		if r.bad {
			return
		}
		at := c.first
		var e entry
		for b := c.data; len(b) > 0; at = e.at {
			size, err := e.parse(b, at)
			if r.check(err == nil); r.bad {
				return
			}
			b = b[size:]
		}
		if last := len(s.chunks) - 1; last >= 0 {
			r.check(c.first >= s.chunks[last].first)
		}
		r.check(at <= s.last)
		s.chunks = append(s.chunks, c)
	}
	// A floor is a place between two entries.
	if i := s.floor.chunk - s.base; i >= 0 && s.floor != (cursor{}) {
		if r.check(i < max(len(s.chunks), 1)); r.bad || len(s.chunks) == 0 {
			return
		}
		off, at := 0, s.chunks[i].first
		var e entry
		for off < s.floor.off {
			size, err := e.parse(s.chunks[i].data[off:], at)
			if r.check(err == nil); r.bad {
				return
			}
			off, at = off+size, e.at
		}
		r.check(off == s.floor.off)
	}
}

func (r *bookReader) open(o *openOrders) {
	var chains []*chain
	for range r.count(12) {
		flags := r.bytes(1)[0]
		n := r.uvarint()
		if r.check(flags <= 3 && n <= uint64(len(chains))); r.bad {
			return
		}
		if n == uint64(len(chains)) {
			chains = append(chains, new(chain))
		}
		l := &link{chain: chains[n], replaced: flags&1 != 0, name: orderName{r.name(), r.name()}, instrument: r.name(), side: r.name(), currency: r.name(),
			counter: Counter(r.uvarint()), at: r.varint(), end: r.varint(), notional: r.decimal(), qty: r.decimal()}
		before := l.chain.links
		r.check(o.live < MaxOpen && len(before) < maxChain && (len(before) == 0 || before[0].currency == l.currency))
		r.check(o.live == 0 || o.order[len(o.order)-1].counter <= l.counter)
		if r.bad {
			return
		}
		same := o.named[l.name]
		o.insert(l)
		if flags&2 == 0 {
			if delete(o.named, l.name); same != nil {
				o.named[l.name] = same
			}
		}
	}
	heap.Init(&o.ends)
}
