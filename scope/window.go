package scope

import (
	"fmt"
	"strings"
	"sync"
	"time"
	_ "time/tzdata" // zones are known on every host
)

// MaxWindow is the longest window, and how long a signer must remember: the
// day on which clocks are set back.
const MaxWindow = 25 * time.Hour

// maxRolling is the longest window by rolling_s, in seconds.
const maxRolling = 86400

// Window is a stretch of time that ends with an action. RollingS is (t-W, t];
// DayCut the day that began at the last such time of day, that moment included.
// Exactly one of the two is set.
type Window struct {
	RollingS uint32 `json:"rolling_s,omitzero"` // seconds, 1 to 86400
	DayCut   string `json:"day_cut,omitzero"`   // hh:mm
	TZ       string `json:"tz,omitzero"`        // of DayCut, such as Europe/Paris; empty is UTC
}

func (w Window) validate() error {
	switch {
	case (w.RollingS == 0) == (w.DayCut == ""):
		return fmt.Errorf("a window has rolling_s or day_cut, and not both")
	case w.RollingS > maxRolling:
		return fmt.Errorf("window of %d s, at most %d are allowed", w.RollingS, maxRolling)
	case w.DayCut != "" && (minutes(w.DayCut) < 0 || minutes(w.DayCut) >= minutesADay):
		return fmt.Errorf("day_cut %s: a time of day such as 22:00 is expected", clipped(w.DayCut))
	case w.TZ != "" && w.DayCut == "":
		return fmt.Errorf("tz belongs to day_cut, and there is none")
	case w.TZ != "" && zone(w.TZ) == nil:
		return fmt.Errorf("tz %s: a name of the time zone database such as Europe/Paris is expected; without tz it is UTC", clipped(w.TZ))
	}
	return nil
}

var zones sync.Map // name to *time.Location

// zone returns the location of a name Area/City; nil if there is none. Names
// without an area mean one thing here and another there, as Local does.
func zone(name string) *time.Location {
	if name == "" {
		return time.UTC
	}
	if l, ok := zones.Load(name); ok {
		return l.(*time.Location)
	}
	if len(name) > maxText || !strings.Contains(name, "/") || strings.Contains(name, "..") || !only(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/_+-") {
		return nil
	}
	l, err := time.LoadLocation(name)
	if err != nil || l.String() != name {
		return nil
	}
	zones.Store(name, l)
	return l
}

// span is a window with what computing needs.
type span struct {
	Window
	rolling int64          // microseconds; 0: a day
	zone    *time.Location // of a day; nil otherwise
	cut     int            // minutes
}

func newSpan(w Window) span {
	if w.RollingS != 0 {
		return span{Window: w, rolling: int64(w.RollingS) * 1e6}
	}
	return span{Window: w, zone: zone(w.TZ), cut: minutes(w.DayCut)}
}

// begin returns the first microsecond that is inside a window that ends at t.
func (w *span) begin(t int64) int64 {
	if w.rolling != 0 {
		return t - w.rolling + 1
	}
	at := time.UnixMicro(t).In(w.zone)
	y, m, d := at.Date()
	edge := w.cutOn(y, m, d)
	if edge > t {
		edge = w.cutOn(y, m, d-1)
	} else if next := w.cutOn(y, m, d+1); next <= t { // clocks were set back over midnight
		edge = next
	}
	return max(edge, t-MaxWindow.Microseconds()+1) // no zone's day is longer since 1970 but by decree
}

// end is the first microsecond at which what happened at t is not inside any more.
func (w *span) end(t int64) int64 {
	if w.rolling != 0 {
		return t + w.rolling
	}
	y, m, d := time.UnixMicro(t).In(w.zone).Date()
	for day := d - 1; ; day++ {
		if next := w.cutOn(y, m, day); next > t {
			return min(next, t+MaxWindow.Microseconds())
		}
	}
}

// cutOn is the moment of the cut on a day. A cut that occurs twice, since clocks
// are set back, is its first occurrence; one that clocks skip is the moment at
// which they skip it.
func (w *span) cutOn(y int, m time.Month, d int) int64 {
	civil := time.Date(y, m, d, 0, w.cut, 0, 0, time.UTC)
	if w.zone == time.UTC {
		return civil.UnixMicro()
	}
	early := civil.Add(-24 * time.Hour).In(w.zone)
	_, before := early.Zone()
	_, after := civil.Add(24 * time.Hour).In(w.zone).Zone()
	first, second := civil.Add(-time.Duration(before)*time.Second), civil.Add(-time.Duration(after)*time.Second)
	if second.Before(first) {
		first, second = second, first
	}
	for _, t := range [...]time.Time{first, second} {
		if _, offset := t.In(w.zone).Zone(); t.Add(time.Duration(offset) * time.Second).Equal(civil) {
			return t.UnixMicro()
		}
	}
	_, change := early.ZoneBounds()
	return change.UnixMicro()
}

func (w Window) String() string {
	if w == (Window{}) {
		return "now" // of what is open
	}
	if w.RollingS != 0 {
		d := (time.Duration(w.RollingS) * time.Second).String() // 1h0m0s is 1h
		if strings.HasSuffix(d, "m0s") {
			d = strings.TrimSuffix(strings.TrimSuffix(d, "0s"), "h0m")
			if !strings.HasSuffix(d, "m") {
				d += "h"
			}
		}
		return "any " + d
	}
	if w.TZ != "" {
		return "the day from " + w.DayCut + " " + w.TZ
	}
	return "the day from " + w.DayCut + " UTC"
}

// NotionalWindow bounds the sum of notionals in one currency.
type NotionalWindow struct {
	Currency string  `json:"currency"`
	Amount   Decimal `json:"amount"`
	Window   Window  `json:"window"`
	Block    Block   `json:"block,omitempty"`
}

// QtyWindow bounds the sum of quantities in one instrument; instrument * is for
// each instrument that has no entry of its own.
type QtyWindow struct {
	Instrument string  `json:"instrument"`
	Qty        Decimal `json:"qty"`
	Window     Window  `json:"window"`
	Block      Block   `json:"block,omitempty"`
}

// CountWindow bounds how often something is done, or in how many.
type CountWindow struct {
	Count  uint32 `json:"count"`
	Window Window `json:"window"`
	Block  Block  `json:"block,omitempty"`
}

// MessageWindow bounds the number of messages, to one venue or to all together.
type MessageWindow struct {
	Venue  string `json:"venue,omitzero"` // empty: to all together
	Count  uint32 `json:"count"`
	Window Window `json:"window"`
	Block  Block  `json:"block,omitempty"`
}

// CollarWindow bounds how far the prices of an instrument's orders are apart.
type CollarWindow struct {
	BPS    uint32 `json:"bps"` // of the collar's reference
	Window Window `json:"window"`
	Block  Block  `json:"block,omitempty"`
}

// Throttle disables an execution algorithm, or the agent, that is executed too
// often. Only a person enables it again.
type Throttle struct {
	Count  uint32 `json:"count"`
	Window Window `json:"window"`
	Per    string `json:"per,omitzero"` // strategy: each algorithm in pty.exe alone; empty: the agent
	Block  Block  `json:"block,omitempty"`
}

// PerStrategy makes a [Throttle] count each execution algorithm alone.
const PerStrategy = "strategy"

// OpenOrders bounds how many orders are open.
type OpenOrders struct {
	Count uint32 `json:"count"`
	Block Block  `json:"block,omitempty"`
}

// validateWindows checks the limits over time and sorts them.
func (d *document) validateWindows() error {
	if err := windows(RuleNotionalWindow, d.NotionalWindows, func(l *NotionalWindow) (string, Window, *Block, error) {
		if !validCurrency(l.Currency) || l.Amount.Sign() < 0 {
			return "", l.Window, nil, fmt.Errorf("a currency and an amount of at least 0 are expected")
		}
		return l.Currency, l.Window, &l.Block, nil
	}); err != nil {
		return err
	}
	if err := windows(RuleQtyWindow, d.QtyWindows, func(l *QtyWindow) (string, Window, *Block, error) {
		if l.Instrument != "*" && !validInstrument(l.Instrument) || l.Qty.Sign() < 0 {
			return "", l.Window, nil, fmt.Errorf("an instrument or *, and a qty of at least 0 are expected")
		}
		return l.Instrument, l.Window, &l.Block, nil
	}); err != nil {
		return err
	}
	count := func(l *CountWindow) (string, Window, *Block, error) { return "", l.Window, &l.Block, nil }
	if err := windows(RuleOrdersWindow, d.OrderWindows, count); err != nil {
		return err
	}
	if err := windows(RuleMessagesWindow, d.MessageWindows, func(l *MessageWindow) (string, Window, *Block, error) {
		if l.Venue != "" && !validVenue(l.Venue) {
			return "", l.Window, nil, fmt.Errorf("venue %s: a MIC such as XPAR, or lei: and an LEI, is expected; without it all count together", clipped(l.Venue))
		}
		return l.Venue, l.Window, &l.Block, nil
	}); err != nil {
		return err
	}
	if len(d.CollarWindows) > 0 && d.Collar == nil {
		return fmt.Errorf("%s: needs price_collar_bps, which names the reference", RuleCollarWindow)
	}
	if err := windows(RuleCollarWindow, d.CollarWindows, func(l *CollarWindow) (string, Window, *Block, error) {
		if l.BPS > 1_000_000 {
			return "", l.Window, nil, fmt.Errorf("bps of at most 1000000 are expected")
		}
		return "", l.Window, &l.Block, nil
	}); err != nil {
		return err
	}
	if err := windows(RuleInstrumentCount, d.InstrumentCounts, count); err != nil {
		return err
	}
	if err := windows(RuleVenueCount, d.VenueCounts, count); err != nil {
		return err
	}
	if err := d.validateOpen(); err != nil {
		return err
	}
	return windows(RuleThrottle, d.Throttles, func(l *Throttle) (string, Window, *Block, error) {
		if l.Per == "agent" {
			l.Per = "" // absent is its one spelling
		}
		if l.Per != "" && l.Per != PerStrategy || l.Count == 0 {
			return "", l.Window, nil, fmt.Errorf("a count above 0, and per with agent or strategy, are expected")
		}
		return l.Per, l.Window, &l.Block, nil
	})
}

// validateOpen checks the limits of what is open.
func (d *document) validateOpen() error {
	if o := d.OpenOrders; o != nil {
		if o.Count > MaxOpen {
			return fmt.Errorf("%s: count is %d, at most %d is allowed", RuleOpenOrders, o.Count, MaxOpen)
		}
		if err := o.Block.normalise(string(RuleOpenOrders)); err != nil {
			return err
		}
	}
	if len(d.OpenNotional) > maxEntries {
		return fmt.Errorf("%s: %d entries, at most %d are allowed", RuleOpenNotional, len(d.OpenNotional), maxEntries)
	}
	sortBy(d.OpenNotional, func(a, b MoneyLimit) int { return strings.Compare(a.Currency, b.Currency) })
	for i := range d.OpenNotional {
		m := &d.OpenNotional[i]
		switch {
		case !validCurrency(m.Currency) || m.Amount.Sign() < 0:
			return fmt.Errorf("%s: a currency and an amount of at least 0 are expected", RuleOpenNotional)
		case i > 0 && d.OpenNotional[i-1].Currency == m.Currency:
			return fmt.Errorf("%s: %s stands twice", RuleOpenNotional, m.Currency)
		}
		if err := m.Block.normalise(string(RuleOpenNotional)); err != nil {
			return err
		}
	}
	return nil
}

// windows checks one kind of limit: each key and window once, in order.
func windows[T any](rule Rule, list []T, of func(*T) (key string, w Window, block *Block, err error)) error {
	if len(list) > maxEntries {
		return fmt.Errorf("%s: %d entries, at most %d are allowed", rule, len(list), maxEntries)
	}
	place := func(l *T) string {
		key, w, _, _ := of(l)
		return strings.TrimSuffix(fmt.Sprintf("%s %s %09d %s", key, w.DayCut, w.RollingS, w.TZ), " ")
	}
	sortBy(list, func(a, b T) int { return strings.Compare(place(&a), place(&b)) })
	for i := range list {
		_, w, block, err := of(&list[i])
		if err == nil {
			err = w.validate()
		}
		if err == nil {
			err = block.normalise(string(rule))
		}
		if err != nil {
			return fmt.Errorf("%s: %w", rule, err)
		}
		if i > 0 && place(&list[i-1]) == place(&list[i]) {
			return fmt.Errorf("%s: %s stands twice for one window", rule, strings.TrimSpace(place(&list[i])))
		}
	}
	return nil
}
