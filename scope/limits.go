package scope

// limit is one entry of a scope's limits over time, in the order in which they
// are checked.
type limit struct {
	rule  Rule
	key   string // what it is for; * is each instrument or algorithm
	own   bool   // of *: some instruments have entries of their own
	span  span   // unused by limits of what is open
	sum   Decimal
	count uint64
	block Block
}

// limits lists them in the order in which they are checked.
func (d *document) limits() []limit {
	var out []limit
	for _, l := range d.NotionalWindows {
		out = append(out, limit{rule: RuleNotionalWindow, key: l.Currency, span: newSpan(l.Window), sum: l.Amount, block: l.Block})
	}
	for _, l := range d.QtyWindows {
		out = append(out, limit{rule: RuleQtyWindow, key: l.Instrument, own: d.QtyWindows[len(d.QtyWindows)-1].Instrument != "*", span: newSpan(l.Window), sum: l.Qty, block: l.Block})
	}
	for _, l := range d.OrderWindows {
		out = append(out, limit{rule: RuleOrdersWindow, span: newSpan(l.Window), count: uint64(l.Count), block: l.Block})
	}
	for _, l := range d.MessageWindows {
		out = append(out, limit{rule: RuleMessagesWindow, key: l.Venue, span: newSpan(l.Window), count: uint64(l.Count), block: l.Block})
	}
	for _, l := range d.CollarWindows {
		out = append(out, limit{rule: RuleCollarWindow, key: "*", span: newSpan(l.Window), count: uint64(l.BPS), block: l.Block})
	}
	for _, l := range d.InstrumentCounts {
		out = append(out, limit{rule: RuleInstrumentCount, span: newSpan(l.Window), count: uint64(l.Count), block: l.Block})
	}
	for _, l := range d.VenueCounts {
		out = append(out, limit{rule: RuleVenueCount, span: newSpan(l.Window), count: uint64(l.Count), block: l.Block})
	}
	if l := d.OpenOrders; l != nil {
		out = append(out, limit{rule: RuleOpenOrders, count: uint64(l.Count), block: l.Block})
	}
	for _, l := range d.OpenNotional {
		out = append(out, limit{rule: RuleOpenNotional, key: l.Currency, sum: l.Amount, block: l.Block})
	}
	for _, l := range d.Throttles {
		key := ""
		if l.Per == PerStrategy {
			key = "*"
		}
		out = append(out, limit{rule: RuleThrottle, key: key, span: newSpan(l.Window), count: uint64(l.Count), block: l.Block})
	}
	return out
}

// counts says that the limit is of a number, not of an amount.
func (l *limit) counts() bool {
	return l.rule != RuleNotionalWindow && l.rule != RuleQtyWindow && l.rule != RuleOpenNotional
}

// applies says whether a use counts for the limit, and under which key.
func (l *limit) applies(s *Scope, u *Use) (key string, ok bool) {
	switch l.rule {
	case RuleOrdersWindow:
		return "", true
	case RuleMessagesWindow:
		return l.key, l.key == "" || l.key == u.Audience
	case RuleNotionalWindow:
		return l.key, l.key == u.Currency
	case RuleQtyWindow:
		if l.key != "*" {
			return l.key, l.key == u.Instrument
		}
		return u.Instrument, u.Instrument != "" && !(l.own && s.ownQty(u.Instrument))
	}
	if u.Kind.reducesRisk() {
		return "", false
	}
	switch l.rule {
	case RuleCollarWindow:
		return u.Instrument, u.priced
	case RuleInstrumentCount:
		return "", u.Instrument != ""
	case RuleOpenOrders:
		return "", u.ClOrdID != ""
	case RuleOpenNotional:
		return l.key, l.key == u.Currency && u.ClOrdID != ""
	case RuleThrottle:
		if l.key == "*" {
			return u.Strategy, true
		}
	}
	return "", true
}

// ownQty says whether max_qty_per_window has entries for an instrument.
func (s *Scope) ownQty(id string) bool {
	for i := range s.doc.QtyWindows {
		if s.doc.QtyWindows[i].Instrument == id {
			return true
		}
	}
	return false
}
