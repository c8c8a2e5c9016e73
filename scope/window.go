package scope

import (
	"fmt"
	"strings"
	"time"
)

// MaxWindow is the longest window, and how long a signer must remember.
const MaxWindow = 24 * time.Hour

// Window is a stretch of time that ends with an action. Exactly one member is
// set: RollingS is (t-W, t], DayCut the day that began at the last such time of
// day in UTC, that moment included.
type Window struct {
	RollingS uint32 `json:"rolling_s,omitzero"` // seconds, 1 to 86400
	DayCut   string `json:"day_cut,omitzero"`   // hh:mm
}

func (w Window) validate() error {
	switch {
	case (w.RollingS == 0) == (w.DayCut == ""):
		return fmt.Errorf("a window has rolling_s or day_cut, and not both")
	case time.Duration(w.RollingS)*time.Second > MaxWindow:
		return fmt.Errorf("window of %d s, at most %d are allowed", w.RollingS, int(MaxWindow/time.Second))
	case w.DayCut != "" && (minutes(w.DayCut) < 0 || minutes(w.DayCut) >= minutesADay):
		return fmt.Errorf("day_cut %s: a time of day in UTC such as 22:00 is expected", clipped(w.DayCut))
	}
	return nil
}

// begin returns the window's edge for an action at t, and whether what happened
// at that very moment is inside.
func (w Window) begin(t time.Time) (edge time.Time, inclusive bool) {
	if w.RollingS != 0 {
		return t.Add(-time.Duration(w.RollingS) * time.Second), false
	}
	t = t.UTC()
	edge = time.Date(t.Year(), t.Month(), t.Day(), 0, minutes(w.DayCut), 0, 0, time.UTC)
	if edge.After(t) {
		edge = edge.AddDate(0, 0, -1)
	}
	return edge, true
}

// end is when something that happened at t leaves the window.
func (w Window) end(t time.Time) time.Time {
	if w.RollingS != 0 {
		return t.Add(time.Duration(w.RollingS) * time.Second)
	}
	edge, _ := w.begin(t)
	return edge.AddDate(0, 0, 1)
}

func (w Window) String() string {
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

// CountWindow bounds how often something is done.
type CountWindow struct {
	Count  uint32 `json:"count"`
	Window Window `json:"window"`
	Block  Block  `json:"block,omitempty"`
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
	return windows(RuleMessagesWindow, d.MessageWindows, count)
}

// windows checks one kind of limit: each key and window once, in order.
func windows[T any](rule Rule, list []T, of func(*T) (key string, w Window, block *Block, err error)) error {
	if len(list) > maxEntries {
		return fmt.Errorf("%s: %d entries, at most %d are allowed", rule, len(list), maxEntries)
	}
	place := func(l *T) string { key, w, _, _ := of(l); return fmt.Sprintf("%s %s %09d", key, w.DayCut, w.RollingS) }
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
