package verify_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"inkan/scope"
	"inkan/simulator"
	"inkan/verify"
	"inkan/verify/postgres"
)

// database is a PostgreSQL server for the tests that leave it running; each has
// a database of its own there.
var database struct {
	once   sync.Once
	dir    string
	server *simulator.PostgreSQL
	err    error
	count  atomic.Int64
}

func TestMain(m *testing.M) {
	code := m.Run()
	if database.server != nil {
		if err := database.server.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if database.dir != "" {
		_ = os.RemoveAll(database.dir)
	}
	os.Exit(code)
}

// shared makes a database and returns what opens a store in it, as one receiver
// more does.
func shared(t *testing.T) (open func() (*verify.SQLStore, error)) {
	t.Helper()
	database.once.Do(func() {
		if database.dir, database.err = os.MkdirTemp("", "pg"); database.err == nil { // shorter than t.TempDir
			database.server, database.err = simulator.StartPostgreSQL(context.Background(), database.dir)
		}
	})
	if database.err != nil {
		t.Fatal(database.err)
	}
	name := fmt.Sprintf("test%d", database.count.Add(1))
	execute(t, database.server, "CREATE DATABASE "+name)
	return storeIn(t, database.server, name)
}

func storeIn(t *testing.T, server *simulator.PostgreSQL, name string) func() (*verify.SQLStore, error) {
	t.Helper()
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte(server.Password), 0o600); err != nil {
		t.Fatal(err)
	}
	return func() (*verify.SQLStore, error) {
		return postgres.Open(context.Background(), "replay_db", "postgres://inkan@/"+name+"?host="+server.Dir, password)
	}
}

func execute(t *testing.T, server *simulator.PostgreSQL, statement string) {
	t.Helper()
	db, err := sql.Open("pgx", server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }() // it only waits
	if _, err := db.ExecContext(t.Context(), statement); err != nil {
		t.Fatal(err)
	}
}

// durable are the kinds of store that outlive a receiver: each opens another
// receiver's view of one store.
func durable(t *testing.T) map[string]func() (*verify.SQLStore, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "seen.db")
	return map[string]func() (*verify.SQLStore, error){
		"SQLite":     func() (*verify.SQLStore, error) { return verify.OpenSQLiteStore(context.Background(), file) },
		"PostgreSQL": shared(t),
	}
}

func opened(t *testing.T, open func() (*verify.SQLStore, error)) *verify.SQLStore {
	t.Helper()
	s, err := open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // a second time does nothing
	return s
}

const us = time.Microsecond

// step is an order or something else that arrives at the venue: at when its
// statement was made, in microseconds after the first.
type step struct {
	at     time.Duration
	kind   scope.Kind
	id     string // ClOrdID
	old    string // OrigClOrdID
	qty    string // at 50 each
	reason verify.Reason
	n      int // number of its statement, in the order of at; 0: as if there was one each microsecond
}

// sent makes the action of a step.
func (v *venue) sent(t testing.TB, begin time.Time, s step) []byte {
	t.Helper()
	return []byte(v.action(t, func(st *scope.Statement) {
		st.Time.Time = begin.Add(s.at)
		st.Expires = st.Time.Time.Add(time.Minute).Unix()
		if st.Counter = scope.Counter(s.at/us) + 2; s.n != 0 {
			st.Counter = scope.Counter(s.n) + 1
		}
		st.Previous = scope.Digest{1}
		st.Kind = s.kind
		if s.kind == scope.OrderCancel {
			st.Order, st.Decision.Notional = &scope.Order{ClOrdID: s.id, OrigClOrdID: s.old}, nil
			return
		}
		qty := dec(s.qty)
		st.Order.ClOrdID, st.Order.OrigClOrdID, st.Order.OrderQty = s.id, s.old, qty
		a, err := scope.Check(v.scope, st.Action(), scope.Env{Now: st.Time.Time, AttestedAt: st.Time.Time})
		if err != nil {
			t.Fatal(err)
		}
		n, c, _ := a.Notional()
		st.Decision.Notional = &scope.Amount{Amount: n, Currency: c}
	}))
}

// TestLimits plays what arrives at a venue, at each kind of store: check 13.
func TestLimits(t *testing.T) {
	const (
		sum   = `"allowed_actions":["order.new","order.replace"],"max_notional_per_window":[{"currency":"EUR","amount":"10000","window":{"rolling_s":1}}]`
		count = `"max_orders_per_window":[{"count":2,"window":{"rolling_s":1}}]`
		open  = `"max_open_orders":{"count":1},"max_orders_per_window":[{"count":2,"window":{"rolling_s":1}}]`
	)
	neu, replace, cancel := scope.OrderNew, scope.OrderReplace, scope.OrderCancel
	all := map[string]struct {
		members string
		steps   []step
	}{
		"at the bound": {sum, []step{{0, neu, "a", "", "100", "", 0}, {us, neu, "b", "", "100", "", 0}}},
		"above the bound": {sum, []step{{0, neu, "a", "", "100", "", 0}, {us, neu, "b", "", "101", verify.ReasonLimits, 0},
			{2 * us, neu, "c", "", "100", "", 0}, {3 * us, neu, "d", "", "1", verify.ReasonLimits, 0}}},
		"the window's edge": {sum, []step{{0, neu, "a", "", "200", "", 0}, {time.Second - us, neu, "b", "", "1", verify.ReasonLimits, 0}, {time.Second, neu, "c", "", "200", "", 0}}},
		"a cancel passes": {count, []step{{0, neu, "a", "", "1", "", 0}, {us, neu, "b", "", "1", "", 0}, {2 * us, neu, "c", "", "1", verify.ReasonLimits, 0},
			{3 * us, cancel, "d", "a", "", "", 0}}},
		"a replacement counts what it adds":                   {sum, []step{{0, neu, "a", "", "100", "", 0}, {us, replace, "b", "a", "200", "", 0}, {2 * us, neu, "c", "", "1", verify.ReasonLimits, 0}}},
		"a replacement of what is not known counts all of it": {sum, []step{{0, neu, "a", "", "100", "", 0}, {us, replace, "c", "b", "101", verify.ReasonLimits, 0}}},
		"arrival in another order": {sum, []step{{2 * us, replace, "b", "a", "200", "", 0}, {us, neu, "a", "", "150", "", 0}, // together 200
			{3 * us, neu, "c", "", "1", verify.ReasonLimits, 0}}},
		"an earlier one that makes a later one too much": {sum, []step{{5 * us, neu, "a", "", "200", "", 0}, {us, neu, "b", "", "1", verify.ReasonLimits, 0}}},
		"an earlier one before the later one's window":   {sum, []step{{time.Second, neu, "a", "", "200", "", 0}, {0, neu, "b", "", "200", "", 0}, {us, neu, "c", "", "1", verify.ReasonLimits, 0}}},
		"one earlier than what was refused": {sum, []step{{0, neu, "a", "", "200", "", 0}, {900 * time.Millisecond, neu, "b", "", "1", verify.ReasonLimits, 0}, {800 * time.Millisecond, neu, "c", "", "1", verify.ReasonLimits, 0},
			{time.Second, neu, "d", "", "200", "", 0}}},
		"the number of open orders is the signer's alone": {open, []step{{0, neu, "a", "", "1", "", 0}, {us, neu, "b", "", "1", "", 0}, {2 * us, neu, "c", "", "1", verify.ReasonLimits, 0}}},
		"the same order twice":                            {`"duplicate_window_ms":500`, []step{{0, neu, "a", "", "1", "", 0}, {499_999 * us, neu, "b", "", "1", verify.ReasonLimits, 0}, {500_000 * us, neu, "c", "", "1", "", 0}}},
	}
	stores := map[string]func(*testing.T) verify.ReplayStore{"memory": func(*testing.T) verify.ReplayStore { return verify.NewMemoryStore(1000, time.Time{}) }}
	stores["PostgreSQL"] = func(t *testing.T) verify.ReplayStore { return opened(t, shared(t)) }
	stores["SQLite"] = func(t *testing.T) verify.ReplayStore {
		file := filepath.Join(t.TempDir(), "seen.db")
		return opened(t, func() (*verify.SQLStore, error) { return verify.OpenSQLiteStore(context.Background(), file) })
	}
	for kind, store := range stores {
		for name, c := range all {
			t.Run(kind+"/"+name, func(t *testing.T) {
				v := newVenue(t)
				v.rescope(t, c.members)
				v.config.Replay = store(t)
				r := v.receiver(t)
				begin := time.Now().UTC().Truncate(us).Add(-10 * time.Second)
				for i, s := range c.steps {
					s.n = 1
					for _, other := range c.steps {
						if other.at < s.at {
							s.n++
						}
					}
					_, err := r.Verify(t.Context(), v.sent(t, begin, s), nil)
					if s.reason == "" && err != nil || s.reason != "" && !refusedWith(err, s.reason) {
						t.Errorf("step %d: got %v, want %q", i, err, s.reason)
					}
				}
			})
		}
	}
}

// race sends n orders for one slot at once to receivers, numbered from first on, and returns how many were accepted.
func race(t *testing.T, v *venue, receivers []*verify.Receiver, first, n int) int {
	t.Helper()
	begin := time.Now().UTC().Truncate(us)
	var accepted, limits atomic.Int64
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		jws := v.sent(t, begin, step{at: time.Duration(first+i) * us, kind: scope.OrderNew, id: fmt.Sprint(i), qty: "1"})
		wg.Go(func() {
			<-start
			_, err := receivers[i%len(receivers)].Verify(t.Context(), jws, nil)
			switch {
			case err == nil:
				accepted.Add(1)
			case errors.Is(err, &verify.Refusal{Reason: verify.ReasonLimits}):
				limits.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	close(start)
	wg.Wait()
	if int(accepted.Load()+limits.Load()) != n {
		t.Errorf("%d accepted and %d refused of %d", accepted.Load(), limits.Load(), n)
	}
	return int(accepted.Load())
}

const oneSlot = `"max_orders_per_window":[{"count":1,"window":{"rolling_s":3600}}]`

// TestRaceInMemory: of 64 orders for one slot exactly one is accepted.
func TestRaceInMemory(t *testing.T) {
	for range 20 {
		v := newVenue(t)
		v.rescope(t, oneSlot)
		if got := race(t, v, []*verify.Receiver{v.receiver(t)}, 0, 64); got != 1 {
			t.Fatalf("%d were accepted", got)
		}
	}
}

// TestRaceBetweenReceivers: so it is with several receivers on one store, and
// after all of them have started anew.
func TestRaceBetweenReceivers(t *testing.T) {
	for name, open := range durable(t) {
		t.Run(name, func(t *testing.T) {
			v := newVenue(t)
			for round := range 3 {
				v.rescope(t, oneSlot)
				v.agent = v.ca.Agent(t, fmt.Sprint("a", round), v.scope.Canonical(), nil)
				var receivers []*verify.Receiver
				var list []*verify.SQLStore
				for range 4 {
					s := opened(t, open)
					list = append(list, s)
					v.config.Replay = s
					receivers = append(receivers, v.receiver(t))
				}
				if got := race(t, v, receivers, 0, 64); got != 1 {
					t.Fatalf("round %d: %d were accepted", round, got)
				}
				for _, s := range list {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
				}
				v.config.Replay = opened(t, open)
				if got := race(t, v, []*verify.Receiver{v.receiver(t)}, 64, 4); got != 0 {
					t.Fatalf("round %d: %d more were accepted after a restart", round, got)
				}
			}
		})
	}
}

// TestReceiversShare: what one receiver accepted the others count and know.
func TestReceiversShare(t *testing.T) {
	for name, open := range durable(t) {
		t.Run(name, func(t *testing.T) {
			v := newVenue(t)
			v.rescope(t, `"max_notional_per_window":[{"currency":"EUR","amount":"10000","window":{"rolling_s":3600}}]`)
			begin := time.Now().UTC().Truncate(us)
			var receivers []*verify.Receiver
			for range 2 {
				v.config.Replay = opened(t, open)
				receivers = append(receivers, v.receiver(t))
			}
			store := v.config.Replay.(*verify.SQLStore)
			verifyAt := func(r int, jws []byte) error {
				_, err := receivers[r].Verify(t.Context(), jws, nil)
				return err
			}
			first := v.sent(t, begin, step{at: 3 * us, kind: scope.OrderNew, id: "a", qty: "100"})
			if err := verifyAt(0, first); err != nil {
				t.Fatal(err)
			}
			if err := verifyAt(1, first); !refusedWith(err, verify.ReasonReplay) {
				t.Errorf("the same at the other receiver: %v", err)
			}
			// It has the same counter, and another id.
			if err := verifyAt(1, v.sent(t, begin, step{at: 3 * us, kind: scope.OrderNew, id: "b", qty: "1"})); !refusedWith(err, verify.ReasonCounter) {
				t.Errorf("the same counter at the other receiver: %v", err)
			}
			if err := verifyAt(1, v.sent(t, begin, step{at: us, kind: scope.OrderNew, id: "c", qty: "101"})); !refusedWith(err, verify.ReasonLimits) {
				t.Errorf("an earlier one, too much with what the other has: %v", err)
			}
			if err := verifyAt(1, v.sent(t, begin, step{at: 2 * us, kind: scope.OrderNew, id: "d", qty: "100"})); err != nil {
				t.Errorf("an earlier one that fits: %v", err)
			}
			if err := verifyAt(0, v.sent(t, begin, step{at: 4 * us, kind: scope.OrderNew, id: "e", qty: "1"})); !refusedWith(err, verify.ReasonLimits) {
				t.Errorf("nothing is left at the first either: %v", err)
			}
			// What is kept is what arrived: it verifies again.
			payload, err := base64.RawURLEncoding.DecodeString(strings.Split(string(first), ".")[1])
			if err != nil {
				t.Fatal(err)
			}
			st, err := scope.ParseStatement(payload)
			if err != nil {
				t.Fatal(err)
			}
			if kept, err := store.Action(t.Context(), st.ID); err != nil || kept != string(first) {
				t.Errorf("the store has %.60q, %v", kept, err)
			}
			if kept, err := store.Action(t.Context(), newID()); err != nil || kept != "" {
				t.Errorf("of an action that never came the store has %.60q, %v", kept, err)
			}
		})
	}
}

// TestPostgreSQLGone: without its database a receiver accepts nothing, and goes
// on when the database is back.
func TestPostgreSQLGone(t *testing.T) {
	server := simulator.PostgreSQLForTest(t)
	open := storeIn(t, server, "inkan")
	v := newVenue(t)
	v.rescope(t, oneSlot)
	v.config.Replay = opened(t, open)
	r := v.receiver(t)
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Verify(t.Context(), []byte(v.action(t, nil)), nil); !refusedWith(err, verify.ReasonStore) {
		t.Errorf("without a database: %v", err)
	}
	accepted := func() (n int) {
		for range 20 { // the pool notices its dead connections one at a time
			if _, err := r.Verify(t.Context(), []byte(v.action(t, nil)), nil); err == nil {
				n++
			} else if !refusedWith(err, verify.ReasonStore) && !refusedWith(err, verify.ReasonLimits) {
				t.Error(err)
			}
		}
		return n
	}
	for i, end := range []func() error{server.Close, server.Kill} {
		if err := server.Restart(); err != nil {
			t.Fatal(err)
		}
		if n := accepted(); n != 1-i {
			t.Errorf("restart %d: %d were accepted", i, n)
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
	}
	if err := server.Restart(); err != nil {
		t.Fatal(err)
	}
	if n := accepted(); n != 0 {
		t.Errorf("after a crash %d were accepted", n)
	}
	if _, err := postgres.Open(t.Context(), "replay_db", "postgres://inkan:secret@/inkan?host="+server.Dir, ""); err == nil || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "replay_db_password_file") {
		t.Errorf("a password in the URL: %v", err)
	}
	execute(t, server, "UPDATE receiver SET version = 3")
	if _, err := open(); err == nil || !strings.Contains(err.Error(), "version 3") {
		t.Errorf("tables of another version: %v", err)
	}
}

// TestForgetsAtTheStart: what agents left behind that do not come any more is
// gone when a receiver starts.
func TestForgetsAtTheStart(t *testing.T) {
	for name, open := range durable(t) {
		t.Run(name, func(t *testing.T) {
			v := newVenue(t)
			s := opened(t, open)
			v.config.Replay, v.config.MaxAttestationAge = s, 48*time.Hour
			ids := make(map[time.Duration]string)
			for _, ago := range []time.Duration{0, 26 * time.Hour} {
				v.config.Now = func() time.Time { return time.Now().Add(-ago) }
				v.agent = v.ca.Agent(t, "a", v.scope.Canonical(), func(c *x509.Certificate) {
					c.NotBefore, c.NotAfter = time.Now().Add(-ago-time.Hour), time.Now().Add(-ago+time.Hour)
				})
				got, err := v.receiver(t).Verify(t.Context(), v.sent(t, time.Now().UTC().Truncate(us).Add(-ago), step{kind: scope.OrderNew, id: "a", qty: "1"}), nil)
				if err != nil {
					t.Fatal(err)
				}
				ids[ago] = got.Statement.ID
			}
			again := opened(t, open)
			for ago, id := range ids {
				if kept, err := again.Action(t.Context(), id); err != nil || (kept == "") != (ago > 0) {
					t.Errorf("of %s ago the store has %.60q, %v", ago, kept, err)
				}
			}
			v.config.Replay = again
			v.config.Now = nil
			v.agent = v.ca.Agent(t, "a", v.scope.Canonical(), nil)
			if _, err := v.receiver(t).Verify(t.Context(), []byte(v.action(t, nil)), nil); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestForgets: a day later there is room again, and what was kept is gone.
func TestForgets(t *testing.T) {
	stores := map[string]verify.ReplayStore{"memory": verify.NewMemoryStore(1, time.Time{})}
	for name, open := range durable(t) {
		stores[name] = opened(t, open)
	}
	for name, store := range stores {
		t.Run(name, func(t *testing.T) {
			v := newVenue(t)
			v.rescope(t, `"max_orders_per_window":[{"count":1,"window":{"rolling_s":86400}}]`)
			v.config.Replay, v.config.MaxAttestationAge = store, 48*time.Hour
			begin := time.Now().UTC().Truncate(us)
			first := v.sent(t, begin, step{kind: scope.OrderNew, id: "a", qty: "1"})
			got, err := v.receiver(t).Verify(t.Context(), first, nil)
			if err != nil {
				t.Fatal(err)
			}
			const later = 26 * time.Hour
			v.config.Now = func() time.Time { return time.Now().Add(later) }
			v.agent = v.ca.Agent(t, "a", v.scope.Canonical(), func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(later-time.Hour), time.Now().Add(later+time.Hour)
			})
			if _, err := v.receiver(t).Verify(t.Context(), v.sent(t, begin.Add(later), step{kind: scope.OrderNew, id: "b", qty: "1"}), nil); err != nil {
				t.Errorf("a day later: %v", err)
			}
			if s, ok := store.(*verify.SQLStore); ok {
				if kept, err := s.Action(t.Context(), got.Statement.ID); err != nil || kept != "" {
					t.Errorf("the store still has %.60q, %v", kept, err)
				}
			}
		})
	}
}

// TestPostgreSQLHangs: a database that takes connections and does not answer is one that
// does not work, for all that wait for it; when it goes on so does the receiver.
func TestPostgreSQLHangs(t *testing.T) {
	server := simulator.PostgreSQLForTest(t)
	v := newVenue(t)
	v.config.Replay = opened(t, storeIn(t, server, "inkan"))
	r := v.receiver(t)
	if _, err := r.Verify(t.Context(), []byte(v.action(t, nil)), nil); err != nil {
		t.Fatal(err)
	}
	signal := func(s syscall.Signal) {
		t.Helper()
		list, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			t.Fatal(err)
		}
		stopped := 0
		for _, file := range list {
			b, err := os.ReadFile(file)
			if err != nil {
				continue // it has ended
			}
			pid, parent := 0, 0
			if _, err := fmt.Sscanf(string(b[:bytes.IndexByte(b, ' ')]), "%d", &pid); err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Sscanf(string(b[bytes.LastIndexByte(b, ')')+1:]), " %s %d", new(string), &parent); err != nil {
				t.Fatal(err)
			}
			if parent == server.PID() || pid == server.PID() {
				stopped++
				if err := syscall.Kill(pid, s); err != nil {
					t.Fatal(err)
				}
			}
		}
		if stopped < 2 {
			t.Fatalf("%d processes of the server were found", stopped)
		}
	}
	signal(syscall.SIGSTOP)
	defer signal(syscall.SIGCONT)
	ended := make(chan error)
	for range 5 {
		compact := []byte(v.action(t, nil))
		go func() { _, err := r.Verify(context.Background(), compact, nil); ended <- err }()
	}
	limit := time.After(30 * time.Second)
	for range 5 {
		select {
		case err := <-ended:
			if !refusedWith(err, verify.ReasonStore) {
				t.Errorf("while it hangs: %v", err)
			}
		case <-limit:
			t.Fatal("requests wait for a database that hangs")
		}
	}
	signal(syscall.SIGCONT)
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		_, err := r.Verify(t.Context(), []byte(v.action(t, nil)), nil)
		if err == nil {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("when it goes on: %v", err)
		}
	}
}
