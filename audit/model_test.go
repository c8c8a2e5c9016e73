package audit_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/audit"
	"inkan/internal/testca"
	"inkan/scope"
)

// The model adds everything up anew for each order, in fractions, over lists. It
// is written after docs/scope.md and shares nothing with package scope.

type modelWindow struct {
	rolling time.Duration // or the day from 17:30 in Paris
}

var paris, _ = time.LoadLocation("Europe/Paris")

// inside says whether x is in the window that ends at t.
func (w modelWindow) inside(x, t time.Time) bool {
	if w.rolling != 0 {
		return x.After(t.Add(-w.rolling)) && !x.After(t)
	}
	day := func(x time.Time) string {
		local := x.In(paris)
		if local.Hour()*60+local.Minute() < 17*60+30 {
			local = local.AddDate(0, 0, -1)
		}
		return local.Format(time.DateOnly)
	}
	return day(x) == day(t)
}

func (w modelWindow) json() string {
	if w.rolling != 0 {
		return fmt.Sprintf(`{"rolling_s":%d}`, int(w.rolling/time.Second))
	}
	return `{"day_cut":"17:30","tz":"Europe/Paris"}`
}

type modelOrder struct {
	kind, id, orig, venue, symbol, side, algo, tif string
	price, qty                                     *big.Rat
	expire                                         time.Time
	at                                             time.Time
}

func (o *modelOrder) notional() *big.Rat { return new(big.Rat).Mul(o.price, o.qty) }

// modelDone is what a permitted order counted.
type modelDone struct {
	modelOrder
	addedNotional, addedQty *big.Rat
}

type modelLink struct {
	modelOrder
	end             time.Time // zero: it does not end by itself
	replaced, ended bool
	chain           int
}

type model struct {
	limits  modelLimits
	done    []modelDone
	links   []*modelLink
	chains  int
	tripped map[string]bool
}

type modelLimits struct {
	notional, qty, orders, messages, parisMessages, prices, instruments, venues, perAgent, perAlgo int64 // 0: none
	openOrders, openNotional, duplicateMS                                                          int64
	window                                                                                         modelWindow
}

func (l modelLimits) json() string {
	var out []string
	add := func(n int64, format string, a ...any) {
		if n != 0 {
			out = append(out, fmt.Sprintf(format, a...))
		}
	}
	w := l.window.json()
	add(l.notional, `"max_notional_per_window":[{"currency":"EUR","amount":"%d","window":%s}]`, l.notional, w)
	add(l.qty, `"max_qty_per_window":[{"instrument":"*","qty":"%d","window":%s}]`, l.qty, w)
	add(l.orders, `"max_orders_per_window":[{"count":%d,"window":%s}]`, l.orders, w)
	switch {
	case l.messages != 0 && l.parisMessages != 0:
		add(1, `"max_messages_per_window":[{"count":%d,"window":%s},{"venue":"XPAR","count":%d,"window":%s}]`, l.messages, w, l.parisMessages, w)
	case l.messages != 0:
		add(1, `"max_messages_per_window":[{"count":%d,"window":%s}]`, l.messages, w)
	case l.parisMessages != 0:
		add(1, `"max_messages_per_window":[{"venue":"XPAR","count":%d,"window":%s}]`, l.parisMessages, w)
	}
	add(l.prices, `"price_collar_bps":{"bps":1000000,"source":"S","max_age_ms":1000},"price_collar_window_bps":[{"bps":%d,"window":%s}]`, l.prices, w)
	add(l.instruments, `"max_instruments":[{"count":%d,"window":%s}]`, l.instruments, w)
	add(l.venues, `"max_venues":[{"count":%d,"window":%s}]`, l.venues, w)
	add(l.openOrders, `"max_open_orders":{"count":%d}`, l.openOrders)
	add(l.openNotional, `"max_open_notional":[{"currency":"EUR","amount":"%d"}]`, l.openNotional)
	add(l.duplicateMS, `"duplicate_window_ms":%d`, l.duplicateMS)
	switch {
	case l.perAgent != 0 && l.perAlgo != 0:
		add(1, `"repeat_execution_throttle":[{"count":%d,"window":%s},{"count":%d,"window":%s,"per":"strategy"}]`, l.perAgent, w, l.perAlgo, w)
	case l.perAgent != 0:
		add(1, `"repeat_execution_throttle":[{"count":%d,"window":%s}]`, l.perAgent, w)
	case l.perAlgo != 0:
		add(1, `"repeat_execution_throttle":[{"count":%d,"window":%s,"per":"strategy"}]`, l.perAlgo, w)
	}
	return strings.Join(out, ",")
}

// isOpen at a moment.
func (l *modelLink) isOpen(t time.Time) bool { return !l.ended && (l.end.IsZero() || t.Before(l.end)) }

// rests says whether an order is ever open, and until when.
func (o *modelOrder) rests() (end time.Time, ok bool) {
	switch o.tif {
	case "3":
		return end, false
	case "1":
		return end, true
	case "6":
		return o.expire, o.expire.After(o.at)
	}
	return o.at.Add(24 * time.Hour), true
}

// old is the open link that a replacement replaces.
func (m *model) old(o *modelOrder) *modelLink {
	if o.kind != "order.replace" {
		return nil
	}
	for i := len(m.links) - 1; i >= 0; i-- {
		l := m.links[i]
		if l.venue == o.venue && l.id == o.orig && l.isOpen(o.at) {
			if !l.replaced && l.symbol == o.symbol && l.side == o.side {
				return l
			}
			return nil // of one name the newest counts
		}
	}
	return nil
}

// open returns how many orders are open and what they are worth, if o is open too.
func (m *model) open(t time.Time, o *modelOrder) (orders int64, worth *big.Rat) {
	most := make(map[int]*big.Rat)
	count := func(chain int, n *big.Rat) {
		if most[chain] == nil || most[chain].Cmp(n) < 0 {
			most[chain] = n
		}
	}
	for _, l := range m.links {
		if l.isOpen(t) {
			count(l.chain, l.notional())
		}
	}
	if o != nil {
		if _, ok := o.rests(); ok {
			chain := -1
			if old := m.old(o); old != nil {
				chain = old.chain
			}
			count(chain, o.notional())
		}
	}
	worth = new(big.Rat)
	for _, n := range most {
		worth.Add(worth, n)
	}
	return int64(len(most)), worth
}

func (m *model) added(o *modelOrder) (notional, qty *big.Rat) {
	notional, qty = o.notional(), new(big.Rat).Set(o.qty)
	if old := m.old(o); old != nil {
		for _, x := range []struct{ n, old *big.Rat }{{notional, old.notional()}, {qty, old.qty}} {
			if x.n.Sub(x.n, x.old); x.n.Sign() < 0 {
				x.n.SetInt64(0)
			}
		}
	}
	return notional, qty
}

// refuses names the limit that refuses an order; empty: it is allowed.
func (m *model) refuses(o *modelOrder) string {
	l, w := m.limits, m.limits.window
	if o.kind == "order.cancel" {
		return ""
	}
	if m.tripped[""] || m.tripped[o.algo] {
		return "disabled"
	}
	sumNotional, sumQty := m.added(o)
	addsNotional, addsQty := sumNotional.Sign() > 0, sumQty.Sign() > 0
	lowest, highest := new(big.Rat).Set(o.price), new(big.Rat).Set(o.price)
	symbols, venues := map[string]bool{o.symbol: true}, map[string]bool{o.venue: true}
	var orders, messages, parisMessages, executions, ofAlgo int64 = 0, 1, 0, 1, 1
	if o.kind == "order.new" {
		orders++
	}
	if o.venue == "XPAR" {
		parisMessages++
	}
	for _, d := range m.done {
		if d.kind != "order.cancel" && l.duplicateMS != 0 && o.at.Sub(d.at) < time.Duration(l.duplicateMS)*time.Millisecond &&
			d.symbol == o.symbol && d.side == o.side && d.price.Cmp(o.price) == 0 && d.qty.Cmp(o.qty) == 0 {
			return "duplicate_window_ms"
		}
		if !w.inside(d.at, o.at) {
			continue
		}
		messages++
		if d.venue == "XPAR" {
			parisMessages++
		}
		if d.kind == "order.cancel" {
			continue
		}
		sumNotional.Add(sumNotional, d.addedNotional)
		symbols[d.symbol], venues[d.venue] = true, true
		executions++
		if d.algo == o.algo {
			ofAlgo++
		}
		if d.kind == "order.new" {
			orders++
		}
		if d.symbol == o.symbol {
			sumQty.Add(sumQty, d.addedQty)
			if d.price.Cmp(lowest) < 0 {
				lowest.Set(d.price)
			}
			if d.price.Cmp(highest) > 0 {
				highest.Set(d.price)
			}
		}
	}
	// The reference is 100: a basis point of it is a hundredth.
	apart := new(big.Rat).Mul(new(big.Rat).Sub(highest, lowest), big.NewRat(100, 1))
	above := func(limit int64, n *big.Rat) bool { return limit != 0 && n.Cmp(new(big.Rat).SetInt64(limit)) > 0 }
	more := func(limit, n int64) bool { return limit != 0 && n > limit }
	openBefore, worthBefore := m.open(o.at, nil)
	openAfter, worthAfter := m.open(o.at, o)
	named := false
	if _, rests := o.rests(); rests {
		for _, x := range m.links {
			named = named || x.isOpen(o.at) && x.venue == o.venue && x.id == o.id
		}
	}
	switch {
	case addsNotional && above(l.notional, sumNotional):
		return "max_notional_per_window"
	case addsQty && above(l.qty, sumQty):
		return "max_qty_per_window"
	case o.kind == "order.new" && more(l.orders, orders):
		return "max_orders_per_window"
	case more(l.messages, messages), o.venue == "XPAR" && more(l.parisMessages, parisMessages):
		return "max_messages_per_window"
	case above(l.prices, apart):
		return "price_collar_window_bps"
	case more(l.instruments, int64(len(symbols))):
		return "max_instruments"
	case more(l.venues, int64(len(venues))):
		return "max_venues"
	case l.openOrders != 0 && (openAfter > openBefore && openAfter > l.openOrders || named):
		return "max_open_orders"
	case l.openNotional != 0 && (worthAfter.Cmp(worthBefore) > 0 && above(l.openNotional, worthAfter) || named):
		return "max_open_notional"
	case more(l.perAgent, executions):
		m.tripped[""] = true
		return "repeat_execution_throttle"
	case more(l.perAlgo, ofAlgo):
		m.tripped[o.algo] = true
		return "repeat_execution_throttle"
	}
	return ""
}

// permit counts an order.
func (m *model) permit(o *modelOrder) {
	d := modelDone{modelOrder: *o}
	if o.kind != "order.cancel" {
		d.addedNotional, d.addedQty = m.added(o)
		if end, ok := o.rests(); ok {
			l := &modelLink{modelOrder: *o, end: end}
			old := m.old(o)
			for _, x := range m.links {
				if x != old && x.venue == o.venue && x.id == o.id {
					x.ended = true
				}
			}
			if old != nil {
				old.replaced, l.chain = true, old.chain
			} else {
				m.chains++
				l.chain = m.chains
			}
			m.links = append(m.links, l)
		}
	}
	m.done = append(m.done, d)
}

// acknowledge ends an order; false if none of the name is open.
func (m *model) acknowledge(venue, id, status string, t time.Time) bool {
	for i := len(m.links) - 1; i >= 0; i-- {
		l := m.links[i]
		if l.venue != venue || l.id != id || !l.isOpen(t) {
			continue
		}
		l.ended = true
		for j := i - 1; j >= 0; j-- {
			if x := m.links[j]; x.chain == l.chain && x.isOpen(t) {
				if status == "rejected" {
					x.replaced = false
					break
				}
				x.ended = true
			}
		}
		return true
	}
	return false
}

func (o *modelOrder) action(t testing.TB, n uint64) *scope.Action {
	t.Helper()
	text := fmt.Sprintf(`{"id":%q,"aud":%q,"act":%q,"ord":{"ClOrdID":%q`, id(n), o.venue, o.kind, o.id)
	if o.orig != "" {
		text += fmt.Sprintf(`,"OrigClOrdID":%q`, o.orig)
	}
	if o.kind != "order.cancel" {
		text += fmt.Sprintf(`,"SecurityID":%q,"SecurityIDSource":"8","Side":%q,"OrdType":"2","Price":%q,"OrderQty":%q,"Currency":"EUR","TimeInForce":%q`,
			o.symbol, o.side, decimal(o.price), decimal(o.qty), o.tif)
	}
	if o.tif == "6" {
		text += fmt.Sprintf(`,"ExpireTime":%q`, o.expire.Format(time.RFC3339))
	}
	text += "}"
	if o.algo != "" {
		text += fmt.Sprintf(`,"pty":{"exe":{"algo":%q}}`, o.algo)
	}
	a, err := scope.ParseAction([]byte(text + "}"))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return a
}

func decimal(r *big.Rat) string {
	s := r.FloatString(4)
	return strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}

// crash opens a copy of what is on disk while the log is open, as after a loss of power.
func (d *desk) crash(t *testing.T, now func() time.Time) {
	t.Helper()
	dir := t.TempDir()
	for _, f := range []string{"log.db", "log.db-wal"} {
		from, err := os.Open(filepath.Join(filepath.Dir(d.path), f))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		to, err := os.Create(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(to, from); err != nil {
			t.Fatal(err)
		}
		_, _ = from.Close(), to.Close()
	}
	old := d.log
	d.path = filepath.Join(dir, "log.db")
	d.reopen(t, now)
	_ = old.Close()
}

func (d *desk) reopen(t *testing.T, now func() time.Time) {
	t.Helper()
	log, err := audit.Open(context.Background(), d.path, audit.Options{Now: now})
	if err != nil {
		t.Fatal(err)
	}
	d.log = log
	t.Cleanup(func() { _ = log.Close() })
}

// TestAgainstModel: over random histories, with crashes and restarts between the
// steps, the record permits what the model permits and refuses what it refuses,
// and an auditor comes to the same result.
func TestAgainstModel(t *testing.T) {
	permitted, refused := 0, make(map[string]int)
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 11))
		maybe := func(limit int64) int64 {
			if r.IntN(3) > 0 {
				return 0
			}
			return 1 + r.Int64N(limit)
		}
		m := &model{tripped: make(map[string]bool), limits: modelLimits{notional: 100 * maybe(100), qty: maybe(120), orders: maybe(6), messages: maybe(12), parisMessages: maybe(9), prices: maybe(1200),
			instruments: maybe(2), venues: maybe(1), openOrders: maybe(8), openNotional: 100 * maybe(80), duplicateMS: 10_000 * maybe(360), perAgent: 6 * maybe(2), perAlgo: 4 * maybe(2),
			window: []modelWindow{{time.Minute}, {time.Hour}, {24 * time.Hour}, {}}[r.IntN(4)]}}
		limits := m.limits.json()
		if limits != "" {
			limits = "," + limits
		}
		s, err := scope.Parse([]byte(`{"version":1,"allowed_actions":["order.new","order.replace"],"allowed_venues":["XPAR","XLON"],"allowed_instruments":[{"id":"symbol:X"},{"id":"symbol:Y"},{"id":"symbol:Z"}],
			"allowed_sides":["1","2"],"allowed_ord_types":["2"],"allowed_tif":["0","1","3","6"],"max_order_notional":[{"currency":"EUR","amount":"100000"}]` + limits + `}`))
		if err != nil {
			t.Fatal(err)
		}
		at := time.Now().UTC().Truncate(time.Microsecond)
		now := func() time.Time { return at }
		d := &desk{ca: testca.New(t), scope: s, path: filepath.Join(t.TempDir(), "log.db")}
		d.reopen(t, now)
		var expires time.Time
		renew := func() {
			if at.Before(expires) {
				return
			}
			expires = at.Add(23 * time.Hour)
			d.agent = d.ca.Agent(t, "a", s.Canonical(), func(c *x509.Certificate) { c.NotBefore, c.NotAfter = at.Add(-time.Minute), expires.Add(time.Minute) })
			d.id = identity(d)
			if err := d.log.AddCertificate(t.Context(), d.agent.Chain); err != nil {
				t.Fatal(err)
			}
		}
		hundred, _ := scope.ParseDecimal("100")
		names := []string{"0"}
		for n := range 160 {
			at = at.Add([]time.Duration{time.Microsecond, time.Second, 10 * time.Second, 5 * time.Minute, 3 * time.Hour}[r.IntN(5)] * time.Duration(r.IntN(5)))
			if r.IntN(40) == 0 {
				at = at.Add(time.Duration(r.IntN(60)) * time.Hour)
			}
			switch r.IntN(24) {
			case 0:
				d.crash(t, now)
			case 1:
				_ = d.log.Close()
				d.reopen(t, now)
			}
			renew()
			if r.IntN(7) == 0 {
				k := &scope.Acknowledgement{Venue: []string{"XPAR", "XLON"}[r.IntN(2)], ClOrdID: names[len(names)-1-r.IntN(min(len(names), 12))],
					Status: []scope.AckStatus{scope.AckRejected, scope.AckFilled, scope.AckDone}[r.IntN(3)], Time: scope.Timestamp{Time: at}}
				e, err := k.Event("test", s)
				if err != nil {
					t.Fatal(err)
				}
				_, err = d.log.Event(t.Context(), e, d.id)
				if want := m.acknowledge(k.Venue, k.ClOrdID, string(k.Status), at); want != (err == nil) {
					t.Fatalf("seed %d, step %d: acknowledging %s at %s: %v, the model says %t", seed, n, k.ClOrdID, k.Venue, err, want)
				}
				continue
			}
			o := &modelOrder{kind: "order.new", id: fmt.Sprint(n + 1), venue: []string{"XPAR", "XPAR", "XLON"}[r.IntN(3)], symbol: []string{"X", "X", "Y", "Z"}[r.IntN(4)], side: []string{"1", "1", "2"}[r.IntN(3)],
				algo: []string{"", "A", "A", "B"}[r.IntN(4)], tif: []string{"0", "1", "3", "6"}[r.IntN(4)], price: big.NewRat(950+r.Int64N(100), 10), qty: big.NewRat(1+r.Int64N(40), 2), at: at}
			if r.IntN(3) == 0 { // few, so that there are some that are the same
				o.price, o.qty = big.NewRat(100, 1), big.NewRat(1+r.Int64N(2), 1)
			}
			if r.IntN(10) == 0 {
				o.id = names[r.IntN(len(names))]
			}
			if o.tif == "6" {
				o.expire = at.Add(time.Duration(r.IntN(40*3600)) * time.Second).Truncate(time.Second)
			}
			switch r.IntN(8) {
			case 0, 1, 2:
				o.kind, o.orig = "order.replace", names[len(names)-1-r.IntN(min(len(names), 12))]
			case 3:
				o.kind, o.orig, o.tif, o.symbol = "order.cancel", names[r.IntN(len(names))], "", ""
			}
			names = append(names, o.id)
			p, err := scope.Check(s, o.action(t, uint64(n)), scope.Env{Now: at, AttestedAt: at, Reference: &scope.ReferencePrice{Instrument: "symbol:" + o.symbol, Price: hundred, Currency: "EUR", Source: "S", Time: at}})
			if err != nil {
				t.Fatal(err)
			}
			want := m.refuses(o)
			_, err = d.log.Record(t.Context(), p, d.id)
			got := ""
			if refusal, ok := errors.AsType[*scope.Refusal](err); ok {
				got = string(refusal.Rule)
			} else if err != nil {
				t.Fatal(err)
			}
			if got != want {
				t.Fatalf("seed %d, step %d, %s %s: the record says %q (%v), the model %q; scope %s", seed, n, o.kind, o.id, got, err, want, s.Canonical())
			}
			if want == "" {
				m.permit(o)
				permitted++
			} else {
				refused[want]++
			}
		}
		_ = d.log.Close()
		if _, err := d.verify(t); err != nil {
			t.Fatalf("seed %d: the auditor says %v", seed, err)
		}
	}
	t.Logf("%d permitted, refused: %v", permitted, refused)
	if permitted < 500 || len(refused) < 12 {
		t.Errorf("the histories show too little: %d permitted, refused by %v", permitted, refused)
	}
}
