package scope

import (
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// Use is what one permitted action uses of the limits over time. It is derived
// from the action's statement, so that the record is the only truth.
type Use struct {
	At         time.Time
	Counter    Counter // of the statement
	Kind       Kind
	ClOrdID    string
	Replaces   string // OrigClOrdID
	Audience   string
	Side       string
	Instrument string
	Currency   string
	Notional   Decimal
	Qty        Decimal
	TIF        string
	Expires    string // ExpireTime
	Strategy   string // the execution algorithm that pty.exe names
	Reference  Decimal

	byAmount  bool // it has CashOrderQty in the place of a quantity
	priced    bool
	low, high Decimal  // of the order's prices
	same      [16]byte // equal for orders that are the same but for their ids; zero for what is no order
	lifts     []Rule   // limits that were lifted for it
}

// UseOf returns what a permit's action uses, if it is done at a time.
func UseOf(p *Permit, at time.Time) Use {
	u := useOf(p.action, p.instrument, p.notional, p.currency, at)
	u.lifts = p.lifts
	if r := p.UsedReference(); r != nil {
		u.Reference = r.Price
	}
	return u
}

// UseOfStatement returns what a permitted statement used. The limits that were
// lifted for it are those that its authorizations name: that they are genuine was checked
// when it was permitted.
func UseOfStatement(s *Statement) Use {
	var n Amount
	if s.Decision.Notional != nil {
		n = *s.Decision.Notional
	}
	a := s.Action()
	u := useOf(a, a.Instrument(), n.Amount, n.Currency, s.Time.Time)
	u.Counter, u.lifts = s.Counter, s.lifts
	if r := s.Decision.Reference; r != nil {
		u.Reference = r.Price
	}
	return u
}

func useOf(a *Action, instrument string, notional Decimal, currency string, at time.Time) Use {
	u := Use{At: at, Kind: a.Kind, Audience: a.Audience, Instrument: instrument, Currency: currency, Notional: notional}
	if a.Party != nil && a.Party.Execution != nil {
		u.Strategy = a.Party.Execution.Algorithm
	}
	o := a.Order
	if o == nil {
		return u
	}
	u.ClOrdID, u.Replaces, u.Side, u.TIF, u.Expires = o.ClOrdID, o.OrigClOrdID, o.Side, o.TimeInForce, o.ExpireTime
	u.byAmount = o.CashOrderQty != nil
	for _, q := range [...]*Decimal{o.OrderQty, o.BidSize, o.OfferSize} {
		if q != nil {
			u.Qty, _ = u.Qty.Add(*q) // one, or the two of a quote: below maxWhole
		}
	}
	for _, px := range [...]*Decimal{o.Price, o.StopPx, o.BidPx, o.OfferPx} {
		switch {
		case px == nil:
		case !u.priced:
			u.priced, u.low, u.high = true, *px, *px
		case px.Cmp(u.low) < 0:
			u.low = *px
		case px.Cmp(u.high) > 0:
			u.high = *px
		}
	}
	if a.Kind == OrderNew || a.Kind == OrderReplace {
		u.same = sameness(o, u.Instrument)
	}
	return u
}

// sameness is a digest of what makes two orders the same.
func sameness(o *Order, instrument string) (same [16]byte) {
	b := make([]byte, 0, 512)
	for _, s := range [...]string{o.Account, instrument, o.Side, o.OrdType, o.Currency} {
		b = append(append(b, byte(len(s))), s...)
	}
	for _, d := range [...]*Decimal{o.Price, o.StopPx, o.OrderQty, o.CashOrderQty} {
		if d == nil {
			b = append(b, 0)
			continue
		}
		sign := byte(1)
		if d.negative {
			sign = 2
		}
		b = binary.BigEndian.AppendUint64(append(b, sign), d.scaled[1]) // a decimal is below 10^35
		b = binary.BigEndian.AppendUint64(b, d.scaled[0])
	}
	sum := sha256.Sum256(b)
	copy(same[:], sum[:])
	return same
}
