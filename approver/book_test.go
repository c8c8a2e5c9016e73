package approver_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"inkan/approver"
	"inkan/scope"
)

// everyLimit is a scope with every limit over time that needs no reference price.
const everyLimit = `{"version":1,"allowed_actions":["order.new","order.replace"],"allowed_venues":["XPAR","XLON"],"allowed_instruments":[{"id":"isin:FR0000120271"},{"id":"symbol:X"},{"id":"symbol:Y"}],"allowed_sides":["1"],"allowed_ord_types":["2"],"allowed_tif":["0","1","3"],
 "max_order_notional":[{"currency":"EUR","amount":"1000000"}],"duplicate_window_ms":5,
 "max_notional_per_window":[{"currency":"EUR","amount":"1000000","window":{"rolling_s":3600}},{"currency":"EUR","amount":"100000000","window":{"day_cut":"22:00","tz":"Europe/Paris"}}],
 "max_qty_per_window":[{"instrument":"*","qty":"100000","window":{"rolling_s":3600}},{"instrument":"symbol:X","qty":"100000000","window":{"rolling_s":86400}}],
 "max_orders_per_window":[{"count":100000,"window":{"rolling_s":3600}}],"max_messages_per_window":[{"count":100000,"window":{"rolling_s":60}},{"venue":"XPAR","count":90000,"window":{"rolling_s":60}}],
 "max_instruments":[{"count":2,"window":{"day_cut":"00:00"}}],"max_venues":[{"count":2,"window":{"day_cut":"00:00"}}],
 "max_open_orders":{"count":100000},"max_open_notional":[{"currency":"EUR","amount":"100000000"}],
 "repeat_execution_throttle":[{"count":100000,"window":{"rolling_s":60}},{"count":90000,"window":{"rolling_s":3600},"per":"strategy"}]}`

// place is where a record is: opened as often as a test likes.
type place struct {
	name string
	sql  *sql.DB
	open func(t *testing.T) *approver.Record
}

func places(t *testing.T) []place {
	path := filepath.Join(t.TempDir(), "r.db")
	file, err := sql.Open("sqlite", "file:"+path+"?_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	s := newShared(t)
	return []place{
		{"sqlite", file, func(t *testing.T) *approver.Record {
			t.Helper()
			r, err := approver.OpenRecord(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			return r
		}},
		{"postgresql", s.sql, func(t *testing.T) *approver.Record {
			t.Helper()
			r, err := approver.OpenSharedRecord(t.Context(), s.url, s.password)
			if err != nil {
				t.Fatal(err)
			}
			return r
		}},
	}
}

// historian makes random entries, over days.
type historian struct {
	*mrand.Rand
	d *desk
	s *scope.Scope
	t time.Time
	n int
}

func (h *historian) pick(all ...string) string { return all[h.IntN(len(all))] }

// entry is the next one: mostly orders, some of them never to be authorized,
// denials, and events that take effect or are refused.
func (h *historian) entry(t *testing.T) []byte {
	t.Helper()
	step := []time.Duration{time.Second, 2 * time.Minute, 20 * time.Minute, 9 * time.Hour}[[]int{0, 0, 1, 1, 1, 1, 2, 2}[h.IntN(8)]+h.IntN(101)/100]
	h.t = h.t.Add(time.Duration(h.Int64N(int64(step)))).Truncate(time.Microsecond)
	h.n++
	book := h.d.book
	h.d.book = scope.NewBook() // next looks at now, and a book's time does not go back
	change := func(s *scope.Statement) {
		h.d.book = book
		s.Time.Time, s.Expires, s.Controls = h.t, h.t.Unix()+30, book.Lasting()
		s.Open = h.d.book.OpenSince(h.t)
		o := s.Order
		o.ClOrdID, o.SecurityID, o.SecurityIDSource, o.TimeInForce = fmt.Sprint(h.n), h.pick("X", "Y"), "8", h.pick("0", "1", "3", "3")
		price, qty := mustDecimal(h.pick("1", "1.25", "3.00000000000000001")), mustDecimal(fmt.Sprint(1+h.IntN(50)))
		o.Price, o.OrderQty = &price, &qty
		s.Audience = h.pick("XPAR", "XLON")
		if algo := h.pick("", "A", "B"); algo != "" {
			s.Party = &scope.Party{Execution: &scope.Person{Algorithm: algo}}
		}
		if h.n > 1 && h.IntN(3) == 0 {
			s.Kind, o.OrigClOrdID = scope.OrderReplace, fmt.Sprint(max(1, h.n-h.IntN(30)))
		}
		s.Decision.Utilisation = nil
		if p, err := scope.Check(h.s, s.Action(), s.Env(s.Attestation.Time.Time)); err == nil {
			s.Decision.Notional.Amount, _, _ = p.Notional()
			if g, r := h.d.book.Decide(p, s.Time.Time); r == nil && h.IntN(3) > 0 {
				s.Decision.Utilisation = g.Utilisation
			}
		} else {
			t.Fatal(err)
		}
		switch h.IntN(20) {
		case 0:
			s.Decision.Certificate[0]++
		case 1:
			s.Decision = scope.Decision{Decision: scope.DecisionDeny, Rule: scope.RuleSides, Message: "no", Certificate: s.Decision.Certificate, Scope: s.Decision.Scope}
		case 2:
			if h.IntN(4) == 0 {
				s.Decision = scope.Decision{Decision: scope.DecisionDeny, Rule: scope.RuleThrottle, Key: h.pick("B", "A"), Message: "no", Certificate: s.Decision.Certificate, Scope: s.Decision.Scope}
			}
		case 3, 4, 5:
			event(scope.EventAcknowledge, fmt.Sprintf(`{"ClOrdID":"%d","by":"uid 0","status":%q,"time":%q,"venue":%q}`, max(1, h.n-h.IntN(30)), h.pick("rejected", "filled", "cancelled"), h.t.Format(scope.TimeFormat), h.pick("XPAR", "XLON")))(s)
		case 6:
			if h.IntN(40) == 0 {
				event(scope.EventKill, fmt.Sprintf(`{"by":"uid 0","reason":"%d","scope":"agent"}`, h.n))(s)
			}
		case 7:
			if h.IntN(4) == 0 { // nobody may sign it: it is refused, and stands in the chain of lasting ones
				event(scope.EventRearm, h.rearm(t))(s)
			}
		}
	}
	return h.d.write(t, h.d.next(t, "1", change))
}

func (h *historian) rearm(t *testing.T) string {
	t.Helper()
	text, err := scope.SignRearm(newKey(t), h.d.agent.ID, scope.Counter(max(1, h.d.counter)), "test", h.t.Truncate(time.Second), h.t.Truncate(time.Second).Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// alike fails unless books say the same of what is, and of what comes.
func alike(t *testing.T, what string, s *scope.Scope, at time.Time, a, b *scope.Book) {
	t.Helper()
	for _, later := range []time.Duration{0, time.Minute, 2 * time.Hour, 26 * time.Hour} {
		for name, of := range map[string]func(*scope.Book) any{
			"usage":    func(b *scope.Book) any { return b.Usage(s, at.Add(later)) },
			"lasting":  func(b *scope.Book) any { return b.Lasting() },
			"kills":    func(b *scope.Book) any { return b.Kills() },
			"disabled": func(b *scope.Book) any { return b.Disabled() },
			"unknown":  func(b *scope.Book) any { return b.Unknown() },
			"policy":   func(b *scope.Book) any { return b.Policy() },
		} {
			if x, y := of(a), of(b); !reflect.DeepEqual(x, y) {
				t.Fatalf("%s, %s later: %s differs:\n%+v\n%+v", what, later, name, x, y)
			}
		}
	}
}

// TestKeptBook: over random histories an approver that starts with what is kept
// decides as one that starts without it, and as one that never ended.
func TestKeptBook(t *testing.T) {
	defer approver.KeepBookEvery(30, 10)()
	parsed, err := scope.Parse([]byte(everyLimit))
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range places(t) {
		t.Run(p.name, func(t *testing.T) {
			kept, permits, events, refusals := 0, 0, 0, 0
			for seed := range 5 {
				d := newDesk(t)
				d.name = fmt.Sprintf("agent-%d", seed)
				d.limits = string(parsed.Canonical())
				d.agent = d.certify(t, nil)
				d.client = d.tlsCertificate(t, d.agent.ID)
				cfg := config(t, "  - name: "+d.name+"\n")
				h := &historian{Rand: mrand.New(mrand.NewPCG(uint64(i), uint64(seed))), d: d, s: parsed, t: time.Now().UTC().Add(-72 * time.Hour)}
				running := p.open(t)
				d.approver = d.newApprover(t, cfg, running)
				left := time.Now().Add(-12 * time.Hour)
				for h.t.Before(left) && h.n < 500 {
					var list [][]byte
					for range 1 + h.IntN(30) {
						if list = append(list, h.entry(t)); !h.t.Before(left) {
							break
						}
					}
					if err := d.approver.Append(t.Context(), d.client, d.entries(list...)); err != nil {
						t.Fatal(err)
					}
					if h.IntN(4) > 0 {
						continue
					}
					running.Settle(d.agent.ID)
					var upTo, size int64
					if err := p.sql.QueryRowContext(t.Context(), "SELECT coalesce(max(b.size), 0), a.size FROM agent a LEFT JOIN book b ON b.agent = a.agent WHERE a.agent = $1 GROUP BY a.size", d.agent.ID).Scan(&upTo, &size); err != nil {
						t.Fatal(err)
					}
					if upTo > 0 && upTo < size {
						kept++
					}
					want, err := running.BookOf(t.Context(), d.agent.ID)
					if err != nil {
						t.Fatal(err)
					}
					with := p.open(t)
					got, err := with.BookOf(t.Context(), d.agent.ID)
					if err != nil {
						t.Fatal(err)
					}
					alike(t, fmt.Sprintf("seed %d, %d entries, a book kept up to %d", seed, size, upTo), parsed, h.t, want, got)
					if err := with.Drop(); err != nil {
						t.Fatal(err)
					}
					if h.IntN(3) > 0 {
						continue
					}
					if _, err := p.sql.ExecContext(t.Context(), "DELETE FROM book WHERE agent = $1", d.agent.ID); err != nil {
						t.Fatal(err)
					}
					without := p.open(t)
					got, err = without.BookOf(t.Context(), d.agent.ID)
					if err != nil {
						t.Fatal(err)
					}
					alike(t, fmt.Sprintf("seed %d, %d entries, nothing kept", seed, size), parsed, h.t, want, got)
					switch h.IntN(3) {
					case 0: // the new one goes on, and the running one is killed
						if err := running.Drop(); err != nil {
							t.Fatal(err)
						}
						running = without
						d.approver = d.newApprover(t, cfg, running)
						continue
					case 1: // the running one ends in order
						if err := errors.Join(without.Drop(), running.Close()); err != nil {
							t.Fatal(err)
						}
						running = p.open(t)
						d.approver = d.newApprover(t, cfg, running)
						continue
					}
					if err := without.Drop(); err != nil {
						t.Fatal(err)
					}
				}
				if err := running.Close(); err != nil {
					t.Fatal(err)
				}
				count := func(verdict string) (n int) {
					t.Helper()
					if err := p.sql.QueryRowContext(t.Context(), "SELECT count(*) FROM entry WHERE agent = $1 AND verdict "+verdict, d.agent.ID).Scan(&n); err != nil {
						t.Fatal(err)
					}
					return n
				}
				permits, events, refusals = permits+count("= 'permit'"), events+count("= 'event'"), refusals+count("NOT IN ('event', 'permit', 'deny', 'unchecked')")
			}
			t.Logf("%d starts with a kept book behind the record, %d permits, %d events, %d refused entries", kept, permits, events, refusals)
			if kept < 10 || permits < 50 || events < 50 || refusals < 50 {
				t.Error("the histories do not show what they should")
			}
		})
	}
}

// TestKeptBookThatDoesNotFit: whatever is in its place, the entries count.
func TestKeptBookThatDoesNotFit(t *testing.T) {
	defer approver.KeepBookEvery(1_000_000, 5)()
	for _, p := range places(t) {
		t.Run(p.name, func(t *testing.T) {
			d := newDesk(t)
			r := p.open(t)
			d.approver = d.newApprover(t, config(t, ""), r)
			for range 6 {
				if err := d.decide(d.request(d.write(t, d.next(t, "60", nil)))); err != nil { // 3000 each
					t.Fatal(err)
				}
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			var form []byte
			if err := p.sql.QueryRowContext(t.Context(), "SELECT bytes FROM book WHERE size = 6 AND part = 0").Scan(&form); err != nil {
				t.Fatalf("nothing was kept: %v", err)
			}
			var other scope.KeptBook
			if err := other.UnmarshalBinary(form); err != nil {
				t.Fatal(err)
			}
			other.Book = scope.NewBook() // says that nothing was used
			write := func(size, part int, b []byte) {
				t.Helper()
				if _, err := p.sql.ExecContext(t.Context(), "INSERT INTO book(agent, size, part, bytes) VALUES($1, $2, $3, $4)", d.agent.ID, size, part, b); err != nil {
					t.Fatal(err)
				}
			}
			alter := func(change func(*scope.KeptBook)) []byte {
				k := other
				change(&k)
				b, _ := k.AppendBinary(nil)
				return b
			}
			for name, put := range map[string]func(){
				"nothing":                     func() {},
				"the one that fits":           func() { write(6, 0, form) },
				"empty":                       func() { write(6, 0, []byte{}) },
				"cut off":                     func() { write(6, 0, form[:len(form)-1]) },
				"in two parts":                func() { write(6, 0, form[:100]); write(6, 1, form[100:]) },
				"the second part missing":     func() { write(6, 0, form[:100]); write(6, 2, form[110:]) },
				"of another entry":            func() { write(6, 0, alter(func(k *scope.KeptBook) { k.Entry[0]++ })) },
				"under another number":        func() { write(5, 0, alter(func(*scope.KeptBook) {})) },
				"of an earlier entry's place": func() { write(5, 0, alter(func(k *scope.KeptBook) { k.UpTo = 5 })) },
				"of a later entry":            func() { write(7, 0, alter(func(k *scope.KeptBook) { k.UpTo = 7 })) },
			} {
				if _, err := p.sql.ExecContext(t.Context(), "DELETE FROM book"); err != nil {
					t.Fatal(err)
				}
				put()
				r := p.open(t)
				d.approver = d.newApprover(t, config(t, ""), r)
				refusedBy := func() error { return d.decide(d.request(d.next(t, "41", nil))) }
				refused(t, name, scope.RuleNotionalWindow, refusedBy())
				if err := r.Drop(); err != nil {
					t.Fatal(err)
				}
			}
			// One that fits is what counts: this one, which lies, is believed.
			if _, err := p.sql.ExecContext(t.Context(), "DELETE FROM book"); err != nil {
				t.Fatal(err)
			}
			write(6, 0, alter(func(*scope.KeptBook) {}))
			r = p.open(t)
			d.approver = d.newApprover(t, config(t, ""), r)
			refused(t, "a kept book that was made up", approver.RuleUsage, d.decide(d.request(d.next(t, "41", nil))))
			if err := r.Drop(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestFarBehind: an approver that was idle while another one wrote reads what was
// written outside of a transaction, and counts it before it decides.
func TestFarBehind(t *testing.T) {
	for _, p := range places(t) {
		t.Run(p.name, func(t *testing.T) {
			d := newDesk(t)
			idle, busy := p.open(t), p.open(t)
			defer func() {
				if err := errors.Join(idle.Close(), busy.Close()); err != nil {
					t.Error(err)
				}
			}()
			a, b := d.newApprover(t, config(t, ""), idle), d.newApprover(t, config(t, ""), busy)
			d.approver = a
			if err := d.decide(d.request(d.write(t, d.next(t, "1", nil)))); err != nil {
				t.Fatal(err)
			}
			d.approver = b
			var list [][]byte
			for range 2*approver.Batch + 5 {
				list = append(list, d.write(t, d.next(t, "0.1", nil))) // 5 each
			}
			for len(list) > 0 {
				n := min(len(list), 1000)
				if err := d.approver.Append(t.Context(), d.client, d.entries(list[:n]...)); err != nil {
					t.Fatal(err)
				}
				list = list[n:]
			}
			d.approver = a
			refused(t, "more than is left", scope.RuleNotionalWindow, d.decide(d.request(d.next(t, "200", nil))))
			if err := d.decide(d.request(d.write(t, d.next(t, "190", nil)))); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestPatience: a record that takes longer to read than a signer waits is read
// on when nobody waits, and the request that finds it read is answered.
func TestPatience(t *testing.T) {
	for _, p := range places(t) {
		t.Run(p.name, func(t *testing.T) {
			d := longDesk(t)
			if err := p.open(t).Drop(); err != nil {
				t.Fatal(err)
			}
			d.fill(t, p.sql, 20_000, 20*time.Hour)
			r := p.open(t)
			defer func() {
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			}()
			d.approver = d.newApprover(t, config(t, ""), r)
			b := d.write(t, d.next(t, "1", nil))
			given := 0
			for {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				_, err := d.approver.Decide(ctx, d.client, d.request(b))
				cancel()
				if err == nil {
					break
				}
				refused(t, "while it is read", approver.RuleRecord, err)
				if given++; given > 500 {
					t.Fatal("it is never read")
				}
			}
			if given == 0 {
				t.Error("it was read at once: the test shows nothing")
			}
		})
	}
}

// TestRefusalLeavesEntries: what a refused request hands over in order is
// counted, so that it is not read anew, and the refused statement is not there.
func TestRefusalLeavesEntries(t *testing.T) {
	for _, p := range places(t) {
		t.Run(p.name, func(t *testing.T) {
			d := newDesk(t)
			r := p.open(t)
			defer func() {
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			}()
			d.approver = d.newApprover(t, config(t, ""), r)
			first, second := d.write(t, d.next(t, "100", nil)), d.write(t, d.next(t, "100", nil))
			refused(t, "more than is left", scope.RuleNotionalWindow, d.decide(d.request(d.next(t, "201", nil), first, second)))
			if !r.Counts(d.agent.ID) {
				t.Error("the refusal has the entries read anew")
			}
			var size, authorized int
			if err := p.sql.QueryRowContext(t.Context(), "SELECT count(*), sum(authorized) FROM entry").Scan(&size, &authorized); err != nil || size != 2 || authorized != 0 {
				t.Errorf("the record has %d entries, authorized %d times, %v: 2 and 0 are expected", size, authorized, err)
			}
			third := d.write(t, d.next(t, "200", nil))
			if err := d.decide(d.request(third)); err != nil {
				t.Errorf("without the entries that are there: %v", err)
			}
			if err := d.decide(d.request(first)); err != nil {
				t.Errorf("one that was an entry: %v", err)
			}
		})
	}
}

// TestGivesUp: a signer that hangs up does not have its entries read anew.
func TestGivesUp(t *testing.T) {
	for _, p := range places(t) {
		t.Run(p.name, func(t *testing.T) {
			d := newDesk(t)
			r := p.open(t)
			defer func() {
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			}()
			d.approver = d.newApprover(t, config(t, ""), r)
			if err := d.decide(d.request(d.write(t, d.next(t, "1", nil)))); err != nil {
				t.Fatal(err)
			}
			var list [][]byte
			for range 300 {
				list = append(list, d.write(t, d.next(t, "0.1", nil)))
			}
			for wait := time.Duration(0); wait < 40*time.Millisecond; wait += 2 * time.Millisecond {
				ctx, cancel := context.WithTimeout(t.Context(), wait)
				_ = d.approver.Append(ctx, d.client, d.entries(list...)) // it gives up, or has it
				cancel()
				if !r.Counts(d.agent.ID) {
					t.Fatalf("a signer that gave up after %s has the entries read anew", wait)
				}
			}
		})
	}
}

// TestVersion1: a record of the version before keeps its entries, and counts them.
func TestVersion1(t *testing.T) {
	for _, p := range places(t) {
		t.Run(p.name, func(t *testing.T) {
			d := newDesk(t)
			// As version 1 made them.
			for _, statement := range []string{
				"CREATE TABLE record(one BIGINT PRIMARY KEY CHECK(one = 1), version BIGINT NOT NULL)",
				"CREATE TABLE agent(agent TEXT PRIMARY KEY, size BIGINT NOT NULL, previous BYTEA NOT NULL, time BIGINT NOT NULL)",
				"CREATE TABLE entry(agent TEXT NOT NULL, counter BIGINT NOT NULL, statement BYTEA NOT NULL, time BIGINT NOT NULL, verdict TEXT NOT NULL, authorized BIGINT NOT NULL, PRIMARY KEY(agent, counter))",
				"INSERT INTO record(one, version) VALUES(1, 1)",
			} {
				if _, err := p.sql.ExecContext(t.Context(), statement); err != nil {
					t.Fatal(err)
				}
			}
			b := d.write(t, d.next(t, "300", nil)) // 15000
			if _, err := p.sql.ExecContext(t.Context(), "INSERT INTO entry(agent, counter, statement, time, verdict, authorized) VALUES($1, 1, $2, $3, 'permit', 1)", d.agent.ID, b, d.clock.UnixMicro()); err != nil {
				t.Fatal(err)
			}
			if _, err := p.sql.ExecContext(t.Context(), "INSERT INTO agent(agent, size, previous, time) VALUES($1, 1, $2, $3)", d.agent.ID, d.previous[:], d.clock.UnixMicro()); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			together := 1 // a file is one approver's
			if p.name == "postgresql" {
				together = 4
			}
			for range together {
				wg.Go(func() {
					r := p.open(t)
					if err := r.Close(); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			var version int
			if err := p.sql.QueryRowContext(t.Context(), "SELECT version FROM record").Scan(&version); err != nil || version != 2 {
				t.Errorf("the version is %d, %v", version, err)
			}
			r := p.open(t)
			defer func() {
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			}()
			d.approver = d.newApprover(t, config(t, ""), r)
			refused(t, "more than is left", scope.RuleNotionalWindow, d.decide(d.request(d.next(t, "101", nil))))
			if err := d.decide(d.request(b)); err != nil {
				t.Errorf("the entry of version 1: %v", err)
			}
			if err := d.decide(d.request(d.write(t, d.next(t, "100", nil)))); err != nil {
				t.Error(err)
			}
			if _, err := p.sql.ExecContext(t.Context(), "UPDATE record SET version = 3"); err != nil {
				t.Fatal(err)
			}
			if p.name == "postgresql" {
				return // TestSharedRecordOpensAtOnce
			}
			var file string
			if err := p.sql.QueryRowContext(t.Context(), "SELECT file FROM pragma_database_list").Scan(&file); err != nil {
				t.Fatal(err)
			}
			if _, err := approver.OpenRecord(t.Context(), file); err == nil || !strings.Contains(err.Error(), "version 3, this program knows version 2") {
				t.Errorf("tables of a later version: %v", err)
			}
		})
	}
}

// TestKeptBookWhileAsked: while books are renewed, approvers come and go and
// signers hang up, each order is authorized within the limits, and what is kept is what the entries lead to.
func TestKeptBookWhileAsked(t *testing.T) {
	defer approver.KeepBookEvery(10, 3)()
	s := newShared(t)
	var mu sync.Mutex
	open := make([]*approver.Record, 2)
	for i := range open {
		var err error
		if open[i], err = approver.OpenSharedRecord(t.Context(), s.url, s.password); err != nil {
			t.Fatal(err)
		}
	}
	ends := mrand.New(mrand.NewPCG(9, 9))
	for i := range 120 {
		b := s.write(t, s.next(t, "2", nil)) // 100 each, 20000 are allowed
		var wg sync.WaitGroup
		for k := range open {
			patience := time.Duration(ends.IntN(30)) * time.Millisecond
			wg.Go(func() {
				mu.Lock()
				a := s.newApprover(t, config(t, ""), open[k])
				mu.Unlock()
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, _ = a.Decide(ctx, s.client, s.request(b, s.log[max(0, len(s.log)-4):len(s.log)-1]...)) // it may hang up
			})
		}
		wg.Wait()
		if s.approver = s.newApprover(t, config(t, ""), open[i%2]); i%4 == 3 {
			if err := s.decide(s.request(b, s.log[max(0, len(s.log)-5):len(s.log)-1]...)); err != nil {
				t.Fatalf("order %d: %v", i+1, err)
			}
		}
		if ends.IntN(10) > 0 {
			continue
		}
		k := ends.IntN(2)
		end := open[k].Close
		if ends.IntN(2) == 0 {
			end = open[k].Drop
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		var err error
		if open[k], err = approver.OpenSharedRecord(t.Context(), s.url, s.password); err != nil {
			t.Fatal(err)
		}
	}
	var n int
	if err := s.sql.QueryRowContext(t.Context(), "SELECT count(*) FROM entry WHERE verdict = 'permit'").Scan(&n); err != nil || n != 120 {
		t.Errorf("%d of 120 orders stand as permits: %v", n, err)
	}
	limits := s.certified(t)
	for _, r := range append(open, s.open(t)) {
		got, err := r.BookOf(t.Context(), s.agent.ID)
		if err != nil {
			t.Fatal(err)
		}
		if s.approver = s.newApprover(t, config(t, ""), r); r == open[0] || r == open[1] { // they may be behind
			if err := s.decide(s.request(s.log[119])); err != nil {
				t.Fatal(err)
			}
			if got, err = r.BookOf(t.Context(), s.agent.ID); err != nil {
				t.Fatal(err)
			}
		}
		alike(t, "at the end", limits, s.clock, s.book, got)
	}
	if err := errors.Join(open[0].Close(), open[1].Close()); err != nil {
		t.Error(err)
	}
}
