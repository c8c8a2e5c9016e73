package scope

import (
	"fmt"
	"slices"
	"time"
)

// Wider says where an inner scope allows something that the outer one does not.
type Wider struct {
	Limit   Rule   // the member of the scope
	Message string // one sentence for a person
}

func (w *Wider) Error() string { return string(w.Limit) + ": " + w.Message }

// Contains returns nil if every action that inner permits, in whatever
// environment, is one that outer permits in the same environment. Otherwise its error is a
// *[Wider]. It may call wider what in truth is not, and never the other way round.
func Contains(outer, inner *Scope) error {
	if outer == nil || outer.canonical == nil || inner == nil || inner.canonical == nil {
		return &Wider{RuleForm, "a scope is missing"}
	}
	o, i := &outer.doc, &inner.doc
	for _, w := range []*Wider{
		subset(RuleActions, o.Actions, i.Actions),
		subset(RuleVenues, o.Venues, i.Venues),
		subset(RuleSides, o.Sides, i.Sides),
		subset(RuleOrdTypes, o.OrdTypes, i.OrdTypes),
		subset(RuleTIF, o.TIF, i.TIF),
		named(RuleAccounts, o.Accounts, i.Accounts),
		named(RuleClients, o.Clients, i.Clients),
		when(i.Short && !o.Short, RuleShort, "short sales are not allowed"),
		instruments(outer, inner),
		notionals(outer, inner),
		quantities(outer, inner),
		collars(o.Collar, i.Collar),
		when(!inner.trading.within(outer.trading), RuleTradingWindow, "it has minutes that are outside"),
		times(o, i),
		overTime(o, i),
		when(o.DuplicateMS > i.DuplicateMS, RuleDuplicate, fmt.Sprintf("at least %d is expected", o.DuplicateMS)),
		when(o.AttestationS != 0 && (i.AttestationS == 0 || i.AttestationS > o.AttestationS), RuleAttestationAge, fmt.Sprintf("at most %d is allowed", o.AttestationS)),
		when(o.ClockDivergence != 0 && (i.ClockDivergence == 0 || i.ClockDivergence > o.ClockDivergence), RuleClockDivergence, fmt.Sprintf("at most %d is allowed", o.ClockDivergence)),
		containsDestinations(o.Destinations, i.Destinations),
		sources(o, i),
		containsOS(o.OS, i.OS),
		containsApproval(o, i),
		containsControllers(o.Controllers, i.Controllers),
	} {
		if w != nil {
			return w
		}
	}
	return nil
}

func when(wider bool, limit Rule, message string) *Wider {
	if wider {
		return &Wider{limit, message}
	}
	return nil
}

func subset[T ~string](limit Rule, outer, inner []T) *Wider {
	for _, v := range inner {
		if _, ok := slices.BinarySearch(outer, v); !ok {
			return &Wider{limit, fmt.Sprintf("%s is not allowed", v)}
		}
	}
	return nil
}

// named: with an empty list an action names nothing, with another it must name
// something on it, so an empty list is not inside another.
func named(limit Rule, outer, inner []string) *Wider {
	if len(inner) == 0 && len(outer) > 0 {
		return &Wider{limit, "must name at least one that is allowed"}
	}
	return subset(limit, outer, inner)
}

func instruments(outer, inner *Scope) *Wider {
	for id, m := range inner.instruments {
		om, ok := outer.instruments[id]
		if !ok {
			return &Wider{RuleInstruments, id + " is not allowed"}
		}
		if m != om {
			return &Wider{RuleInstruments, fmt.Sprintf("the multiplier of %s is %s, not %s", id, om, m)}
		}
	}
	return nil
}

func notionals(outer, inner *Scope) *Wider {
	for c, m := range inner.notional {
		om, ok := outer.notional[c]
		if !ok {
			return &Wider{RuleOrderNotional, c + " is not allowed"}
		}
		if m.Amount.Cmp(om.Amount) > 0 || softer(om.Block, m.Block) {
			return &Wider{RuleOrderNotional, fmt.Sprintf("at most %s %s is allowed, and no softer block", om.Amount, c)}
		}
	}
	return nil
}

// softer says that inner is a limit that someone could lift, and outer is not.
func softer(outer, inner Block) bool { return outer == Hard && inner == Soft }

// quantityOf returns the limit for an instrument; ok is false where there is no bound.
func (s *Scope) quantityOf(id string) (limit *QtyLimit, bounded bool) {
	if l, ok := s.qty[id]; ok {
		return l, true
	}
	l, ok := s.qty["*"]
	return l, ok || len(s.qty) > 0
}

func quantities(outer, inner *Scope) *Wider {
	if len(outer.qty) == 0 {
		return nil
	}
	if len(inner.qty) == 0 {
		return &Wider{RuleOrderQty, "is missing, so quantities are not bounded"}
	}
	for id := range inner.instruments {
		il, _ := inner.quantityOf(id)
		if il == nil {
			continue // inner refuses every order in it
		}
		ol, _ := outer.quantityOf(id)
		if ol == nil || il.Qty.Cmp(ol.Qty) > 0 || softer(ol.Block, il.Block) {
			return &Wider{RuleOrderQty, "the quantity of " + id + " is larger, or its block softer"}
		}
	}
	return nil
}

func collars(outer, inner *Collar) *Wider {
	switch {
	case outer == nil:
		return nil
	case inner == nil:
		return &Wider{RuleCollar, "is missing, so prices are not bounded"}
	case inner.BPS > outer.BPS || inner.Source != outer.Source || inner.MaxAgeMS > outer.MaxAgeMS || softer(outer.Block, inner.Block):
		return &Wider{RuleCollar, fmt.Sprintf("at most %d from %s with max_age_ms of at most %d is allowed, and no softer block", outer.BPS, outer.Source, outer.MaxAgeMS)}
	}
	return nil
}

// overTime: each of outer's limits has one of inner's for the same key and
// window that is not larger, nor softer.
func overTime(o, i *document) *Wider {
	for _, l := range o.NotionalWindows {
		if !slices.ContainsFunc(i.NotionalWindows, func(x NotionalWindow) bool {
			return x.Currency == l.Currency && x.Window == l.Window && x.Amount.Cmp(l.Amount) <= 0 && !softer(l.Block, x.Block)
		}) && slices.ContainsFunc(i.OrderNotional, func(x MoneyLimit) bool { return x.Currency == l.Currency }) {
			return &Wider{RuleNotionalWindow, fmt.Sprintf("at most %s %s in %s is allowed, and no softer block", l.Amount, l.Currency, l.Window)}
		}
	}
	for _, l := range o.QtyWindows {
		if !slices.ContainsFunc(i.QtyWindows, func(x QtyWindow) bool {
			return x.Instrument == l.Instrument && x.Window == l.Window && x.Qty.Cmp(l.Qty) <= 0 && !softer(l.Block, x.Block)
		}) {
			return &Wider{RuleQtyWindow, fmt.Sprintf("at most %s of %s in %s is allowed, and no softer block", l.Qty, l.Instrument, l.Window)}
		}
	}
	for _, c := range []struct {
		rule         Rule
		outer, inner []CountWindow
	}{{RuleOrdersWindow, o.OrderWindows, i.OrderWindows}, {RuleInstrumentCount, o.InstrumentCounts, i.InstrumentCounts}, {RuleVenueCount, o.VenueCounts, i.VenueCounts}} {
		for _, l := range c.outer {
			if !slices.ContainsFunc(c.inner, func(x CountWindow) bool {
				return x.Window == l.Window && x.Count <= l.Count && !softer(l.Block, x.Block)
			}) {
				return &Wider{c.rule, fmt.Sprintf("at most %d in %s are allowed, and no softer block", l.Count, l.Window)}
			}
		}
	}
	for _, l := range o.MessageWindows { // what all venues together may have, each may
		if !slices.ContainsFunc(i.MessageWindows, func(x MessageWindow) bool {
			return (x.Venue == l.Venue || x.Venue == "") && x.Window == l.Window && x.Count <= l.Count && !softer(l.Block, x.Block)
		}) {
			return &Wider{RuleMessagesWindow, fmt.Sprintf("at most %d in %s are allowed, and no softer block", l.Count, l.Window)}
		}
	}
	for _, l := range o.CollarWindows {
		if !slices.ContainsFunc(i.CollarWindows, func(x CollarWindow) bool {
			return x.Window == l.Window && x.BPS <= l.BPS && !softer(l.Block, x.Block)
		}) {
			return &Wider{RuleCollarWindow, fmt.Sprintf("at most %d in %s is allowed, and no softer block", l.BPS, l.Window)}
		}
	}
	for _, l := range o.Throttles {
		if !slices.ContainsFunc(i.Throttles, func(x Throttle) bool {
			return x.Per == l.Per && x.Window == l.Window && x.Count <= l.Count && !softer(l.Block, x.Block)
		}) {
			return &Wider{RuleThrottle, fmt.Sprintf("at most %d in %s are allowed, and no softer block", l.Count, l.Window)}
		}
	}
	if l, x := o.OpenOrders, i.OpenOrders; l != nil && (x == nil || x.Count > l.Count || softer(l.Block, x.Block)) {
		return &Wider{RuleOpenOrders, fmt.Sprintf("at most %d is allowed, and no softer block", l.Count)}
	}
	for _, l := range o.OpenNotional {
		if !slices.ContainsFunc(i.OpenNotional, func(x MoneyLimit) bool {
			return x.Currency == l.Currency && x.Amount.Cmp(l.Amount) <= 0 && !softer(l.Block, x.Block)
		}) && slices.ContainsFunc(i.OrderNotional, func(x MoneyLimit) bool { return x.Currency == l.Currency }) {
			return &Wider{RuleOpenNotional, fmt.Sprintf("at most %s %s is allowed, and no softer block", l.Amount, l.Currency)}
		}
	}
	// An entry of the inner scope for an instrument takes it out of the *, so
	// where outer's * holds for it, the inner one must have entries that are no larger.
	has := func(list []QtyWindow, id string) bool {
		return slices.ContainsFunc(list, func(x QtyWindow) bool { return x.Instrument == id })
	}
	for _, own := range i.QtyWindows {
		for _, l := range o.QtyWindows {
			if l.Instrument == "*" && own.Instrument != "*" && !has(o.QtyWindows, own.Instrument) && !slices.ContainsFunc(i.QtyWindows, func(x QtyWindow) bool {
				return x.Instrument == own.Instrument && x.Window == l.Window && x.Qty.Cmp(l.Qty) <= 0 && !softer(l.Block, x.Block)
			}) {
				return &Wider{RuleQtyWindow, fmt.Sprintf("at most %s of %s in %s is allowed", l.Qty, own.Instrument, l.Window)}
			}
		}
	}
	return nil
}

func times(o, i *document) *Wider {
	if o.NotBefore != nil && (i.NotBefore == nil || i.NotBefore.Before(*o.NotBefore)) {
		return &Wider{RuleNotBefore, "must not be before " + o.NotBefore.Format(time.RFC3339)}
	}
	if o.NotAfter != nil && (i.NotAfter == nil || i.NotAfter.After(*o.NotAfter)) {
		return &Wider{RuleNotAfter, "must not be after " + o.NotAfter.Format(time.RFC3339)}
	}
	return nil
}
