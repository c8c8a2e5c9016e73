package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"inkan/hsm"
	"inkan/internal/caller"
	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/internal/testlog"
	"inkan/scope"
	"inkan/simulator"
	"inkan/wire"
	"inkan/wire/proxy"
)

// TestMain is the worker of package hsm too.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "hsm-worker" {
		fmt.Fprintln(os.Stderr, hsm.RunWorker(os.NewFile(3, "parent")))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// bench is an agent's state with its key in SoftHSM, and servers.
type bench struct {
	ca     *testca.CA
	dir    string
	key    crypto.PublicKey
	uri    string
	server *httptest.Server // echoes, and says what it saw
	raw    net.Listener     // echoes bytes
	scope  string
}

const oneScope = `{"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"destinations":[{"host":"127.0.0.1","port":%s},{"host":"localhost","port":%s,"server_name":"venue.example.org"}],"version":1}`

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{ca: testca.New(t), dir: t.TempDir()}
	s := simulator.SoftHSMForTest(t)
	t.Setenv("SOFTHSM2_CONF", s.Config)
	b.uri = fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", s.Label, s.Module, s.PINFile)
	token, err := hsm.Open(b.uri, hsm.Options{})
	if err != nil {
		t.Fatal(err)
	}
	k, err := token.GenerateKey(hsm.P256, "tls", []byte{7})
	if err != nil {
		t.Fatal(err)
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	b.key, b.uri = k.Public(), strings.Replace(b.uri, "?", ";id=%07?", 1)

	b.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		w.Header().Set("Saw", fmt.Sprintf("%s %s host=%s coding=%q action=%q by=%s", r.Method, r.RequestURI, r.Host, r.Header.Get("Content-Encoding"), r.Header.Values("Agent-Action"), r.TLS.PeerCertificates[0].URIs[0]))
		w.Header().Set("Sum", fmt.Sprintf("%x", sha256.Sum256(body)))
		_, _ = w.Write(body) // the client may be gone
	}))
	b.server.TLS, b.server.Config.ErrorLog = b.serverTLS(t), log.New(io.Discard, "", 0)
	b.server.StartTLS()
	t.Cleanup(b.server.Close)
	if b.raw, err = tls.Listen("tcp", "127.0.0.1:0", b.serverTLS(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.raw.Close() })
	go func() {
		for {
			c, err := b.raw.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c) // to its end, whatever that is
				_ = c.(*tls.Conn).CloseWrite()
			}()
		}
	}()
	b.scope = fmt.Sprintf(oneScope, portOf(b.server.Listener), portOf(b.raw))
	b.write(t, b.scope)
	return b
}

// refusing is an address that refuses connections: a socket has it, so nobody
// else gets it meanwhile, and does not listen.
func refusing(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(at.(*syscall.SockaddrInet4).Port))
}

func portOf(l net.Listener) string { return strconv.Itoa(l.Addr().(*net.TCPAddr).Port) }

func (b *bench) write(t *testing.T, text string) {
	t.Helper()
	s, err := scope.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	b.ca.State(t, b.dir, "a", s.Canonical(), b.key, []byte("{}"))
}

func (b *bench) serverTLS(t *testing.T) *tls.Config {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := b.ca.TLS(t, "", k.Public(), []string{"127.0.0.1", "venue.example.org"}, nil)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: k}}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: b.ca.Roots}
}

// running is a proxy that serves.
type running struct {
	at       string // host:port, or a path
	identity *wire.Identity
	log      *testlog.Lines
	metrics  *proxy.Metrics
	stop     func() error
}

// start parses a listener's configuration and serves it.
func (b *bench) start(t *testing.T, listener string) *running {
	t.Helper()
	c, err := proxy.ParseConfig(fmt.Appendf(nil, "state_dir: %s\nca: x\nserver_ca: x\nagents:\n  - name: a\n    tls_key: %q\n    listeners:\n      - %s\n", b.dir, b.uri, listener), "/")
	if err != nil {
		t.Fatal(err)
	}
	i, err := wire.Open(wire.Options{Dir: b.dir, Roots: b.ca.Roots, Key: b.uri})
	if err != nil {
		t.Fatal(err)
	}
	owners, err := caller.NewOwners()
	if err != nil {
		t.Fatal(err)
	}
	config := &c.Agents[0].Listeners[0]
	l, err := config.Open()
	if err != nil {
		t.Fatal(err)
	}
	m := proxy.NewMetrics(map[string]*wire.Identity{"a": i})
	said := new(testlog.Lines)
	p := proxy.New(config, "a", i.Dialer(b.ca.Roots), owners, m, slog.New(slog.NewTextHandler(said, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Serve(ctx, l) }()
	stop := sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() {
		if err := stop(); err != nil && !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serving: %v", err)
		}
		_, _ = i.Close(), owners.Close()
	})
	return &running{l.Addr().String(), i, said, m, stop}
}

func me() string { return strconv.Quote(strconv.Itoa(os.Getuid())) }

func (r *running) client(forward bool) *http.Client {
	t := &http.Transport{DisableCompression: true}
	if forward {
		t.Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: r.at})
	}
	return &http.Client{Transport: t}
}

func (r *running) metric(t *testing.T) string {
	t.Helper()
	w := httptest.NewRecorder()
	r.metrics.Server().Handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	return w.Body.String()
}

func do(t *testing.T, c *http.Client, method, url string, body []byte, header http.Header) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, b
}

// TestForward: what the server gets is what the agent sent, by either way of
// naming the server, and the device signs once.
func TestForward(t *testing.T) {
	b := newBench(t)
	body := []byte("{\"a\": 1}\r\n\x00\xff")
	to := b.server.Listener.Addr().String()
	for _, x := range []struct {
		name, listener, url string
		forward             bool
		host                string
	}{
		{"absolute form", "{listen: \"127.0.0.1:0\", protocol: http, callers: [{user: %s}]}", "http://" + to, true, ""},
		{"Host", "{listen: \"127.0.0.1:0\", protocol: http, callers: [{user: %s}]}", "", false, to},
		{"upstream", "{listen: \"127.0.0.1:0\", protocol: http, upstream: \"" + to + "\", callers: [{user: %s}]}", "", false, ""},
		{"upstream, absolute form", "{listen: \"127.0.0.1:0\", protocol: http, upstream: \"" + to + "\", callers: [{user: %s}]}", "http://" + to, true, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			r := b.start(t, fmt.Sprintf(x.listener, me()))
			at := x.url
			if at == "" {
				at = "http://" + r.at
			}
			for range 20 {
				req, err := http.NewRequest(http.MethodPost, at+"/orders/a%2Fb?x=1;y&z", bytes.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				req.Host = x.host
				req.Header = http.Header{"Agent-Action": {"one", "two"}, "Content-Encoding": {"x-own"}, "Te": {"trailers"}}
				res, err := r.client(x.forward).Do(req)
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(res.Body)
				if err != nil || res.StatusCode != http.StatusOK || !bytes.Equal(got, body) {
					t.Fatalf("%s: %q, %v", res.Status, got, err)
				}
				_ = res.Body.Close()
				want := fmt.Sprintf(`POST /orders/a%%2Fb?x=1;y&z host=%s coding="x-own" action=["one" "two"] by=spiffe://example.org/agent/a`, to)
				if saw := res.Header.Get("Saw"); saw != want {
					t.Fatalf("the server saw %s, want %s", saw, want)
				}
			}
			if n := r.identity.Signatures(); n != 1 {
				t.Errorf("20 requests took %d signatures", n)
			}
		})
	}
}

// TestBodies: large, chunked and empty bodies arrive as they are.
func TestBodies(t *testing.T) {
	b := newBench(t)
	r := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, upstream: %q, max_body: 4194304, callers: [{user: %s}]}`, b.server.Listener.Addr(), me()))
	large := make([]byte, 4<<20)
	_, _ = rand.Read(large) // never fails
	for _, body := range [][]byte{nil, []byte("x"), large} {
		for _, chunked := range []bool{false, true} {
			var in io.Reader = bytes.NewReader(body)
			if chunked {
				in = io.MultiReader(in)
			}
			res, err := r.client(false).Post("http://"+r.at+"/", "application/octet-stream", in)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(res.Body)
			if err != nil || !bytes.Equal(got, body) || res.Header.Get("Sum") != fmt.Sprintf("%x", sha256.Sum256(body)) {
				t.Errorf("%d bytes, chunked %v: %d came back, %v", len(body), chunked, len(got), err)
			}
			_ = res.Body.Close()
		}
	}
}

// TestRefused: one row a rule.
func TestRefused(t *testing.T) {
	b := newBench(t)
	to := b.server.Listener.Addr().String()
	free := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, max_body: 10, answer_timeout: 1s, callers: [{user: %s}]}`, me()))
	fixed := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, upstream: %q, callers: [{user: %s}]}`, to, me()))
	others := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, upstream: %q, callers: [{user: "64999"}]}`, to))
	for _, x := range []struct {
		name   string
		r      *running
		raw    string
		status int
		rule   string
	}{
		{"another destination", free, "GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n", 403, "destinations"},
		{"another name for it", free, "GET / HTTP/1.1\r\nHost: localhost:" + portOf(b.server.Listener) + "\r\n\r\n", 403, "destinations"},
		{"the proxy's own address", free, "GET / HTTP/1.1\r\nHost: " + free.at + "\r\n\r\n", 403, "destinations"},
		{"no port, so 443", free, "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 403, "destinations"},
		{"around the upstream", fixed, "GET http://localhost:" + portOf(b.raw) + "/ HTTP/1.1\r\nHost: x\r\n\r\n", 403, "destinations"},
		{"a port in another spelling", free, "GET / HTTP/1.1\r\nHost: 127.0.0.1:0" + portOf(b.server.Listener) + "\r\n\r\n", 403, "destinations"},
		{"CONNECT", free, "CONNECT " + to + " HTTP/1.1\r\nHost: " + to + "\r\n\r\n", 400, "request"},
		{"https in absolute form", free, "GET https://" + to + "/ HTTP/1.1\r\nHost: " + to + "\r\n\r\n", 400, "request"},
		{"a user in the URL", free, "GET http://u:p@" + to + "/ HTTP/1.1\r\nHost: " + to + "\r\n\r\n", 400, "request"},
		{"a body that is too large", free, "POST http://" + to + "/ HTTP/1.1\r\nHost: " + to + "\r\nContent-Length: 11\r\n\r\n12345678901", 413, "size"},
		{"a chunked one", free, "POST http://" + to + "/ HTTP/1.1\r\nHost: " + to + "\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n12345678\r\n8\r\n12345678\r\n0\r\n\r\n", 413, "size"},
		{"another user's listener", others, "GET / HTTP/1.1\r\nHost: x\r\n\r\n", 403, "caller"},
		{"two lengths", free, "POST http://" + to + "/ HTTP/1.1\r\nHost: " + to + "\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400, ""},
		{"a length and chunks", free, "POST http://" + to + "/ HTTP/1.1\r\nHost: " + to + "\r\nContent-Length: 4\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 501, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			c, err := net.Dial("tcp", x.r.at)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, x.raw); err != nil {
				t.Fatal(err)
			}
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			p := problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), body)
			if res.StatusCode != x.status || p.Rule != x.rule {
				t.Errorf("got %s %s, want %d %s", res.Status, body, x.status, x.rule)
			}
		})
	}
	if m := free.metric(t); !strings.Contains(m, `inkan_proxy_refused_total{agent="a",rule="destinations"}`) {
		t.Errorf("refusals do not show in\n%s", m)
	}
}

// TestServers: servers that are not what they should be, and one that is not there.
func TestServers(t *testing.T) {
	b := newBench(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	gone := refusing(t)
	foreign := httptest.NewTLSServer(http.NotFoundHandler())
	defer foreign.Close()
	foreign.Config.ErrorLog = log.New(io.Discard, "", 0)
	list := fmt.Sprintf(`{"host":"127.0.0.1","port":%s},{"host":"127.0.0.1","port":%d},`, portOf(foreign.Listener), gone.Port())
	b.write(t, strings.Replace(b.scope, `"destinations":[`, `"destinations":[`+list, 1))
	r := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, callers: [{user: %s}]}`, me()))
	for at, rule := range map[string]string{foreign.Listener.Addr().String(): "tls", gone.String(): "unreachable"} {
		res, body := do(t, r.client(true), http.MethodGet, "http://"+at+"/", nil, nil)
		if p := problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), body); res.StatusCode != http.StatusBadGateway || p.Rule != rule {
			t.Errorf("%s: got %s %s, want %s", at, res.Status, body, rule)
		}
	}
}

// TestInsideStaysInside: what the device or the network said is in the log, and not in
// the answer.
func TestInsideStaysInside(t *testing.T) {
	b := newBench(t)
	gone := refusing(t)
	b.write(t, strings.Replace(b.scope, `"destinations":[`, fmt.Sprintf(`"destinations":[{"host":"127.0.0.1","port":%d},`, gone.Port()), 1))
	r := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, callers: [{user: %s}]}`, me()))
	for _, x := range []struct{ rule, at, inside string }{
		{"unreachable", gone.String(), "connection refused"},
		{"device", b.server.Listener.Addr().String(), "token"},
	} {
		if x.rule == "device" {
			if err := r.identity.Close(); err != nil {
				t.Fatal(err)
			}
		}
		res, body := do(t, r.client(true), http.MethodGet, "http://"+x.at+"/", nil, nil)
		if p := problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), body); p.Rule != x.rule || p.Detail == "" || strings.Contains(p.Detail, x.inside) {
			t.Errorf("got %s %s", res.Status, body)
		}
		line := ""
		for s := range strings.Lines(r.log.String()) {
			if strings.Contains(s, "rule="+x.rule) {
				line = s
			}
		}
		if _, cause, _ := strings.Cut(line, "cause="); !strings.Contains(cause, x.inside) {
			t.Errorf("the log has %s", r.log)
		}
	}
}

// TestTunnel: bytes both ways, to a server under another name than its host;
// it ends when the scope no longer names it.
func TestTunnel(t *testing.T) {
	b := newBench(t)
	r := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: tcp, upstream: "localhost:%s", callers: [{user: %s}]}`, portOf(b.raw), me()))
	dial := func() net.Conn {
		c, err := net.Dial("tcp", r.at)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := dial()
	defer c.Close()
	large := make([]byte, 3<<20)
	_, _ = rand.Read(large) // never fails
	go func() {
		_, _ = c.Write(large) // what does not arrive shows
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, large) {
		t.Fatalf("%d of %d bytes came back: %v", len(got), len(large), err)
	}
	kept := dial()
	defer kept.Close()
	ping := func() error {
		if _, err := io.WriteString(kept, "ping"); err != nil {
			return err
		}
		_, err := io.ReadFull(kept, make([]byte, 4))
		return err
	}
	if err := ping(); err != nil {
		t.Fatal(err)
	}
	// Renewed: it goes on.
	before := r.identity.NotAfter()
	renewed := b.ca.TLS(t, "spiffe://example.org/agent/a", b.key, nil, func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) })
	testca.WriteFile(t, b.dir, "tls.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: renewed.Raw}))
	for deadline := time.Now().Add(time.Minute); !r.identity.NotAfter().After(before); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) { // the proxy itself looks, at each tick
			t.Fatal("the renewed certificate is not read")
		}
	}
	if err := ping(); err != nil {
		t.Fatalf("after a renewal: %v", err)
	}
	b.write(t, `{"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"version":1}`)
	if _, err := kept.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it goes on to a destination that the scope no longer names: %v", err)
	}
	after := dial()
	defer after.Close()
	if _, err := after.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a new one was made: %v", err)
	}
	if m := r.metric(t); !strings.Contains(m, `rule="destinations"} 2`) {
		t.Errorf("refusals do not show in\n%s", m)
	}
}

// TestUnixSocket: who sent it is asked of the kernel; a descriptor that was
// passed on is of no use.
func TestUnixSocket(t *testing.T) {
	b := newBench(t)
	dir, err := os.MkdirTemp("", "proxy") // where another user may look
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	b.start(t, fmt.Sprintf(`{listen: "unix:%s", protocol: http, upstream: %q, callers: [{user: %s}]}`, path, b.server.Listener.Addr(), me()))
	ask := func(c net.Conn) (int, string) {
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 {
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if status, body := ask(c); status != http.StatusOK {
			t.Fatalf("got %d %s", status, body)
		}
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("printf", `GET / HTTP/1.1\r\nHost: x\r\n\r\n`)
	cmd.Stdout = f
	if err := errors.Join(cmd.Run(), f.Close()); err != nil {
		t.Fatal(err)
	}
	if status, body := ask(c); status != http.StatusForbidden || !strings.Contains(body, `"rule":"caller"`) {
		t.Errorf("a descriptor that was passed on: %d %s", status, body)
	}
	// Another user, and a unit that nobody is in.
	unit := filepath.Join(dir, "u")
	b.start(t, fmt.Sprintf(`{listen: "unix:%s", protocol: http, upstream: %q, callers: [{user: %s, unit: other.service}]}`, unit, b.server.Listener.Addr(), me()))
	for name, cmd := range map[string]*exec.Cmd{"unit": exec.Command("curl", "-s", "--unix-socket", unit, "http://x/"), "user": asNobody(exec.Command("curl", "-s", "--unix-socket", path, "http://x/"))} {
		out, err := cmd.Output()
		if err != nil || !strings.Contains(string(out), `"rule":"caller"`) {
			t.Errorf("%s: %s, %v", name, out, err)
		}
	}
}

func asNobody(c *exec.Cmd) *exec.Cmd {
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	return c
}

// TestLimit: connections beyond the limit are told so.
func TestLimit(t *testing.T) {
	b := newBench(t)
	r := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, upstream: %q, max_connections: 2, callers: [{user: %s}]}`, b.server.Listener.Addr(), me()))
	ask := func() (net.Conn, int, string) {
		c, err := net.Dial("tcp", r.at)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return c, res.StatusCode, string(body)
	}
	var open []net.Conn
	for range 2 {
		c, status, _ := ask()
		if status != http.StatusOK {
			t.Fatalf("got %d", status)
		}
		open = append(open, c)
	}
	c, status, body := ask()
	_ = c.Close()
	if status != http.StatusServiceUnavailable || !strings.Contains(body, `"rule":"limit"`) {
		t.Errorf("the third: %d %s", status, body)
	}
	for _, c := range open {
		_ = c.Close()
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		c, status, _ := ask()
		_ = c.Close()
		if status == http.StatusOK {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("closed connections count for ever")
		}
	}
}

// TestStop: a request that runs comes to its end.
func TestStop(t *testing.T) {
	b := newBench(t)
	begun, go_on := make(chan struct{}), make(chan struct{})
	b.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-go_on
		_, _ = io.WriteString(w, "done") // the client may be gone
	})
	r := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, upstream: %q, callers: [{user: %s}]}`, b.server.Listener.Addr(), me()))
	answer := make(chan string, 1)
	go func() {
		res, err := r.client(false).Get("http://" + r.at + "/")
		if err != nil {
			answer <- err.Error()
			return
		}
		body, _ := io.ReadAll(res.Body) // what is missing shows
		answer <- string(body)
	}()
	<-begun
	stopped := make(chan error, 1)
	go func() { stopped <- r.stop() }()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial("tcp", r.at)
		if err != nil {
			break // it takes no more
		}
		_ = c.Close()
		if time.Now().After(deadline) {
			t.Fatal("it does not stop listening")
		}
	}
	close(go_on)
	if got := <-answer; got != "done" {
		t.Errorf("got %q", got)
	}
	if err := <-stopped; err != nil && !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}

// TestHealth: the metrics' server says when the certificate has ended.
func TestHealth(t *testing.T) {
	b := newBench(t)
	r := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, callers: [{user: %s}]}`, me()))
	health := func() int {
		w := httptest.NewRecorder()
		r.metrics.Server().Handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/healthz", nil))
		return w.Code
	}
	if got := health(); got != http.StatusOK {
		t.Errorf("got %d", got)
	}
	ended := b.ca.TLS(t, "spiffe://example.org/agent/a", b.key, nil, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = c.NotBefore.Add(-time.Hour), c.NotBefore })
	testca.WriteFile(t, b.dir, "tls.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ended.Raw}))
	for deadline := time.Now().Add(time.Minute); health() == http.StatusOK; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is healthy with a certificate that ended")
		}
	}
	res, body := do(t, r.client(true), http.MethodGet, "http://"+b.server.Listener.Addr().String()+"/", nil, nil)
	if res.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(body), `"rule":"no_certificate"`) {
		t.Errorf("got %s %s", res.Status, body)
	}
}

func TestBadConfig(t *testing.T) {
	const head, agent = "state_dir: s\ntpm: t\nca: c\nserver_ca: c\n", "agents:\n  - name: a\n    listeners:\n      - "
	good := `{listen: "127.0.0.1:1", protocol: http, callers: [{user: "0"}]}`
	if _, err := proxy.ParseConfig([]byte(head+agent+good), "/"); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		head: "agents is empty",
		strings.Replace(head, "ca: c\n", "", 1) + agent + good:                                       "ca is missing",
		strings.Replace(head, "tpm: t\n", "", 1) + agent + good:                                      "tpm is missing",
		head + agent + strings.Replace(good, "127.0.0.1", "0.0.0.0", 1):                              "a loopback address",
		head + agent + strings.Replace(good, "127.0.0.1:1", "unix:s", 1):                             "an absolute path",
		head + agent + strings.Replace(good, "http", "udp", 1):                                       "http or tcp",
		head + agent + strings.Replace(good, "http", "tcp", 1):                                       "upstream is missing",
		head + agent + strings.Replace(good, "http", `tcp, upstream: "a:1", sign_requests: true`, 1): "sign_requests",
		head + agent + strings.Replace(good, `{user: "0"}`, "", 1):                                   "callers is empty",
		head + agent + strings.Replace(good, `user: "0"`, `unit: x.service`, 1):                      "user is missing",
		head + agent + strings.Replace(good, `"0"`, `"0", unit: x.service`, 1):                       "unit needs a unix socket",
		head + agent + strings.Replace(good, `"0"`, `"nobody-has-this"`, 1):                          "nobody-has-this",
		head + agent + strings.Replace(good, "protocol", `upstream: "a", protocol`, 1):               "host:port",
		head + agent + strings.Replace(good, "protocol", `max_body: -1, protocol`, 1):                "max_body",
		head + agent + strings.Replace(good, "protocol", `answer_timeout: 1ms, protocol`, 1):         "1s to 24h",
		head + agent + strings.Replace(good, "protocol", `verify: false, protocol`, 1):               "verify",
		head + agent + good + "\n      - " + good:                                                    "stands twice",
		head + strings.Replace(agent, "name: a", "name: A", 1) + good:                                "lower-case",
		head + strings.Replace(agent, "name: a\n", "name: a\n    tls_key: \"file:x\"\n", 1) + good:   "pkcs11:",
		head + "sandbox: {read: [x]}\n" + agent + good:                                               "absolute path",
	} {
		if _, err := proxy.ParseConfig([]byte(text), "/"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\ngot %v, want something about %q", text, err, want)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("state_dir: s\ntpm: t\nca: c\nserver_ca: c\nagents:\n  - name: a\n    listeners:\n      - {listen: \"127.0.0.1:1\", protocol: http, callers: [{user: \"0\"}]}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := proxy.ParseConfig(b, "/")
		if err != nil {
			return
		}
		for _, a := range c.Agents {
			for _, l := range a.Listeners {
				if len(l.Callers) == 0 || !strings.HasPrefix(l.Listen, "127.") && !strings.HasPrefix(l.Listen, "[") && !strings.HasPrefix(l.Listen, "unix:/") {
					t.Fatalf("accepted: %s", b)
				}
			}
		}
	})
}

// TestStrangersBytes: a process that was passed the descriptor can add nothing to a
// request of the one that opened the connection, nor to what it has upgraded.
func TestStrangersBytes(t *testing.T) {
	b := newBench(t)
	got := make(chan string, 2)
	b.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			body, err := io.ReadAll(r.Body)
			got <- fmt.Sprintf("%s, %v", body, err)
			return
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_ = rw.Flush()
		body, err := io.ReadAll(rw)
		got <- fmt.Sprintf("%s, %v", body, err)
	})
	path := filepath.Join(t.TempDir(), "s")
	b.start(t, fmt.Sprintf(`{listen: "unix:%s", protocol: http, upstream: %q, callers: [{user: %s}]}`, path, b.server.Listener.Addr(), me()))
	for name, head := range map[string]string{
		"body":    "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\nown ",
		"upgrade": "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, head); err != nil {
				t.Fatal(err)
			}
			if name == "upgrade" {
				if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || !strings.Contains(line, "101") {
					t.Fatalf("%s, %v", line, err)
				}
				if _, err := io.WriteString(c, "own "); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(200 * time.Millisecond) // what is its own goes through
			f, err := c.(*net.UnixConn).File()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("printf", "strangebytes")
			cmd.Stdout = f
			if err := errors.Join(cmd.Run(), f.Close()); err != nil {
				t.Fatal(err)
			}
			if name == "upgrade" {
				time.Sleep(200 * time.Millisecond)
				_ = c.Close()
			}
			select {
			case text := <-got:
				if strings.Contains(text, "strange") {
					t.Errorf("the server got %s", text)
				}
			case <-time.After(10 * time.Second):
				t.Error("the server waits for more")
			}
		})
	}
}

// TestUpgradedEnds: what a server has upgraded ends when the scope no longer names it.
func TestUpgradedEnds(t *testing.T) {
	b := newBench(t)
	b.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(c, rw)
	})
	r := b.start(t, fmt.Sprintf(`{listen: "127.0.0.1:0", protocol: http, upstream: %q, callers: [{user: %s}]}`, b.server.Listener.Addr(), me()))
	c, err := net.Dial("tcp", r.at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nping"); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(c)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", res, err)
	}
	if _, err := io.WriteString(c, "ping"); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Peek(4); err != nil {
		t.Fatal(err)
	}
	b.write(t, `{"allowed_actions":["order.cancel"],"allowed_venues":["XPAR"],"version":1}`)
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(in); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it goes on: %q", rest)
	}
	if m := r.metric(t); !strings.Contains(m, `rule="destinations"} 1`) {
		t.Errorf("the refusal does not show in\n%s", m)
	}
}
