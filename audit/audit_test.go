package audit_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"inkan/audit"
	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/scope"
)

const scopeJSON = `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`

// desk is an agent with a log.
type desk struct {
	ca    *testca.CA
	agent *testca.Agent
	scope *scope.Scope
	id    audit.Identity
	path  string
	log   *audit.Log
}

func newDesk(t testing.TB) *desk {
	t.Helper()
	return newDeskWith(t, scopeJSON)
}

func newDeskWith(t testing.TB, scopeJSON string) *desk {
	t.Helper()
	d := &desk{ca: testca.New(t), path: filepath.Join(t.TempDir(), "log.db")}
	d.agent = d.ca.Agent(t, "a", []byte(scopeJSON), nil)
	var err error
	if d.scope, err = scope.ParseCanonical([]byte(scopeJSON)); err != nil {
		t.Fatal(err)
	}
	d.id = identity(d)
	d.open(t)
	if err := d.log.AddCertificate(t.Context(), d.agent.Chain); err != nil {
		t.Fatal(err)
	}
	return d
}

// identity is what stands in the desk's statements.
func identity(d *desk) audit.Identity {
	return audit.Identity{Issuer: "CN=Test CA", Agent: d.agent.ID, Certificate: sha256.Sum256(d.agent.Chain[0].Raw), Scope: d.scope.Hash(), Evidence: "00", AttestedAt: time.Now(), Lifetime: 30 * time.Second}
}

func (d *desk) open(t testing.TB) {
	t.Helper()
	var err error
	if d.log, err = audit.Open(context.Background(), d.path, audit.Options{}); err != nil {
		t.Fatal(err)
	}
	log := d.log
	t.Cleanup(func() { _ = log.Close() })
}

// id makes the n-th action id.
func id(n uint64) string {
	var b [16]byte
	binary.BigEndian.PutUint64(b[8:], n)
	return base64.RawURLEncoding.EncodeToString(b[:])
}

func action(n uint64, qty string) *scope.Action {
	a, err := scope.ParseAction(fmt.Appendf(nil, `{"id":%q,"aud":"XPAR","act":"order.new","ord":{"ClOrdID":"1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"50","OrderQty":%q,"Currency":"EUR","TimeInForce":"0"}}`, id(n), qty))
	if err != nil {
		panic(err)
	}
	return a
}

func permit(t testing.TB, s *scope.Scope, a *scope.Action) *scope.Permit {
	t.Helper()
	p, err := scope.Check(s, a, scope.Env{Now: time.Now(), AttestedAt: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (d *desk) record(t testing.TB, n uint64) *audit.Receipt {
	t.Helper()
	r, err := d.log.Record(context.Background(), permit(t, d.scope, action(n, "100")), d.id)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// sign signs a receipt and stores the signature.
func (d *desk) sign(t testing.TB, r *audit.Receipt) {
	t.Helper()
	statement, err := r.Spend()
	if err != nil {
		t.Fatal(err)
	}
	h, err := jws.NewHeader("ES256", d.agent.Chain, true)
	if err != nil {
		t.Fatal(err)
	}
	input := h.SigningInput(statement)
	sig, err := jws.Sign(d.agent.Key, input)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.log.Complete(r, jws.Compact(input, sig)); err != nil {
		t.Fatal(err)
	}
}

func (d *desk) verify(t testing.TB) (*audit.Report, error) {
	t.Helper()
	return audit.VerifyFile(context.Background(), d.path, audit.VerifyOptions{Roots: d.ca.Roots})
}

func TestRecordAndVerify(t *testing.T) {
	d := newDesk(t)
	for n := range uint64(20) {
		d.sign(t, d.record(t, n))
	}
	if err := d.log.Refuse(t.Context(), action(100, "501"), &scope.Refusal{Rule: scope.RuleOrderNotional, Message: "too much"}, d.id); err != nil {
		t.Fatal(err)
	}
	if err := d.log.Refuse(t.Context(), nil, &scope.Refusal{Rule: scope.RuleForm, Message: "not JSON"}, d.id); err != nil {
		t.Fatal(err)
	}
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := d.verify(t)
	if err != nil {
		t.Fatal(err)
	}
	if r.Entries != 22 || r.Permits != 20 || r.Signed != 20 || r.Denials != 2 {
		t.Errorf("report = %+v", r)
	}
	// Opened again, it goes on where it was.
	d.open(t)
	if got := d.record(t, 21).Counter(); got != 23 {
		t.Errorf("the next entry is %d, want 23", got)
	}
}

func TestReceiptIsSpentOnce(t *testing.T) {
	d := newDesk(t)
	r := d.record(t, 1)
	if _, err := r.Spend(); err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]*audit.Receipt{"spent": r, "zero": {}, "nil": nil} {
		if _, err := x.Spend(); !errors.Is(err, audit.ErrSpent) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := d.log.Record(t.Context(), &scope.Permit{}, d.id); err == nil {
		t.Error("a permit that Check did not make was recorded")
	}
	if _, err := d.log.Record(t.Context(), nil, d.id); err == nil {
		t.Error("no permit was recorded")
	}
}

func TestIdempotency(t *testing.T) {
	d := newDesk(t)
	first := d.record(t, 1)
	want, err := first.Spend()
	if err != nil {
		t.Fatal(err)
	}
	again := d.record(t, 1)
	got, err := again.Spend()
	if err != nil || !again.Repeated() || string(got) != string(want) {
		t.Errorf("the same action again: %v, repeated %v", err, again.Repeated())
	}
	if _, err := d.log.Record(t.Context(), permit(t, d.scope, action(1, "99")), d.id); !errors.Is(err, audit.ErrConflict) {
		t.Errorf("the id with another action: %v", err)
	}
	refusal := &scope.Refusal{Rule: scope.RuleTradingWindow, Message: "closed"}
	if err := d.log.Refuse(t.Context(), action(2, "1"), refusal, d.id); err != nil {
		t.Fatal(err)
	}
	if _, err := d.log.Record(t.Context(), permit(t, d.scope, action(2, "1")), d.id); !errors.Is(err, &scope.Refusal{Rule: scope.RuleTradingWindow}) {
		t.Errorf("an action that was refused before: %v", err)
	}
	if d.log.Head().Size != 2 {
		t.Errorf("the record has %d entries, want 2", d.log.Head().Size)
	}
}

func TestOneProcess(t *testing.T) {
	d := newDesk(t)
	if _, err := audit.Open(t.Context(), d.path, audit.Options{}); !errors.Is(err, audit.ErrInUse) {
		t.Errorf("a second one: %v", err)
	}
}

func TestTimeDoesNotGoBack(t *testing.T) {
	d := newDesk(t)
	d.record(t, 1)
	last := d.log.Head().Time
	p, err := scope.Check(d.scope, action(2, "1"), scope.Env{Now: time.Now().Add(-time.Hour), AttestedAt: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.log.Record(t.Context(), p, d.id); err != nil {
		t.Fatal(err)
	}
	if now := d.log.Head().Time; now.Before(last) {
		t.Errorf("time went back from %v to %v", last, now)
	}
}

// TestTampering changes a closed log in one way each; the check must say so.
func TestTampering(t *testing.T) {
	for name, change := range map[string]struct{ sql, want string }{
		"a changed quantity":            {`UPDATE leaf SET statement = CAST(replace(CAST(statement AS TEXT), '"100"', '"101"') AS BLOB) WHERE counter = 3`, "entry 3: "},
		"a removed entry":               {`DELETE FROM leaf WHERE counter = 3`, "it is missing"},
		"a removed tail":                {`DELETE FROM leaf WHERE counter = 5`, "the head says 5 entries, 4 are there"},
		"a tail removed with the head":  {`DELETE FROM leaf WHERE counter = 5; UPDATE head SET size = 4`, "head"},
		"entries in another order":      {`UPDATE leaf SET counter = 99 WHERE counter = 2; UPDATE leaf SET counter = 2 WHERE counter = 3; UPDATE leaf SET counter = 3 WHERE counter = 99`, "entry 2"},
		"a signature of another entry":  {`UPDATE signature SET signature = (SELECT signature FROM signature WHERE counter = 2) WHERE counter = 3`, "entry 3: "},
		"a certificate that is gone":    {`DELETE FROM certificate`, "its certificate is not in the record"},
		"another root":                  {`UPDATE head SET root = zeroblob(32)`, "root"},
		"a denial turned into a permit": {`UPDATE leaf SET statement = CAST(replace(replace(CAST(statement AS TEXT), '"dec":"deny"', '"dec":"permit"'), ',"msg":"too much"', '') AS BLOB) WHERE counter = 5`, "entry 5"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t)
			for n := range uint64(4) {
				d.sign(t, d.record(t, n))
			}
			if err := d.log.Refuse(t.Context(), action(100, "501"), &scope.Refusal{Rule: scope.RuleOrderNotional, Message: "too much"}, d.id); err != nil {
				t.Fatal(err)
			}
			if err := d.log.Close(); err != nil {
				t.Fatal(err)
			}
			db, err := sql.Open("sqlite", d.path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := db.Exec(change.sql); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			_, err = d.verify(t)
			if _, ok := errors.AsType[*audit.Unproven](err); !ok || !strings.Contains(err.Error(), change.want) {
				t.Errorf("got %v, want something about %q", err, change.want)
			}
		})
	}
}

func TestAnotherCA(t *testing.T) {
	d := newDesk(t)
	d.sign(t, d.record(t, 1))
	if _, err := audit.VerifyFile(t.Context(), d.path, audit.VerifyOptions{Roots: testca.New(t).Roots}); err == nil || !strings.Contains(err.Error(), "does not chain to the CA") {
		t.Errorf("got %v", err)
	}
}

// TestOutOfScope: an entry that the scope did not allow does not verify, even
// if it is signed and in its place.
func TestOutOfScope(t *testing.T) {
	d := newDesk(t)
	wide, err := scope.Parse([]byte(strings.Replace(scopeJSON, "25000", "99999", 1)))
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.log.Record(t.Context(), permit(t, wide, action(1, "1000")), d.id)
	if err != nil {
		t.Fatal(err)
	}
	d.sign(t, r)
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.verify(t); err == nil || !strings.Contains(err.Error(), "out of scope") {
		t.Errorf("got %v", err)
	}
}

// The fault tests run this test binary as a child that records as fast as it
// can and prints each number once it is acknowledged.
const childEnv = "INKAN_AUDIT_CHILD"

// readerEnv has the test binary read a record, as another user.
const readerEnv = "INKAN_AUDIT_READER"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		os.Exit(child(path))
	}
	if path := os.Getenv(readerEnv); path != "" {
		s, err := audit.OpenSnapshot(context.Background(), path)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		for e, err := range s.Entries(context.Background()) {
			fmt.Println(e.Counter, err)
		}
		s.Close()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(path string) int {
	l, err := audit.Open(context.Background(), path, audit.Options{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	s, err := scope.ParseCanonical([]byte(scopeJSON))
	if err != nil {
		return 1
	}
	from := l.Head().Size
	var mu sync.Mutex
	next, failed := from, false
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				mu.Lock()
				n := next
				next++
				stop := failed || n > from+4000
				mu.Unlock()
				if stop {
					return
				}
				p, err := scope.Check(s, action(n, "100"), scope.Env{Now: time.Now(), AttestedAt: time.Now()})
				if err != nil {
					return
				}
				if _, err := l.Record(context.Background(), p, audit.Identity{Agent: "spiffe://example.org/agent/a", Lifetime: time.Second}); err != nil {
					mu.Lock()
					failed = true
					mu.Unlock()
					fmt.Println("failed", err)
					return
				}
				mu.Lock()
				fmt.Println("recorded", n)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	_ = l.Close()
	return 0
}

// run starts the child, perhaps below another program, lets it acknowledge
// for a while, and returns what it acknowledged and whether it said it failed.
func run(t *testing.T, path string, killAfter int, below ...string) (acknowledged []uint64, failed bool) {
	t.Helper()
	args := append(below, os.Args[0])
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), childEnv+"="+path)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for sc := bufio.NewScanner(out); sc.Scan(); {
		var n uint64
		if _, err := fmt.Sscanf(sc.Text(), "recorded %d", &n); err == nil {
			acknowledged = append(acknowledged, n)
		} else if strings.HasPrefix(sc.Text(), "failed") {
			failed = true
		}
		if killAfter > 0 && len(acknowledged) == killAfter {
			if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // it was killed, or ended as it should
	return acknowledged, failed
}

// holds checks that the log opens, agrees with itself, and has every
// acknowledged entry once.
func holds(t *testing.T, path string, acknowledged map[uint64]bool) {
	t.Helper()
	l, err := audit.Open(t.Context(), path, audit.Options{})
	if err != nil {
		t.Fatalf("after the fault: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := audit.OpenSnapshot(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	seen := make(map[string]int)
	var previous [32]byte
	size := uint64(0)
	for e, err := range s.Entries(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		st, err := scope.ParseStatement(e.Statement)
		if err != nil {
			t.Fatal(err)
		}
		if size++; e.Counter != size || [32]byte(st.Previous) != previous {
			t.Fatalf("entry %d does not follow", e.Counter)
		}
		previous = sha256.Sum256(e.Statement)
		seen[st.ID]++
	}
	for n := range acknowledged {
		if seen[id(n)] != 1 {
			t.Errorf("action %d was acknowledged and stands in the record %d times", n, seen[id(n)])
		}
	}
}

// TestKill: kill -9 at any moment loses nothing that was acknowledged.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	all := make(map[uint64]bool)
	for i := range 8 {
		got, _ := run(t, path, 1+i*37)
		for _, n := range got {
			all[n] = true
		}
		holds(t, path, all)
	}
	if len(all) < 100 {
		t.Errorf("only %d actions were acknowledged: the test shows little", len(all))
	}
}

// TestIOErrors: whichever write or sync fails, nothing is acknowledged that is
// not on disk, and the log refuses from then on.
func TestIOErrors(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Fatal("strace is missing: apt-get install strace")
	}
	for _, fault := range []string{"fdatasync:error=EIO:when=20+", "fdatasync:error=EIO:when=30", "pwrite64:error=EIO:when=200+", "pwrite64:error=ENOSPC:when=333+", "pwrite64:error=EIO:when=401"} {
		t.Run(fault, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log.db")
			all := make(map[uint64]bool)
			got, failed := run(t, path, 0, "strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject="+fault)
			for _, n := range got {
				all[n] = true
			}
			if !failed || len(got) == 0 {
				t.Errorf("failed %v, %d were acknowledged: the fault did not show", failed, len(got))
			}
			holds(t, path, all)
		})
	}
}

// TestFullDisk: a file that cannot grow makes a refusal, not a loss.
func TestFullDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log.db")
	got, failed := run(t, path, 0, "sh", "-c", "trap '' XFSZ; ulimit -f 300; exec \"$0\"")
	if !failed || len(got) == 0 {
		t.Errorf("%d were acknowledged, failed %v: the disk was not full", len(got), failed)
	}
	all := make(map[uint64]bool)
	for _, n := range got {
		all[n] = true
	}
	holds(t, path, all)
}

// windowed is the scope with a limit over time.
func windowed(t testing.TB, limit string) []byte {
	t.Helper()
	s, err := scope.Parse([]byte(strings.Replace(scopeJSON, `"version":1`, limit+`,"version":1`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	return s.Canonical()
}

func newWindowedDesk(t testing.TB, limit string) *desk {
	t.Helper()
	d := newDesk(t)
	d.agent = d.ca.Agent(t, "a", windowed(t, limit), nil)
	var err error
	if d.scope, err = scope.ParseCanonical(windowed(t, limit)); err != nil {
		t.Fatal(err)
	}
	d.id.Agent, d.id.Certificate, d.id.Scope = d.agent.ID, sha256.Sum256(d.agent.Chain[0].Raw), d.scope.Hash()
	if err := d.log.AddCertificate(t.Context(), d.agent.Chain); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestRaceForOneSlot: of 64 orders that race for one slot exactly one wins.
func TestRaceForOneSlot(t *testing.T) {
	for round := range 20 {
		d := newWindowedDesk(t, `"max_orders_per_window":[{"count":1,"window":{"rolling_s":60}}]`)
		var wg sync.WaitGroup
		won, refused := make(chan *audit.Receipt, 64), make(chan error, 64)
		for n := range uint64(64) {
			p := permit(t, d.scope, action(n, "1"))
			wg.Go(func() {
				r, err := d.log.Record(context.Background(), p, d.id)
				if err == nil {
					won <- r
				} else {
					refused <- err
				}
			})
		}
		wg.Wait()
		if len(won) != 1 || len(refused) != 63 {
			t.Fatalf("round %d: %d won, %d were refused", round, len(won), len(refused))
		}
		if err := <-refused; !errors.Is(err, &scope.Refusal{Rule: scope.RuleOrdersWindow}) {
			t.Fatalf("refused by %v", err)
		}
		d.sign(t, <-won)
		if err := d.log.Close(); err != nil {
			t.Fatal(err)
		}
		if r, err := d.verify(t); err != nil || r.Permits != 1 || r.Denials != 63 {
			t.Fatalf("%+v, %v", r, err)
		}
	}
}

// TestWindowsSurviveARestart: what was used counts after the log is opened anew.
func TestWindowsSurviveARestart(t *testing.T) {
	d := newWindowedDesk(t, `"max_notional_per_window":[{"currency":"EUR","amount":"10000","window":{"rolling_s":3600}}]`)
	d.sign(t, d.record(t, 1)) // 5000
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	d.open(t)
	second := d.record(t, 2) // at the bound
	if _, err := d.log.Record(t.Context(), permit(t, d.scope, action(3, "0.1")), d.id); !errors.Is(err, &scope.Refusal{Rule: scope.RuleNotionalWindow}) {
		t.Fatalf("above the bound: %v", err)
	}
	// The same orders again are no second debit, and a repeated refusal is the same.
	if again := d.record(t, 2); !again.Repeated() || again.Counter() != second.Counter() {
		t.Error("an order that was recorded is another one the second time")
	}
	if _, err := d.log.Record(t.Context(), permit(t, d.scope, action(3, "0.1")), d.id); !errors.Is(err, &scope.Refusal{Rule: scope.RuleNotionalWindow}) {
		t.Errorf("a refused order the second time: %v", err)
	}
	d.sign(t, second)
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.verify(t); err != nil {
		t.Error(err)
	}
}

// TestWindowInTheRecord: a record in which a limit over time was not held does
// not verify, even if every entry is signed and in its place.
func TestWindowInTheRecord(t *testing.T) {
	d := newWindowedDesk(t, `"max_notional_per_window":[{"currency":"EUR","amount":"6000","window":{"rolling_s":3600}}]`)
	wide, err := scope.Parse([]byte(scopeJSON))
	if err != nil {
		t.Fatal(err)
	}
	for n := range uint64(2) { // a signer that is lying about its scope
		r, err := d.log.Record(t.Context(), permit(t, wide, action(n, "100")), d.id)
		if err != nil {
			t.Fatal(err)
		}
		d.sign(t, r)
	}
	if err := d.log.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.verify(t); err == nil {
		t.Error("it verifies")
	}
}

// TestMovedPermit: a permit whose statement gets a later time than it was
// checked for is checked again for that.
func TestMovedPermit(t *testing.T) {
	for name, c := range map[string]struct {
		limit string
		end   time.Duration // of the certificate, after the earlier moment
		rule  scope.Rule
	}{
		"past the scope's end":       {`"not_after":"2100-01-01T00:00:00Z"`, 0, scope.RuleNotAfter},
		"past the certificate's end": {`"not_after":"2101-01-01T00:00:00Z"`, time.Minute, scope.RuleCertificateExpired},
	} {
		t.Run(name, func(t *testing.T) {
			d := newWindowedDesk(t, c.limit)
			early := time.Date(2099, 12, 31, 23, 59, 0, 0, time.UTC)
			if c.end != 0 {
				d.id.NotAfter = early.Add(c.end)
			}
			wide, err := scope.Parse([]byte(scopeJSON))
			if err != nil {
				t.Fatal(err)
			}
			at := func(s *scope.Scope, n uint64, now time.Time) (*audit.Receipt, error) {
				p, err := scope.Check(s, action(n, "1"), scope.Env{Now: now, AttestedAt: now})
				if err != nil {
					t.Fatal(err)
				}
				id := d.id
				if s == wide {
					id.NotAfter = time.Time{}
				}
				return d.log.Record(t.Context(), p, id)
			}
			if _, err := at(wide, 1, early.Add(time.Hour)); err != nil { // the clock is ahead
				t.Fatal(err)
			}
			if _, err := at(d.scope, 2, early); !errors.Is(err, &scope.Refusal{Rule: c.rule}) { // and was set back
				t.Errorf("got %v, want %s", err, c.rule)
			}
		})
	}
}
