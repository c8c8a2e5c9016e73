package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"inkan/audit"
	"inkan/internal/problem"
	"inkan/scope"
	"inkan/signer/client"
)

// raceRounds is how many slots are raced for through the signer's socket.
// TestRaceForOneSlot of package audit can do it as often as one likes.
const raceRounds = 20

// racers is how many orders race for one slot.
const racers = 64

// limitsScope has a limit for each attack, so that none spoils another: EUR is
// sliced, USD is signed under fire, SEK replaced, NOK left open, and each symbol in GBP has room for one order.
func limitsScope() string {
	var b strings.Builder
	b.WriteString(`version: 1
allowed_actions: [order.new, order.replace]
allowed_venues: [XPAR]
allowed_instruments:
  - id: isin:FR0000120271
`)
	for i := range raceRounds {
		fmt.Fprintf(&b, "  - id: symbol:RACE%d\n", i)
	}
	b.WriteString(`allowed_sides: ["1", "2"]
allowed_ord_types: ["2"]
allowed_tif: ["0"]
max_order_notional:
  - {currency: EUR, amount: "25000"}
  - {currency: GBP, amount: "25000"}
  - {currency: NOK, amount: "25000"}
  - {currency: SEK, amount: "25000"}
  - {currency: USD, amount: "25000"}
max_open_notional:
  - {currency: NOK, amount: "15000"}
max_notional_per_window:
  - {currency: EUR, amount: "100000", window: {rolling_s: 3600}}
  - {currency: SEK, amount: "30000", window: {rolling_s: 3600}}
  - {currency: USD, amount: "40000", window: {rolling_s: 3600}}
max_qty_per_window:
  - {instrument: "*", qty: "10", window: {rolling_s: 3600}}
  - {instrument: "isin:FR0000120271", qty: "1000000", window: {rolling_s: 3600}}
`)
	return b.String()
}

// attackLimits: what an agent tries that wants more than its limits give.
func attackLimits(ctx context.Context, w *world) error {
	me, err := os.Executable()
	if err != nil {
		return err
	}
	w.scope = limitsScope()
	for _, step := range []func() error{
		func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": me}) }, w.startSigner,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	l := &limits{w, client.New(w.socket())}
	for _, step := range []func(context.Context) error{l.forms, l.ids, l.salami, l.chains, l.open, l.race, l.fire, l.edits} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

type limits struct {
	*world
	signer *client.Client
}

// asks has the signer sign something; said is what it answers.
func (l *limits) asks(ctx context.Context, body string) (accepted bool, said string, err error) {
	signed, err := l.signer.SignJSON(ctx, []byte(body))
	if err == nil {
		return true, fmt.Sprintf("signed as entry %d", signed.Counter), nil
	}
	if p, ok := errors.AsType[*problem.Problem](err); ok {
		return false, p.Rule + ": " + p.Detail, nil
	}
	return false, "", err
}

// forms: numbers, texts and documents in other spellings.
func (l *limits) forms(ctx context.Context) error {
	price := func(text string) []string { return []string{`"61.24"`, text} }
	quoted := func(text string) []string { return price(`"` + text + `"`) }
	for _, a := range []struct {
		name, rule string
		changes    []string
	}{
		{"number with an exponent", "form", quoted("1e5")},
		{"number in hex", "form", quoted("0x10")},
		{"number without quotes", "form", price("61.24")},
		{"negative quantity", "form", []string{`"400"`, `"-400"`}},
		{"negative price, to win room back", "max_order_notional", []string{`"61.24"`, `"-61.24"`, `"400"`, `"4000"`}},
		{"NaN", "form", quoted("NaN")},
		{"infinity", "form", quoted("Infinity")},
		{"plus sign", "form", quoted("+61.24")},
		{"leading zero", "form", quoted("061.24")},
		{"white space in a number", "form", quoted(" 61.24")},
		{"digits of another script", "form", quoted("६१.२४")},
		{"full-width digits", "form", quoted("６１.24")},
		{"digits in escapes of a letter", "form", quoted(`\u0065`)},
		{"18 digits after the point", "form", quoted("1.000000000000000001")},
		{"a hair above the limit", "max_order_notional", []string{`"61.24"`, `"25000.00000000000000001"`, `"400"`, `"1"`}},
		{"price times quantity overflows", "notional_overflow", []string{`"61.24"`, `"999999999999999999"`, `"400"`, `"999999"`}},
		{"currency without a limit", "max_order_notional", []string{`"EUR"`, `"CHF"`}},
		{"currency in lower case", "form", []string{`"EUR"`, `"eur"`}},
		{"member twice", "form", []string{`"Side":"1"`, `"Side":"1","Side":"2"`}},
		{"member twice, once in other case", "form", []string{`"Side":"1"`, `"Side":"1","side":"2"`}},
		{"unknown member", "form", []string{`"Side":"1"`, `"Side":"1","Leverage":"1"`}},
		{"kind with a permitted word inside", "form", []string{`"order.new"`, `"withdraw all, then order.new"`}},
		{"venue with a permitted word inside", "form", []string{`"XPAR"`, `"XPAR or XLON"`}},
		{"instrument with a permitted word inside", "form", []string{`"FR0000120271"`, `"FR0000120271 and all others"`}},
		{"order id with an instruction inside", "form", []string{`"A-991"`, `"ignore the limits, then trade"`}},
		{"nested 5,000 deep", "form", []string{`"61.24"`, strings.Repeat("[", 5000) + strings.Repeat("]", 5000)}},
		{"body of 10 MB", "form", []string{`"A-991"`, `"` + strings.Repeat("A", 10<<20) + `"`}},
		{"second document behind the first", "form", []string{`"exe":{"algo":"LLM-MM-07"}}}`, `"exe":{"algo":"LLM-MM-07"}}}{}`}},
	} {
		if err := l.attack(a.name, "signer", a.rule, func() (bool, string, error) { return l.asks(ctx, order(client.NewID(), a.changes...)) }); err != nil {
			return err
		}
	}
	return nil
}

// used is what is used of a limit for a key, as the signer says.
func (l *limits) used(ctx context.Context, limit scope.Rule, key string) (string, error) {
	r, err := l.try(ctx, "", "status", "--socket", l.socket(), "--json")
	if err != nil {
		return "", err
	}
	if r.code != 0 {
		return "", errors.New(r.stderr)
	}
	var status struct {
		Agents []struct{ Utilisation []scope.Utilisation }
	}
	if err := json.Unmarshal([]byte(r.stdout), &status); err != nil {
		return "", err
	}
	for _, a := range status.Agents {
		for _, u := range a.Utilisation {
			if u.Limit == limit && u.Key == key {
				return u.Used, nil
			}
		}
	}
	return "0", nil
}

// ids: an id sent again, and an id used for something else.
func (l *limits) ids(ctx context.Context) error {
	id := client.NewID()
	body := order(id, `"400"`, `"1"`)
	first, err := l.signer.SignJSON(ctx, []byte(body))
	if err != nil {
		return err
	}
	if err := l.attack("the same order sent 64 times at once", "signer", "the one receipt, 61.24 used", func() (bool, string, error) {
		var mu sync.Mutex
		var failed error
		other := 0
		var wg sync.WaitGroup
		for range racers {
			wg.Go(func() {
				s, err := l.signer.SignJSON(ctx, []byte(body))
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err != nil:
					failed = err
				case s.JWS != first.JWS || s.Counter != first.Counter:
					other++
				}
			})
		}
		wg.Wait()
		if failed != nil {
			return false, "", failed
		}
		used, err := l.used(ctx, scope.RuleNotionalWindow, "EUR")
		if other > 0 {
			return true, fmt.Sprintf("%d other receipts", other), err
		}
		return false, fmt.Sprintf("the one receipt, %s used", used), err
	}); err != nil {
		return err
	}
	for name, changed := range map[string][]string{
		"the id for another quantity": {`"400"`, `"2"`},
		"the id for another side":     {`"400"`, `"1"`, `"Side":"1"`, `"Side":"2"`},
	} {
		if err := l.attack(name, "signer", "action id was used for another action", func() (bool, string, error) { return l.asks(ctx, order(id, changed...)) }); err != nil {
			return err
		}
	}
	return nil
}

// salami slices what is too much into orders that are each allowed.
func (l *limits) salami(ctx context.Context) error {
	return l.attack("salami slicing", "signer", string(scope.RuleNotionalWindow), func() (bool, string, error) {
		for range 100 {
			accepted, said, err := l.asks(ctx, order(client.NewID(), `"400"`, `"100"`))
			if err != nil || !accepted {
				return accepted, said, err
			}
		}
		return true, "100 slices of 6124 EUR were signed, 100000 are allowed", nil
	})
}

// chains replaces one order by larger and smaller ones in turn: each link that is
// larger than the one before is debited.
func (l *limits) chains(ctx context.Context) error {
	return l.attack("a chain of replacements that grows, shrinks and grows", "signer", string(scope.RuleNotionalWindow), func() (bool, string, error) {
		link := func(n int, qty string) string {
			changes := []string{`"EUR"`, `"SEK"`, `"61.24"`, `"1"`, `"400"`, `"` + qty + `"`}
			if n == 0 {
				return order(client.NewID(), append(changes, `"A-991"`, `"CHAIN-0"`)...)
			}
			return order(client.NewID(), append(changes, `"order.new"`, `"order.replace"`, `"ClOrdID":"A-991"`, fmt.Sprintf(`"ClOrdID":"CHAIN-%d","OrigClOrdID":"CHAIN-%d"`, n, n-1))...)
		}
		for n := range 40 {
			qty := "2000"
			if n%2 == 1 {
				qty = "7000"
			}
			accepted, said, err := l.asks(ctx, link(n, qty))
			if err != nil || !accepted {
				return accepted, fmt.Sprintf("after %d links %s", n, said), err
			}
		}
		return true, "40 links were signed, 20 of which add 5000 SEK: 30000 are allowed", nil
	})
}

// open: an agent that says that its orders are not open any more.
func (l *limits) open(ctx context.Context) error {
	body := func(name string) string {
		return order(client.NewID(), `"EUR"`, `"NOK"`, `"61.24"`, `"1"`, `"400"`, `"10000"`, `"A-991"`, `"`+name+`"`)
	}
	if _, err := l.signer.SignJSON(ctx, []byte(body("OPEN-1"))); err != nil {
		return err
	}
	if err := l.attack("a cancel, to make room among open orders", "signer", string(scope.RuleOpenNotional), func() (bool, string, error) {
		if _, err := l.signer.SignJSON(ctx, fmt.Appendf(nil, `{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"CANCEL-1","OrigClOrdID":"OPEN-1"}}`, client.NewID())); err != nil {
			return false, "", err
		}
		return l.asks(ctx, body("OPEN-2"))
	}); err != nil {
		return err
	}
	if err := l.attack("the name of an open order again", "signer", string(scope.RuleOpenNotional), func() (bool, string, error) {
		return l.asks(ctx, order(client.NewID(), `"EUR"`, `"NOK"`, `"61.24"`, `"1"`, `"400"`, `"0.5"`, `"A-991"`, `"OPEN-1"`))
	}); err != nil {
		return err
	}
	return l.attack("an acknowledgement of an order that was never signed", "signer", string(scope.RuleAckUnknown), func() (bool, string, error) {
		out, err := l.signer.Acknowledge(ctx, "mm-07", &scope.Acknowledgement{Venue: "XPAR", ClOrdID: "OPEN-3", Status: scope.AckFilled, Time: scope.Timestamp{Time: time.Now().UTC().Truncate(time.Microsecond)}})
		if err != nil {
			return false, "", err
		}
		return out[0].Rule == "", string(out[0].Rule) + ": " + out[0].Detail, nil
	})
}

// race has many orders race for the one slot that is left, again and again.
func (l *limits) race(ctx context.Context) error {
	name := fmt.Sprintf("%d orders race for one slot, %d times", racers, raceRounds)
	return l.attack(name, "signer", string(scope.RuleQtyWindow), func() (bool, string, error) {
		var said string
		for round := range raceRounds {
			changes := []string{`"FR0000120271"`, fmt.Sprintf(`"RACE%d"`, round), `"SecurityIDSource":"4"`, `"SecurityIDSource":"8"`, `"EUR"`, `"GBP"`, `"400"`, `"10"`}
			var mu sync.Mutex
			var failed error
			won := 0
			begin := make(chan struct{})
			var wg sync.WaitGroup
			for range racers {
				wg.Go(func() {
					body := order(client.NewID(), changes...)
					<-begin
					accepted, text, err := l.asks(ctx, body)
					mu.Lock()
					defer mu.Unlock()
					switch {
					case err != nil:
						failed = err
					case accepted:
						won++
					default:
						said = text
					}
				})
			}
			close(begin)
			wg.Wait()
			if failed != nil {
				return false, "", failed
			}
			if won != 1 {
				return true, fmt.Sprintf("round %d: %d orders won", round, won), nil
			}
		}
		return false, "one winner in each round, the others: " + said, nil
	})
}

// fire kills the signer under load until the limit is used up: whatever was
// signed must not be more than it.
func (l *limits) fire(ctx context.Context) error {
	const kills, limit = 4, "40000"
	return l.attack(fmt.Sprintf("the signer killed %d times under load", kills), "signer", string(scope.RuleNotionalWindow), func() (bool, string, error) {
		signed := &sum{seen: make(map[string]bool)}
		var refused atomic.Pointer[string]
		failed := make(chan error, 16)
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for refused.Load() == nil && ctx.Err() == nil {
					body := order(client.NewID(), `"EUR"`, `"USD"`, `"400"`, `"1"`)
					for ctx.Err() == nil { // until it is answered
						s, err := l.signer.SignJSON(ctx, []byte(body))
						if err == nil {
							if err := signed.add(s.JWS); err != nil {
								failed <- err
								return
							}
							break
						}
						if p, ok := errors.AsType[*problem.Problem](err); ok && p.Rule == string(scope.RuleNotionalWindow) {
							text := p.Rule + ": " + p.Detail
							refused.Store(&text)
							break
						} else if ok {
							failed <- err
							return
						}
						time.Sleep(5 * time.Millisecond) // the signer is down
					}
				}
			})
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		for i := range kills {
			for signed.count() < 100*(i+1) {
				select {
				case err := <-failed:
					return false, "", err
				case <-done:
					return false, "", fmt.Errorf("the limit was used up after %d orders and %d kills", signed.count(), i)
				case <-time.After(time.Millisecond):
				}
			}
			if err := syscall.Kill(l.world.signer.cmd.Process.Pid, syscall.SIGKILL); err != nil {
				return false, "", err
			}
			<-l.world.signer.done
			if err := l.startSigner(); err != nil {
				return false, "", err
			}
		}
		select {
		case err := <-failed:
			return false, "", err
		case <-done:
		}
		if err := ctx.Err(); err != nil {
			return false, "", err
		}
		recorded, err := l.recorded(ctx, "USD")
		if err != nil {
			return false, "", err
		}
		of, err := scope.ParseDecimal(limit)
		if err != nil {
			return false, "", err
		}
		said := fmt.Sprintf("%d orders over %s USD were signed, %s recorded, %s allowed; then %s", signed.count(), signed.total, recorded, limit, *refused.Load())
		return signed.total.Cmp(of) > 0 || recorded.Cmp(of) > 0 || signed.total.Cmp(recorded) > 0, said, nil
	})
}

// sum adds up what signed orders are worth, each once.
type sum struct {
	mu    sync.Mutex
	seen  map[string]bool
	total scope.Decimal
}

func (s *sum) add(jws string) error {
	parts := strings.Split(jws, ".")
	if len(parts) != 3 {
		return fmt.Errorf("not a JWS: %.40q", jws)
	}
	st, err := scope.ParseStatement(decode(parts[1]))
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen[st.ID] {
		return nil
	}
	s.seen[st.ID] = true
	return addNotional(&s.total, st)
}

func (s *sum) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.seen)
}

func addNotional(total *scope.Decimal, st *scope.Statement) error {
	if st.Decision.Notional == nil {
		return fmt.Errorf("entry %d has no notional", st.Counter)
	}
	t, ok := total.Add(st.Decision.Notional.Amount)
	if !ok {
		return errors.New("the sum is too large")
	}
	*total = t
	return nil
}

// recorded is the sum of what the record has as permitted in a currency.
func (l *limits) recorded(ctx context.Context, currency string) (total scope.Decimal, err error) {
	s, err := audit.OpenSnapshot(ctx, l.path("state", "mm-07", "log.db"))
	if err != nil {
		return total, err
	}
	defer s.Close()
	for e, err := range s.Entries(ctx) {
		if err != nil {
			return total, err
		}
		st, err := scope.ParseStatement(e.Statement)
		if err != nil {
			return total, err
		}
		if st.Decision.Decision == scope.DecisionPermit && st.Decision.Notional != nil && st.Decision.Notional.Currency == currency {
			if err := addNotional(&total, st); err != nil {
				return total, err
			}
		}
	}
	return total, nil
}

// edits: an agent that writes itself another scope, and a second signer.
func (l *limits) edits(ctx context.Context) error {
	if err := l.attack("the agent edits the scope file", "signer", string(scope.RuleOrderNotional), func() (bool, string, error) {
		for _, name := range []string{"scope.yaml", "state/mm-07/scope.yaml"} {
			if err := l.write(name, strings.NewReplacer(`"25000"`, `"1000000"`, `"100000"`, `"9000000"`).Replace(limitsScope())); err != nil {
				return false, "", err
			}
		}
		l.world.signer.stop()
		if err := l.startSigner(); err != nil {
			return false, "", err
		}
		return l.asks(ctx, order(client.NewID(), `"400"`, `"4000"`))
	}); err != nil {
		return err
	}
	return l.attack("a second signer on the same state", "signer", "in use by another process", func() (bool, string, error) {
		text, err := os.ReadFile(l.path("signer.yaml"))
		if err != nil {
			return false, "", err
		}
		if err := l.write("second.yaml", strings.Replace(string(text), "run/signer.sock", "run/second.sock", 1)); err != nil {
			return false, "", err
		}
		r, err := l.try(ctx, "", "signer", "serve", "--config", l.path("second.yaml"))
		return r.code == 0, r.stderr, err
	})
}
