package scope

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

var (
	sideNames = map[string]string{"1": "buy", "2": "sell", "5": "sell short", "6": "sell short exempt"}
	typeNames = map[string]string{"1": "market", "2": "limit", "3": "stop", "4": "stop limit"}
	tifNames  = map[string]string{"0": "day", "1": "good till cancel", "2": "at the opening", "3": "immediate or cancel", "4": "fill or kill", "6": "good till date", "7": "at the close"}
)

// Describe returns what the scope allows in plain sentences.
func (s *Scope) Describe() []string {
	if s == nil || s.canonical == nil {
		return []string{"Nothing is allowed."}
	}
	d := &s.doc
	out := []string{
		fmt.Sprintf("May do: %s. Cancels are always possible.", join(d.Actions)),
		fmt.Sprintf("At: %s.", join(d.Venues)),
	}
	add := func(format string, a ...any) { out = append(out, fmt.Sprintf(format, a...)) }
	if len(d.Instruments) > 0 {
		var ids []string
		for _, in := range d.Instruments {
			if in.Multiplier != nil {
				ids = append(ids, fmt.Sprintf("%s (multiplier %s)", in.ID, in.Multiplier))
				continue
			}
			ids = append(ids, in.ID)
		}
		add("In: %s.", strings.Join(ids, ", "))
	}
	if len(d.Sides) > 0 {
		short := ""
		if (slices.Contains(d.Sides, "5") || slices.Contains(d.Sides, "6")) && !d.Short {
			short = " (short sales are listed, but allow_short is not set, so they are refused)"
		}
		add("Sides: %s%s.", names(d.Sides, sideNames), short)
	}
	if len(d.OrdTypes) > 0 {
		add("Order types: %s.", names(d.OrdTypes, typeNames))
	}
	if len(d.TIF) > 0 {
		add("Time in force: %s.", names(d.TIF, tifNames))
	}
	for _, m := range d.OrderNotional {
		add("An order is worth at most %s %s%s.", m.Amount, m.Currency, m.Block.describe())
	}
	for _, m := range d.Approval {
		add("Above %s %s an order needs the approval of a person.", m.Amount, m.Currency)
	}
	for _, q := range d.OrderQty {
		what := q.Instrument
		if what == "*" && len(d.OrderQty) == 1 {
			what = "any instrument"
		} else if what == "*" {
			what = "any other instrument"
		}
		add("An order in %s is for at most %s%s.", what, q.Qty, q.Block.describe())
	}
	if c := d.Collar; c != nil {
		add("A price is at most %d basis points away from a reference of %s that is at most %s old%s.", c.BPS, c.Source, time.Duration(c.MaxAgeMS)*time.Millisecond, c.Block.describe())
	}
	for _, l := range d.NotionalWindows {
		add("Orders of %s are worth at most %s %s together%s.", l.Window, l.Amount, l.Currency, l.Block.describe())
	}
	for _, l := range d.QtyWindows {
		what := l.Instrument
		if what == "*" {
			what = "each instrument"
		}
		add("Orders of %s in %s are for at most %s together%s.", l.Window, what, l.Qty, l.Block.describe())
	}
	for _, l := range d.OrderWindows {
		add("At most %d orders in %s%s.", l.Count, l.Window, l.Block.describe())
	}
	for _, l := range d.MessageWindows {
		to := ""
		if l.Venue != "" {
			to = " to " + l.Venue
		}
		add("At most %d messages%s in %s, cancels counted and never refused%s.", l.Count, to, l.Window, l.Block.describe())
	}
	if d.DuplicateMS != 0 {
		add("The same order again only after %s.", time.Duration(d.DuplicateMS)*time.Millisecond)
	}
	for _, l := range d.CollarWindows {
		add("The prices of an instrument's orders in %s are at most %d basis points of the reference apart%s.", l.Window, l.BPS, l.Block.describe())
	}
	for _, l := range d.InstrumentCounts {
		add("At most %d instruments in %s%s.", l.Count, l.Window, l.Block.describe())
	}
	for _, l := range d.VenueCounts {
		add("At most %d venues in %s%s.", l.Count, l.Window, l.Block.describe())
	}
	if l := d.OpenOrders; l != nil {
		add("At most %d orders are open at a time%s.", l.Count, l.Block.describe())
	}
	for _, l := range d.OpenNotional {
		add("Open orders are worth at most %s %s together%s.", l.Amount, l.Currency, l.Block.describe())
	}
	for _, l := range d.Throttles {
		who := "The agent"
		if l.Per == PerStrategy {
			who = "An execution algorithm"
		}
		add("%s is executed at most %d times in %s; one more disables it until a person enables it again%s.", who, l.Count, l.Window, l.Block.describe())
	}
	if len(d.Accounts) > 0 {
		add("For the accounts: %s.", join(d.Accounts))
	} else {
		add("No account may be named.")
	}
	if len(d.Clients) > 0 {
		add("For the clients: %s.", join(d.Clients))
	} else {
		add("No client may be named.")
	}
	if len(d.Trading) > 0 {
		add("Only at these times: %s.", describeHours(d.Trading))
	}
	if d.NotBefore != nil {
		add("Not before %s.", d.NotBefore.Format(time.RFC3339))
	}
	if d.NotAfter != nil {
		add("Not after %s.", d.NotAfter.Format(time.RFC3339))
	}
	if d.AttestationS != 0 {
		add("Only while the host's attestation is at most %s old.", time.Duration(d.AttestationS)*time.Second)
	}
	if d.ClockDivergence != 0 {
		add("Only while the signer's clock is known to be at most %s from UTC.", time.Duration(d.ClockDivergence)*time.Microsecond)
	}
	describeDestinations(d.Destinations, add)
	if len(d.Networks) > 0 {
		add("Only from addresses in: %s.", join(texts(d.Networks)))
	}
	if len(d.Regions) > 0 {
		add("Only from addresses that are known to be in: %s.", join(d.Regions))
	}
	if d.OS != nil {
		d.OS.describe(add)
	}
	for _, c := range d.Controllers {
		add("Controller %s may: %s.", c.Name, join(c.May))
	}
	return out
}

func (b Block) describe() string {
	if b == Soft {
		return " (a second person may lift this for one order)"
	}
	return ""
}

func names(list []string, table map[string]string) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = table[v]
	}
	return strings.Join(out, ", ")
}

func describeHours(list []Hours) string {
	out := make([]string, len(list))
	for i, h := range list {
		out[i] = fmt.Sprintf("%s %s-%s UTC", strings.Join(h.Days, " "), h.From, h.To)
	}
	return strings.Join(out, "; ")
}

// Describe says in words what the action is. Its texts are those of the action:
// whoever shows them must not take them for harmless.
func (a *Action) Describe() string {
	if p := a.Payment; p != nil {
		return fmt.Sprintf("%s %s to %s", p.Amount, p.Currency, p.Destination)
	}
	o := a.Order
	if o == nil {
		return ""
	}
	var out []string
	add := func(s string) {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	word := func(code string, table map[string]string) string {
		if w, ok := table[code]; ok {
			return w
		}
		return code
	}
	text := func(before string, d *Decimal) {
		if d != nil {
			add(before + " " + d.String())
		}
	}
	add(word(o.Side, sideNames))
	text("", o.OrderQty)
	text("for", o.CashOrderQty)
	add(a.Instrument())
	text("bid", o.BidSize)
	text("at", o.BidPx)
	text("offer", o.OfferSize)
	text("at", o.OfferPx)
	text("at", o.Price)
	text("stop", o.StopPx)
	if o.Price != nil || o.StopPx != nil || o.CashOrderQty != nil || o.BidPx != nil {
		add(o.Currency)
	}
	for _, part := range []string{word(o.OrdType, typeNames), word(o.TimeInForce, tifNames)} {
		if part != "" {
			out = append(out, "("+part+")")
		}
	}
	if o.OrigClOrdID != "" {
		add("of " + o.OrigClOrdID)
	}
	if o.OrderID != "" {
		add("of order " + o.OrderID)
	}
	return strings.Join(out, " ")
}
