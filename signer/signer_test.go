package signer_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sys/unix"

	"inkan/audit"
	"inkan/hsm"
	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/internal/testlog"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/simulator"
)

const scopeJSON = `{"allowed_actions":["order.new"],"allowed_instruments":[{"id":"isin:FR0000120271"}],"allowed_ord_types":["2"],"allowed_sides":["1"],"allowed_tif":["0"],"allowed_venues":["XPAR"],"max_order_notional":[{"amount":"25000","currency":"EUR"}],"version":1}`

func order(id string, changes ...string) []byte {
	return []byte(strings.NewReplacer(changes...).Replace(fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.new","ord":{"ClOrdID":"1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1","OrdType":"2","Price":"50","OrderQty":"100","Currency":"EUR","TimeInForce":"0"}}`, id)))
}

// TestMain lets the test binary be a caller of the signer: see runAs.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "hsm-worker" {
		if err := hsm.RunWorker(os.NewFile(3, "parent")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if mode := os.Getenv("INKAN_CALLER"); mode != "" {
		os.Exit(callerMain(mode, os.Getenv("INKAN_SOCKET")))
	}
	os.Exit(m.Run())
}

// callerMain is a process that calls the signer in one of several ways.
func callerMain(mode, socket string) int {
	switch mode {
	case "sign":
		return report(client.New(socket).SignJSON(context.Background(), order(client.NewID())))
	case "connect-then-exec": // connect as one program, ask as another
		c, err := net.Dial("unix", socket)
		if err != nil {
			return 1
		}
		f, err := c.(*net.UnixConn).File()
		if err != nil {
			return 1
		}
		if err := unix.Dup2(int(f.Fd()), 9); err != nil {
			return 1
		}
		other := os.Getenv("INKAN_OTHER")
		if err := os.Setenv("INKAN_CALLER", "ask-on-9"); err != nil {
			return 1
		}
		err = syscall.Exec(other, []string{other}, os.Environ())
		fmt.Println(err)
		return 1
	case "ask-on-9":
		return askOn(os.NewFile(9, "connection"))
	case "hand-over": // connect, give the connection away, end
		c, err := net.Dial("unix", socket)
		if err != nil {
			return 1
		}
		f, err := c.(*net.UnixConn).File()
		if err != nil {
			return 1
		}
		if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
			return 1
		}
		return 0
	}
	return 2
}

func report(s *client.Signed, err error) int {
	if err != nil {
		fmt.Println(err)
		return 3
	}
	fmt.Println("signed", s.ID)
	return 0
}

func askOn(f *os.File) int {
	body := order(client.NewID())
	fmt.Fprintf(f, "POST /v1/actions HTTP/1.1\r\nHost: signer\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	res, err := http.ReadResponse(bufio.NewReader(f), nil)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	b, _ := io.ReadAll(res.Body)
	fmt.Println(string(b))
	if res.StatusCode != 200 {
		return 3
	}
	return 0
}

// desk is a running signer.
type desk struct {
	dir    string
	socket string
	ca     *testca.CA
	agents map[string]*testca.Agent
	signer *signer.Signer
	log    *testlog.Lines
	end    func() // stops it; done anyway when the test ends
}

// self is the test binary; other is the same program as another file.
func executables(t *testing.T) (self, other string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "exe")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	other = filepath.Join(dir, "other")
	if err := os.WriteFile(other, append(b, 0), 0o755); err != nil {
		t.Fatal(err)
	}
	return self, other
}

func start(t testing.TB, agents string) *desk {
	t.Helper()
	return startWith(t, agents, nil, nil)
}

// startWith starts a signer with a renewer, and with agents that are there already.
func startWith(t testing.TB, agents string, renew signer.Renewer, known map[string]*testca.Agent) *desk {
	t.Helper()
	return startIn(t, agents, renew, known, nil)
}

// startIn is startWith with files in the state directory.
func startIn(t testing.TB, agents string, renew signer.Renewer, known map[string]*testca.Agent, state map[string][]byte) *desk {
	t.Helper()
	dir, err := os.MkdirTemp("", "signer") // short, for the socket; others may enter it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range state {
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "state"), 0o700), os.WriteFile(filepath.Join(dir, "state", name), content, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	d := &desk{dir: dir, socket: filepath.Join(dir, "run", "s"), ca: testca.New(t), agents: make(map[string]*testca.Agent)}
	config, err := signer.ParseConfig(fmt.Appendf(nil, "socket: run/s\nstate_dir: state\ntpm: none\nissuer: {url: 'https://localhost', ca: none}\nagents:\n%s", agents), dir)
	if err != nil {
		t.Fatal(err)
	}
	credentials := make(map[string]signer.Credentials)
	for _, a := range config.Agents {
		if k := known[a.Name]; k != nil && k.Chain == nil { // a key that wants a certificate
			known[a.Name] = d.ca.AgentWithKey(t, a.Name, []byte(scopeJSON), k.Key, nil)
		}
		if d.agents[a.Name] = known[a.Name]; d.agents[a.Name] == nil {
			d.agents[a.Name] = d.ca.Agent(t, a.Name, []byte(scopeJSON), nil)
		}
		credentials[a.Name] = signer.Credentials{Key: d.agents[a.Name].Key, Chain: d.agents[a.Name].Chain}
	}
	d.log = new(testlog.Lines)
	s, err := signer.Open(t.Context(), config, credentials, renew, slog.New(slog.NewTextHandler(d.log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	d.signer = s
	ctx, stop := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() { ended <- s.Serve(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	d.end = sync.OnceFunc(func() {
		stop()
		if err := errors.Join(<-ended, s.Close()); err != nil && !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	t.Cleanup(d.end)
	return d
}

func agent(name, executable string) string {
	return fmt.Sprintf("  - name: %s\n    callers:\n      - {user: \"%d\", executable: %s}\n", name, os.Getuid(), executable)
}

func (d *desk) runAs(t *testing.T, mode, executable string, change func(*exec.Cmd)) (string, int) {
	t.Helper()
	cmd := exec.Command(executable)
	cmd.Env = append(os.Environ(), "INKAN_CALLER="+mode, "INKAN_SOCKET="+d.socket)
	if change != nil {
		change(cmd)
	}
	out, err := cmd.CombinedOutput()
	if x, ok := errors.AsType[*exec.ExitError](err); ok {
		return string(out), x.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(out), 0
}

func TestCallers(t *testing.T) {
	self, other := executables(t)
	d := start(t, agent("a", self))
	if out, code := d.runAs(t, "sign", self, nil); code != 0 {
		t.Errorf("the agent was refused: %s", out)
	}
	refused := func(name, out string, code int) {
		t.Helper()
		if code != 3 || !strings.Contains(out, "caller") {
			t.Errorf("%s: exit code %d: %s", name, code, out)
		}
	}
	out, code := d.runAs(t, "sign", other, nil)
	refused("another executable", out, code)
	out, code = d.runAs(t, "connect-then-exec", self, func(c *exec.Cmd) { c.Env = append(c.Env, "INKAN_OTHER="+other) })
	refused("another executable after the connection", out, code)
	if os.Getuid() == 0 {
		// The same program as another user.
		out, code = d.runAs(t, "sign", self, func(c *exec.Cmd) {
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			c.Path, c.Args = other, []string{other}
		})
		refused("another user", out, code)
	}
	if head := d.entries(t, "a"); head != 1 {
		t.Errorf("the record has %d entries, want 1", head)
	}
}

// TestCallerThatEnded: a connection that outlives the process that opened it
// is of nobody.
func TestCallerThatEnded(t *testing.T) {
	self, _ := executables(t)
	d := start(t, agent("a", self))
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	if out, code := d.runAs(t, "hand-over", self, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{theirs} }); code != 0 {
		t.Fatalf("exit code %d: %s", code, out)
	}
	oob := make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), oob, 0)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		t.Fatal(err)
	}
	c := os.NewFile(uintptr(fds[0]), "connection")
	defer c.Close()
	body := order(client.NewID())
	fmt.Fprintf(c, "POST /v1/actions HTTP/1.1\r\nHost: signer\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusForbidden || !bytes.Contains(b, []byte(`"rule":"caller"`)) {
		t.Errorf("status %d: %s", res.StatusCode, b)
	}
}

// TestTwoAgents: each process is its own agent and cannot be the other.
func TestTwoAgents(t *testing.T) {
	self, other := executables(t)
	d := start(t, agent("a", self)+agent("b", other))
	for _, executable := range []string{self, self, other} {
		if out, code := d.runAs(t, "sign", executable, nil); code != 0 {
			t.Fatal(out)
		}
	}
	if a, b := d.entries(t, "a"), d.entries(t, "b"); a != 2 || b != 1 {
		t.Errorf("the records have %d and %d entries, want 2 and 1", a, b)
	}
}

func (d *desk) entries(t *testing.T, agent string) uint64 {
	t.Helper()
	s, err := audit.OpenSnapshot(t.Context(), filepath.Join(signer.AgentDir(filepath.Join(d.dir, "state"), agent), signer.LogFile))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	return s.Head.Size
}

func TestAPI(t *testing.T) {
	self, _ := executables(t)
	d := start(t, agent("a", self)) // the test itself is the agent
	c := client.New(d.socket)
	id := client.NewID()
	first, err := c.SignJSON(t.Context(), order(id))
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.SignJSON(t.Context(), order(id))
	if err != nil || again.Counter != first.Counter {
		t.Errorf("the same action again: %+v, %v", again, err)
	}
	for name, want := range map[string]struct {
		body   []byte
		status int
		rule   string
	}{
		"another action under the id": {order(id, `"100"`, `"99"`), http.StatusConflict, ""},
		"above the limit":             {order(client.NewID(), `"100"`, `"501"`), http.StatusForbidden, "max_order_notional"},
		"not JSON":                    {[]byte("{"), http.StatusBadRequest, "form"},
		"too large":                   {bytes.Repeat([]byte(" "), 1<<20), http.StatusBadRequest, "form"},
		"a digest to sign":            {[]byte(`{"digest":"00"}`), http.StatusBadRequest, "form"},
		"a second meaning":            {order(client.NewID(), `"Side":"1"`, `"Side":"1","Side":"2"`), http.StatusBadRequest, "form"},
	} {
		_, err := c.SignJSON(t.Context(), want.body)
		p, ok := errors.AsType[*problem.Problem](err)
		if !ok || p.Status != want.status || p.Rule != want.rule {
			t.Errorf("%s: got %v, want status %d and rule %q", name, err, want.status, want.rule)
		}
	}
	var info signer.AgentInfo
	if err := c.Get(t.Context(), "/v1/agent", &info); err != nil || info.ID != "spiffe://example.org/agent/a" || info.Scope != scopeJSON {
		t.Errorf("agent: %+v, %v", info, err)
	}
	var receipt signer.Receipt
	if err := c.Get(t.Context(), "/v1/receipts/"+id, &receipt); err != nil || receipt.Counter != first.Counter {
		t.Errorf("receipt: %+v, %v", receipt, err)
	}
	if err := c.Get(t.Context(), "/v1/receipts/"+client.NewID(), &receipt); err == nil {
		t.Error("a receipt for nothing")
	}
	if _, err := exec.LookPath("curl"); err != nil {
		t.Fatal("curl is missing: apt-get install curl")
	}
	// curl reaches it, and is nobody's agent.
	out, err := exec.Command("curl", "-s", "--unix-socket", d.socket, "http://signer/v1/agent").Output()
	if err != nil || !bytes.Contains(out, []byte(`"rule":"caller"`)) {
		t.Errorf("curl: %s, %v", out, err)
	}
}

// TestRenewal: a new certificate is used at once, and an old receipt does not
// get a signature under it.
func TestRenewal(t *testing.T) {
	self, _ := executables(t)
	d := start(t, agent("a", self))
	c := client.New(d.socket)
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	renewed := d.ca.AgentWithKey(t, "a", []byte(strings.Replace(scopeJSON, "25000", "100", 1)), d.agents["a"].Key, nil)
	if err := d.signer.Agent("a").SetChain(t.Context(), renewed.Chain); err != nil {
		t.Fatal(err)
	}
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err == nil || !strings.Contains(err.Error(), "max_order_notional") {
		t.Errorf("the new scope is not in force: %v", err)
	}
	if err := d.signer.Agent("a").SetChain(t.Context(), d.ca.Agent(t, "a", []byte(scopeJSON), nil).Chain); err == nil {
		t.Error("a certificate for another key was taken")
	}
}

func TestConfig(t *testing.T) {
	good := "socket: s\nstate_dir: d\ntpm: t\nissuer: {url: 'https://x', ca: c}\nagents: [{name: a, callers: [{user: '0', executable_sha256: '" + strings.Repeat("00", 32) + "'}]}]\n"
	if _, err := signer.ParseConfig([]byte(good), "/"); err != nil {
		t.Fatal(err)
	}
	for want, text := range map[string]string{
		"unknown member":            good + "color: blue\n",
		"socket is missing":         strings.Replace(good, "socket: s\n", "", 1),
		"agents is empty":           strings.Split(good, "agents:")[0] + "agents: []\n",
		"callers is empty":          strings.Split(good, "agents:")[0] + "agents: [{name: a, callers: []}]\n",
		"user is missing":           strings.Replace(good, "user: '0', ", "", 1),
		"lower-case letters":        strings.Replace(good, "name: a", "name: ../a", 1),
		"32 bytes in hex":           strings.Replace(good, strings.Repeat("00", 32), "xy", 1),
		"1s to 5m":                  strings.Replace(good, "name: a,", "name: a, statement_lifetime: 1h,", 1),
		"one process could be both": strings.Replace(good, "agents: [", "agents: [{name: b, callers: [{user: '0'}]}, ", 1),
		"stands twice":              strings.Replace(good, "agents: [", "agents: [{name: a, callers: [{user: '7'}]}, ", 1),
		"anchors and aliases":       good + "x: &a 1\n",
		"duplicate member":          good + "tpm: t\n",
	} {
		if _, err := signer.ParseConfig([]byte(text), "/"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want something about %q, got %v", want, err)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("socket: s\nstate_dir: d\ntpm: t\nissuer: {url: 'https://x', ca: c}\nagents: [{name: a, callers: [{user: '0'}]}]\n"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = signer.ParseConfig(b, "/nowhere") // it must not crash
	})
}

func TestReferencePrices(t *testing.T) {
	self, _ := executables(t)
	dir := t.TempDir()
	prices := filepath.Join(dir, "prices.json")
	write := func(price string) {
		now := time.Now().UTC().Add(-time.Second)
		b, _ := json.Marshal([]scope.ReferencePrice{{Instrument: "isin:FR0000120271", Price: decimal(t, price), Currency: "EUR", Source: "XPAR", Time: now},
			{Instrument: "isin:FR0000120271", Price: decimal(t, "55"), Currency: "USD", Source: "XPAR", Time: now}, {Instrument: "isin:FR0000120271", Price: decimal(t, "50"), Currency: "EUR", Source: "XLON", Time: now}})
		if err := os.WriteFile(prices, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("50")
	d := start(t, agent("a", self)+"    reference_prices: "+prices+"\n")
	collar := strings.Replace(scopeJSON, `"version":1`, `"price_collar_bps":{"bps":100,"max_age_ms":60000,"source":"XPAR"},"version":1`, 1)
	if err := d.signer.Agent("a").SetChain(t.Context(), d.ca.AgentWithKey(t, "a", []byte(collar), d.agents["a"].Key, nil).Chain); err != nil {
		t.Fatal(err)
	}
	c := client.New(d.socket)
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Errorf("at the reference price: %v", err)
	}
	write("40.5")
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err == nil || !strings.Contains(err.Error(), "price_collar_bps") {
		t.Errorf("after the reference price changed: %v", err)
	}
	if err := os.Remove(prices); err != nil {
		t.Fatal(err)
	}
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err == nil || !strings.Contains(err.Error(), "reference_missing") {
		t.Errorf("without the file: %v", err)
	}
}

func decimal(t *testing.T, s string) scope.Decimal {
	d, err := scope.ParseDecimal(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// BenchmarkAction is an action through the socket with a key in software: all
// that the signer adds to its device.
func BenchmarkAction(b *testing.B) {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	for _, device := range []string{"software", "SoftHSM"} {
		for _, clients := range []int{1, 16} {
			b.Run(fmt.Sprint(device, "/", clients), func(b *testing.B) {
				known := make(map[string]*testca.Agent)
				if device == "SoftHSM" {
					key := tokenKey(b)
					known["a"] = &testca.Agent{Key: key}
				}
				d := startWith(b, agent("a", self), nil, known)
				c := client.New(d.socket)
				b.SetParallelism(max(1, clients/runtime.GOMAXPROCS(0)))
				before := used(b)
				if clients == 1 {
					for b.Loop() {
						if _, err := c.SignJSON(b.Context(), order(client.NewID())); err != nil {
							b.Fatal(err)
						}
					}
				} else {
					b.RunParallel(func(pb *testing.PB) {
						for pb.Next() {
							if _, err := c.SignJSON(b.Context(), order(client.NewID())); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				b.ReportMetric(float64((used(b)-before).Nanoseconds())/float64(b.N), "cpu-ns/op") // the client's included
			})
		}
	}
}

// used is the processor time that this process has had.
func used(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// tokenKey is a key in a token of its own.
func tokenKey(b *testing.B) crypto.Signer {
	s := simulator.SoftHSMForTest(b)
	b.Setenv("SOFTHSM2_CONF", s.Config)
	token, err := hsm.Open(fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", s.Label, s.Module, s.PINFile), hsm.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = token.Close() })
	k, err := token.GenerateKey(hsm.P256, "a", nil)
	if err != nil {
		b.Fatal(err)
	}
	return k
}

// renewer issues the agent a new certificate each time it is asked.
type renewer struct {
	renew func() ([]*x509.Certificate, error)
	calls atomic.Int32
}

func (r *renewer) Renew(context.Context, string) ([]*x509.Certificate, time.Time, error) {
	r.calls.Add(1)
	chain, err := r.renew()
	return chain, time.Now().Add(time.Hour), err
}

// firstRetry is after what time a failed renewal is tried again.
const firstRetry = 5 * time.Second

// TestRenewalLoop: a certificate is renewed before its end, after failures
// too, and signing is not interrupted, though the new one is not valid at once.
func TestRenewalLoop(t *testing.T) {
	self, _ := executables(t)
	ca := testca.New(t)
	old := ca.Agent(t, "a", []byte(scopeJSON), func(c *x509.Certificate) { // two thirds of its life are over
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(20*time.Minute)
	})
	fresh := ca.AgentWithKey(t, "a", []byte(scopeJSON), old.Key, func(c *x509.Certificate) { // the clock is behind the issuer's
		c.NotBefore = time.Now().Add(firstRetry + 4*time.Second)
	})
	r := &renewer{}
	r.renew = func() ([]*x509.Certificate, error) {
		if r.calls.Load() == 1 {
			return nil, errors.New("the issuer is away")
		}
		return fresh.Chain, nil
	}
	d := startWith(t, agent("a", self), r, map[string]*testca.Agent{"a": old})
	c := client.New(d.socket)
	limit := time.After(30 * time.Second)
	for {
		if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
			t.Fatalf("signing was interrupted: %v", err)
		}
		var info signer.AgentInfo
		if err := c.Get(t.Context(), "/v1/agent", &info); err != nil {
			t.Fatal(err)
		}
		if info.NotAfter.Equal(fresh.Chain[0].NotAfter) {
			break
		}
		select {
		case <-limit:
			t.Fatal("the certificate was not renewed")
		case <-time.After(10 * time.Millisecond):
		}
	}
	if r.calls.Load() != 2 {
		t.Errorf("the issuer was asked %d times, want 2", r.calls.Load())
	}
}

// TestExpiredCertificate: without renewal nothing is signed after the end, and
// the refusal is in the record.
func TestExpiredCertificate(t *testing.T) {
	self, _ := executables(t)
	old := testca.New(t).Agent(t, "a", []byte(scopeJSON), func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Minute)
	})
	d := startWith(t, agent("a", self), nil, map[string]*testca.Agent{"a": old})
	if _, err := client.New(d.socket).SignJSON(t.Context(), order(client.NewID())); err == nil || !strings.Contains(err.Error(), "certificate_expired") {
		t.Errorf("got %v", err)
	}
	if n := d.entries(t, "a"); n != 1 {
		t.Errorf("the record has %d entries, want the refusal", n)
	}
}

// TestSignedReferencePrices: with a key, only prices that it signed count.
func TestSignedReferencePrices(t *testing.T) {
	self, _ := executables(t)
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	keyFile, prices := filepath.Join(dir, "key.pem"), filepath.Join(dir, "prices.jws")
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), 0o600); err != nil {
		t.Fatal(err)
	}
	write := func(by *ecdsa.PrivateKey, typ string) {
		s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: by}, (&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal([]scope.ReferencePrice{{Instrument: "isin:FR0000120271", Price: decimal(t, "50"), Currency: "EUR", Source: "XPAR", Time: time.Now().UTC().Add(-time.Second)}})
		if err != nil {
			t.Fatal(err)
		}
		o, err := s.Sign(b)
		if err != nil {
			t.Fatal(err)
		}
		text, err := o.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(prices, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(key, "reference-prices+jws")
	d := start(t, agent("a", self)+"    reference_prices: "+prices+"\n    reference_key: "+keyFile+"\n")
	collar := strings.Replace(scopeJSON, `"version":1`, `"price_collar_bps":{"bps":100,"max_age_ms":60000,"source":"XPAR"},"version":1`, 1)
	if err := d.signer.Agent("a").SetChain(t.Context(), d.ca.AgentWithKey(t, "a", []byte(collar), d.agents["a"].Key, nil).Chain); err != nil {
		t.Fatal(err)
	}
	c := client.New(d.socket)
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Errorf("signed prices: %v", err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, forge := range map[string]func(){
		"another key": func() { write(other, "reference-prices+jws") },
		"another typ": func() { write(key, "agent-action+jws") },
		"no JWS":      func() { _ = os.WriteFile(prices, []byte("[]"), 0o600) },
	} {
		forge()
		if _, err := c.SignJSON(t.Context(), order(client.NewID())); err == nil || !strings.Contains(err.Error(), "reference_missing") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStatus(t *testing.T) {
	self, _ := executables(t)
	d := start(t, agent("a", self)+"operators:\n  - {user: '12345'}\n")
	c := client.New(d.socket)
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	var s signer.Status
	err := c.Get(t.Context(), "/v1/status", &s)
	if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Rule != "caller" || !strings.Contains(p.Detail, "none of the operators") {
		t.Errorf("an agent asks for the operators' status: %v", err)
	}
	d = start(t, agent("a", self)+agent("b", "/bin/true"))
	c = client.New(d.socket)
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	if err := c.Get(t.Context(), "/v1/status", &s); err != nil {
		t.Fatal(err)
	}
	if len(s.Agents) != 2 || s.Agents[0].Name != "a" || s.Agents[0].Entries != 1 || s.Agents[1].Name != "b" || s.Agents[1].Entries != 0 || s.Agents[0].Error != "" {
		t.Errorf("status: %+v", s)
	}
}
