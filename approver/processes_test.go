package approver_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"inkan/attest"
	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/simulator"

	"inkan/approver"
)

// built is the directory of the command, if a test needed it.
var built string

// inkanCommand builds the command once for all tests of the package.
var inkanCommand = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "inkan")
	if err != nil {
		return "", err
	}
	built = dir
	path := filepath.Join(dir, "inkan")
	if out, err := exec.Command("go", "build", "-o", path, "inkan/cmd/inkan").CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return path, nil
})

// database is a server for the tests that leave it running, and each has its own
// database there.
var database struct {
	once   sync.Once
	server *simulator.PostgreSQL
	err    error
	count  atomic.Int64
}

// newDatabase makes a database and returns its server and its name.
func newDatabase(t *testing.T) (*simulator.PostgreSQL, string) {
	t.Helper()
	database.once.Do(func() {
		var dir string
		if dir, database.err = os.MkdirTemp("", "pg"); database.err == nil {
			database.server, database.err = simulator.StartPostgreSQL(context.Background(), dir)
		}
	})
	if database.err != nil {
		t.Fatal(database.err)
	}
	db := openDatabase(t, database.server, "inkan")
	name := fmt.Sprintf("test%d", database.count.Add(1))
	if _, err := db.ExecContext(t.Context(), "CREATE DATABASE "+name); err != nil {
		t.Fatal(err)
	}
	return database.server, name
}

func openDatabase(t *testing.T, p *simulator.PostgreSQL, name string) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", strings.Replace(p.URL(), "/inkan?", "/"+name+"?", 1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built != "" {
		_ = os.RemoveAll(built)
	}
	if p := database.server; p != nil {
		_ = p.Close() // it ends with this process anyway
		_ = os.RemoveAll(p.Dir)
	}
	os.Exit(code)
}

// house is what approvers' processes need: a CA, its revocation list on the
// network, and a database.
type house struct {
	ca  *testca.CA
	crl string // its URL
	dir string
	db  *simulator.PostgreSQL
	url string  // of the record
	sql *sql.DB // to look at what they wrote
}

// newHouse has no database.
func newHouse(t *testing.T, ca *testca.CA) *house {
	t.Helper()
	h := &house{ca: ca, dir: t.TempDir()}
	crl, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}, h.ca.Certificate, h.ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(crl) }))
	t.Cleanup(s.Close)
	h.crl = s.URL
	h.write(t, "ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.ca.Certificate.Raw}))
	return h
}

// databaseHouse is a house whose approvers share a record.
func databaseHouse(t *testing.T) *house {
	t.Helper()
	server, name := newDatabase(t)
	return houseOn(t, server, name)
}

func houseOn(t *testing.T, server *simulator.PostgreSQL, name string) *house {
	t.Helper()
	h := newHouse(t, testca.New(t))
	h.db, h.url, h.sql = server, "postgres://inkan@/"+name+"?host="+server.Dir, openDatabase(t, server, name)
	h.write(t, "password", []byte(server.Password+"\n"))
	return h
}

func (h *house) write(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(h.path(name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (h *house) path(name string) string { return filepath.Join(h.dir, name) }

// process is an approver's.
type process struct {
	dir  string
	key  *ecdsa.PublicKey
	area []byte // its TPMT_PUBLIC
	cmd  *exec.Cmd
	at   string
}

// approver makes an approver with its own key, on the shared record, and starts it.
func (h *house) approver(t *testing.T, name string, agents ...string) *process {
	t.Helper()
	return h.approverWith(t, name, agents, "--record", h.url, "--record-password-file", h.path("password"))
}

func (h *house) approverWith(t *testing.T, name string, agents []string, more ...string) *process {
	t.Helper()
	p := &process{dir: h.path(name)}
	args := append([]string{"approver", "init", "--dir", p.dir, "--trust-domain", "example.org", "--ca", h.path("ca.pem"), "--crl-url", h.crl, "--listen", "127.0.0.1:0"}, more...)
	for _, a := range agents {
		args = append(args, "--agent", a)
	}
	run(t, args...)
	b, err := os.ReadFile(filepath.Join(p.dir, "approver.pub.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	p.key = key.(*ecdsa.PublicKey)
	if p.area, err = attest.PolicyKeyPublic(p.key); err != nil {
		t.Fatal(err)
	}
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

// run runs the command to its end and returns what it prints.
func run(t *testing.T, args ...string) string {
	t.Helper()
	bin, err := inkanCommand()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("inkan %s: %v: %s", strings.Join(args, " "), err, errs.String())
	}
	return string(out)
}

// startDaemon starts the command as a daemon and reads the line of JSON with
// which it says that it is ready.
func startDaemon(ready any, args ...string) (*exec.Cmd, error) {
	bin, err := inkanCommand()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var log bytes.Buffer
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if err := json.NewDecoder(out).Decode(ready); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // how it ended is in its log
		return nil, fmt.Errorf("inkan %s did not start: %s", strings.Join(args, " "), log.String())
	}
	return cmd, nil
}

// start starts a daemon that ends with the test.
func start(t *testing.T, ready any, args ...string) {
	t.Helper()
	cmd, err := startDaemon(ready, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
}

func (p *process) start() (err error) {
	var ready approver.Addresses
	if p.cmd, err = startDaemon(&ready, "approver", "serve", "--config", filepath.Join(p.dir, "approver.yaml")); err == nil {
		p.at = "https://" + ready.Signers
	}
	return err
}

// kill ends it with SIGKILL.
func (p *process) kill() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait() // it was killed
}

// trader is an agent whose signer asks approvers' processes.
type trader struct {
	*desk
	http *http.Client
}

func (h *house) trader(t *testing.T, name string) *trader {
	t.Helper()
	d := &desk{ca: h.ca, name: name, limits: scopeJSON, book: scope.NewBook()}
	d.agent = d.certify(t, nil)
	client := d.tlsAgent(t, d.agent.ID)
	return &trader{d, &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64, TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, // which approver answers is seen by its authorization
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: [][]byte{client.Chain[0].Raw}, PrivateKey: client.Key}, nil
		},
	}}}}
}

// ask asks an approver, and checks an authorization as the TPM would.
func (x *trader) ask(ctx context.Context, p *process, at string, q *approver.Request) error {
	body, err := json.Marshal(q)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, at+"/v1/authorizations", bytes.NewReader(body))
	if err != nil {
		return err
	}
	res, err := x.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b)
	}
	var a attest.Authorization
	if err := json.Unmarshal(b, &a); err != nil {
		return err
	}
	return genuine(p.area, x.agent, &a, q)
}

// genuine checks that an authorization is for the command that signs what a
// receiver will verify, and for no other.
func genuine(area []byte, agent *testca.Agent, a *attest.Authorization, r *approver.Request) error {
	att, err := certext.ParseAttestation(agent.Chain[0])
	if err != nil {
		return err
	}
	name, err := hex.DecodeString(att.KeyName)
	if err != nil {
		return err
	}
	h, err := jws.NewHeader("ES256", agent.Chain, true)
	if err != nil {
		return err
	}
	return attest.VerifyAuthorization(area, a, r.Nonce, attest.SignCommandHash(name, sha256.Sum256(h.SigningInput(r.Statement))), policyRef)
}

// rule is the rule of a refusal; empty: it was none.
func rule(err error) string {
	if p, ok := err.(*problem.Problem); ok {
		return p.Rule
	}
	return ""
}

// TestRace: of 64 statements with one number, which are put to two approvers
// at once, one gets an authorization.
func TestRace(t *testing.T) {
	h := databaseHouse(t)
	both := []*process{h.approver(t, "a", "mm-07"), h.approver(t, "b", "mm-07")}
	x := h.trader(t, "mm-07")
	const rounds, racers = 20, 64
	for round := range rounds {
		// In the last rounds there is room for one more order in the window, and
		// each racer's order takes it.
		qty := "10"
		if round == rounds-1 {
			qty = "210" // 10,500 of the 20,000, of which 9,500 are used
		}
		list := make([][]byte, racers)
		for i := range list {
			list[i] = x.next(t, qty, nil)
		}
		errs := make([]error, racers)
		var wg sync.WaitGroup
		for i, b := range list {
			wg.Go(func() { errs[i] = x.ask(t.Context(), both[i%2], both[i%2].at, x.request(b)) })
		}
		wg.Wait()
		won := -1
		for i, err := range errs {
			switch {
			case err == nil && won >= 0:
				t.Fatalf("round %d: two authorizations for one number", round)
			case err == nil:
				won = i
			case rule(err) != string(approver.RuleFork):
				t.Fatalf("round %d: %v", round, err)
			}
		}
		if won < 0 {
			t.Fatalf("round %d: nothing was authorized", round)
		}
		x.write(t, list[won])
		// The other approver knows it: for another session it authorizes it too.
		if err := x.ask(t.Context(), both[(won+1)%2], both[(won+1)%2].at, x.request(list[won])); err != nil {
			t.Fatalf("round %d: the same statement by the other approver: %v", round, err)
		}
	}
	for _, p := range both {
		if err := x.ask(t.Context(), p, p.at, x.request(x.next(t, "1", nil))); rule(err) != string(scope.RuleNotionalWindow) {
			t.Errorf("an order above the sum: %v", err)
		}
	}
	h.audit(t, x)
}

// TestRaceForAllowance: each racer has its own statement, with a true claim of
// use or a false one, and there is room for one order.
func TestRaceForAllowance(t *testing.T) {
	h := databaseHouse(t)
	both := []*process{h.approver(t, "a", "mm-07"), h.approver(t, "b", "mm-07")}
	x := h.trader(t, "mm-07")
	first := x.write(t, x.next(t, "200", nil)) // 10,000 of 20,000, not authorized yet
	usage := x.next(t, "150", nil)             // 7,500
	claims, err := scope.ParseStatement(usage)
	if err != nil {
		t.Fatal(err)
	}
	x.write(t, usage)
	var chain [][]byte // each claims that only what was there at first is used
	for range 32 {
		b := x.next(t, "150", func(s *scope.Statement) { s.Decision.Utilisation = claims.Decision.Utilisation })
		chain = append(chain, x.write(t, b))
	}
	errs := make([]error, 64)
	var wg sync.WaitGroup
	for i := range errs {
		n := i / 2
		wg.Go(func() {
			p := both[i%2]
			errs[i] = x.ask(t.Context(), p, p.at, x.request(chain[n], append([][]byte{first, usage}, chain[:n]...)...))
		})
	}
	wg.Wait()
	for i, err := range errs {
		if r := rule(err); r != string(scope.RuleNotionalWindow) && r != string(approver.RuleUsage) {
			t.Errorf("order %d, which there was no room for: %v", i, err)
		}
	}
	if err := x.ask(t.Context(), both[0], both[0].at, x.request(usage, first)); err != nil {
		t.Errorf("the order that there was room for: %v", err)
	}
	h.audit(t, x)
}

// audit looks into the database: each agent's entries are one chain without gaps, and
// what was authorized of it keeps within the limits.
func (h *house) audit(t *testing.T, x *trader) (size int) {
	t.Helper()
	rows, err := h.sql.QueryContext(t.Context(), "SELECT counter, statement, authorized FROM entry WHERE agent = $1 ORDER BY counter", x.agent.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var previous scope.Digest
	var list []*scope.Statement
	var allowed []bool
	for rows.Next() {
		var counter, authorized int64
		var b []byte
		if err := rows.Scan(&counter, &b, &authorized); err != nil {
			t.Fatal(err)
		}
		st, err := scope.ParseStatement(b)
		if err != nil {
			t.Fatal(err)
		}
		if size++; counter != int64(size) || int64(st.Counter) != counter || st.Previous != previous {
			t.Fatalf("entry %d of %s does not follow the one before it", counter, x.agent.ID)
		}
		previous = sha256.Sum256(b)
		list, allowed = append(list, st), append(allowed, authorized > 0)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	book := scope.NewBook()
	for i, st := range list {
		if !allowed[i] {
			continue
		}
		if refusal := book.Check(x.scope(t), scope.UseOfStatement(st)); refusal != nil {
			t.Errorf("what was authorized of %s exceeds its limits: %v", x.agent.ID, refusal)
		}
		book.Replay(st)
	}
	var headSize int64
	var head []byte
	if err := h.sql.QueryRowContext(t.Context(), "SELECT size, previous FROM agent WHERE agent = $1", x.agent.ID).Scan(&headSize, &head); err != nil {
		t.Fatal(err)
	}
	if headSize != int64(size) || !bytes.Equal(head, previous[:]) {
		t.Errorf("the head of %s is not that of its last entry", x.agent.ID)
	}
	return size
}

// TestKilled: approvers and database are killed while four agents use up their
// allowance, each order in two versions at two approvers at once. What was
// released stands in the record, one version of each, and service resumes by itself.
func TestKilled(t *testing.T) {
	h := houseOn(t, simulator.PostgreSQLForTest(t), "inkan")
	names := []string{"mm-01", "mm-02", "mm-03", "mm-04"}
	a, b := h.approver(t, "a", names...), h.approver(t, "b", names...)
	var mu sync.RWMutex // of where the two listen, which changes with each start
	at := func(p *process) string { mu.RLock(); defer mu.RUnlock(); return p.at }
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	const each = 40 // orders of 500 fill the window
	var released, failed atomic.Int64
	var wg sync.WaitGroup
	for _, name := range names {
		x := h.trader(t, name)
		wg.Go(func() {
			out := make(map[uint64][][32]byte) // statements that were authorized, by their numbers
			for x.counter < each && ctx.Err() == nil {
				versions := [2][]byte{x.next(t, "10", nil), x.next(t, "10", nil)}
				won := -1
				for won < 0 && ctx.Err() == nil {
					var errs [2]error
					var pair sync.WaitGroup
					for i, p := range []*process{a, b} {
						pair.Go(func() { errs[i] = x.ask(ctx, p, at(p), x.request(versions[i])) })
					}
					pair.Wait()
					for i, err := range errs {
						switch r := rule(err); {
						case err == nil:
							released.Add(1)
							out[x.counter+1] = append(out[x.counter+1], sha256.Sum256(versions[i]))
							won = i
						case r == string(approver.RuleFork): // the other version is there
						case r == "" || r == string(approver.RuleRecord): // nobody is there, or not the database
							failed.Add(1)
						default:
							t.Errorf("%s: %v", name, err)
							return
						}
					}
				}
				if won < 0 {
					t.Errorf("%s stopped at order %d: service did not resume", name, x.counter+1)
					return
				}
				x.write(t, versions[won])
			}
			if size := h.audit(t, x); size != each {
				t.Errorf("%s has %d entries in the record, %d orders were authorized", name, size, each)
			}
			for n, sums := range out {
				for _, sum := range sums {
					if sum != sha256.Sum256(x.log[n-1]) {
						t.Errorf("%s: two versions of order %d were authorized", name, n)
					}
				}
				var authorized int
				if err := h.sql.QueryRowContext(ctx, "SELECT authorized FROM entry WHERE agent = $1 AND counter = $2 AND statement = $3", x.agent.ID, int64(n), x.log[n-1]).Scan(&authorized); err != nil || authorized < len(sums) {
					t.Errorf("%s: order %d was released %d times, the record has %d: %v", name, n, len(sums), authorized, err)
				}
			}
			for _, p := range []*process{a, b} {
				if err := x.ask(ctx, p, at(p), x.request(x.next(t, "1", nil))); rule(err) != string(scope.RuleNotionalWindow) {
					t.Errorf("%s: one more order: %v", name, err)
				}
			}
		})
	}
	restart := func(p *process) error {
		p.kill()
		mu.Lock()
		defer mu.Unlock()
		return p.start()
	}
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	steps := []func() error{
		func() error { return restart(a) },
		func() error { return firstError(h.db.Kill, h.db.Restart) },
		func() error { return restart(b) },
		func() error { // both at once
			a.kill()
			return firstError(h.db.Kill, h.db.Restart, func() error { return restart(a) })
		},
		func() error { return firstError(h.db.Close, h.db.Restart) },
		func() error { return restart(b) },
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for i, step := range steps {
		for released.Load() < int64(i+1)*15 {
			select {
			case <-tick.C:
				continue
			case <-ended:
				t.Fatalf("step %d: the agents have stopped after %d authorizations", i+1, released.Load())
			}
		}
		if err := step(); err != nil {
			t.Errorf("step %d: %v", i+1, err)
			cancel()
			break
		}
	}
	<-ended
	t.Logf("%d authorizations of %d orders, %d requests without an answer", released.Load(), len(names)*each, failed.Load())
	if failed.Load() == 0 {
		t.Error("nothing was under way when they were killed")
	}
}

func firstError(list ...func() error) error {
	for _, f := range list {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}
