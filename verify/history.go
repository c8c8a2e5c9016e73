package verify

import (
	"cmp"
	"slices"
	"time"

	"inkan/scope"
)

// remembered is how far back limits over time look, and a little more, since
// statements do not arrive in their order.
const remembered = scope.MaxWindow + time.Hour

// past is one action that was accepted.
type past struct {
	use   scope.Use
	scope *scope.Scope // of its certificate
}

func pastOf(st *scope.Statement, s *scope.Scope, u scope.Use) past {
	u.Counter = st.Counter
	return past{use: u, scope: s}
}

// history is what one agent did at this venue, in the order of its statements,
// which is not that in which they arrived. It is not safe for concurrent use.
type history struct {
	all    []past // by time of the statement, then by counter
	book   *scope.Book
	looked time.Time // the latest moment that the book was asked about: it answers for no earlier one

	// refused are statements that were refused since all last changed, by the SHA-256 of
	// their texts. What is refused is not used up, so it may be sent again as fast as its
	// sender can, and to judge what arrives late takes all that the agent did.
	refused map[[32]byte]error
}

// maxRefused bounds how many refusals are remembered.
const maxRefused = 1024

func newHistory() *history { return &history{book: scope.NewBook()} }

// byStatement compares two actions by the time of their statements, then by counter.
func byStatement(a, b *past) int {
	return cmp.Or(a.use.At.Compare(b.use.At), cmp.Compare(a.use.Counter, b.use.Counter))
}

// place is where an action belongs in all, and whether that is at the end, which is
// where it costs little to judge it.
func (h *history) place(p *past) (place int, last bool) {
	place = len(h.all)
	for place > 0 && byStatement(&h.all[place-1], p) > 0 {
		place--
	}
	return place, place == len(h.all) && !p.use.At.Before(h.looked)
}

// admit is judge, but for a statement with this digest that was refused before and
// would be again.
func (h *history) admit(p past, sum [32]byte) (count func(), _ error) {
	if err := h.refused[sum]; err != nil {
		return nil, err
	}
	add, err := h.judge(p)
	if err == nil {
		return func() { add(); h.refused = nil }, nil
	}
	if h.refused == nil || len(h.refused) >= maxRefused {
		h.refused = make(map[[32]byte]error)
	}
	h.refused[sum] = err
	return nil, err
}

// judge says whether one more action is inside the limits over time, and returns
// what counts it. An action that arrives after later ones is put in its place:
// then these must be inside their limits with it before them.
func (h *history) judge(p past) (count func(), _ error) {
	place, last := h.place(&p)
	if last {
		h.looked = p.use.At
		if r := judged(h.book.Check(p.scope, p.use)); r != nil {
			return nil, refuse(ReasonLimits, "%v", r)
		}
		return func() {
			h.book.Add(p.use)
			h.all = append(h.all, p)
		}, nil
	}
	all := slices.Insert(slices.Clone(h.all), place, p)
	book := scope.NewBook()
	for i := range all {
		q := &all[i]
		if i >= place {
			if r := judged(book.Check(q.scope, q.use)); r != nil && i == place {
				return nil, refuse(ReasonLimits, "%v", r)
			} else if r != nil {
				return nil, refuse(ReasonLimits, "number %d, which was accepted, would not be inside its limits after this one: %v", q.use.Counter, r)
			}
		}
		book.Add(q.use)
	}
	return func() { h.all, h.book, h.looked = all, book, all[len(all)-1].use.At }, nil
}

// add counts what was accepted elsewhere, or before a restart.
func (h *history) add(list []past) {
	inOrder := slices.IsSortedFunc(list, func(a, b past) int { return byStatement(&a, &b) })
	if len(list) == 0 {
		return
	}
	h.refused = nil
	if first := &list[0]; inOrder && !first.use.At.Before(h.looked) && (len(h.all) == 0 || byStatement(&h.all[len(h.all)-1], first) <= 0) {
		for i := range list {
			h.book.Add(list[i].use)
		}
		h.all = append(h.all, list...)
	} else {
		h.all = append(h.all, list...)
		slices.SortStableFunc(h.all, func(a, b past) int { return byStatement(&a, &b) })
		h.book = scope.NewBook()
		for i := range h.all {
			h.book.Add(h.all[i].use)
		}
	}
	h.looked = h.all[len(h.all)-1].use.At
}

// forget drops what is older than a moment, seldom and much at a time, and
// returns how much that was.
func (h *history) forget(before time.Time) int {
	n := 0
	for n < len(h.all) && h.all[n].use.At.Before(before) {
		n++
	}
	if n == 0 || n < 1024 && n <= len(h.all)/2 {
		return 0
	}
	h.all = slices.Clone(h.all[n:]) // the book forgets by itself
	return n
}

// judged leaves out what a venue cannot judge by what it saw: how many orders
// are open, which acknowledgements at other venues decide, and throttles, which a person
// arms again. The book checks these after all windows, so no other refusal hides behind one.
func judged(r *scope.Refusal) *scope.Refusal {
	if r != nil && slices.Contains([]scope.Rule{scope.RuleOpenOrders, scope.RuleOpenNotional, scope.RuleThrottle}, r.Rule) {
		return nil
	}
	return r
}
