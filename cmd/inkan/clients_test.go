package main

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/hsm"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/simulator"
)

// clients is a gate before a backend, and a proxy whose key is in SoftHSM: both
// are processes that have confined themselves.
type clients struct {
	dir           string
	gate, proxy   string // host:port
	tunnel        string
	health, watch string // of the gate and of the proxy
	agent         *testca.Agent
}

func newClients(t *testing.T) *clients {
	t.Helper()
	ca := testca.New(t)
	x := &clients{dir: t.TempDir()}
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // it was checked
		fmt.Fprintf(w, "taken from %s", r.Header.Get("Agent-Id"))
	}))
	t.Cleanup(backend.Close)
	crl, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}, ca.Certificate, ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	list := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(crl) }))
	t.Cleanup(list.Close)
	for _, sub := range []string{"gate", "seen", "state", "state/a"} {
		if err := os.Mkdir(filepath.Join(x.dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	certify(t, ca, filepath.Join(x.dir, "gate"), "gate", x509.ExtKeyUsageServerAuth, func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} })
	certify(t, ca, x.dir, "tls", x509.ExtKeyUsageClientAuth, func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/agent/a"}}
	})
	writeFile(t, filepath.Join(x.dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate.Raw}))
	writeFile(t, filepath.Join(x.dir, "gate", "routes.yaml"), []byte("- method: POST\n  path: /orders\n  kinds: [order.new]\n  opaque: true\n"))
	config := writeFile(t, filepath.Join(x.dir, "gate.yaml"), fmt.Appendf(nil, "listen: 127.0.0.1:0\nmetrics_listen: 127.0.0.1:0\ncertificate: gate/gate.pem\nkey: gate/gate.key\nca: ca.pem\ntrust_domain: example.org\naudience: [XPAR]\ncrl_url: %s\nreplay_db: seen/seen.db\nbackend: %s\nroutes: gate/routes.yaml\nlimits: {agent_requests_per_second: 100}\n", list.URL, backend.URL))
	var ready struct{ Address, Metrics string }
	startCommand(t, &ready, "gate", "serve", "--config", config)
	x.gate, x.health = ready.Address, ready.Metrics

	s := simulator.SoftHSMForTest(t)
	t.Setenv("SOFTHSM2_CONF", s.Config)
	uri := fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", s.Label, s.Module, s.PINFile)
	token, err := hsm.Open(uri, hsm.Options{})
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
	_, port, err := net.SplitHostPort(x.gate)
	if err != nil {
		t.Fatal(err)
	}
	granted, err := scope.Parse([]byte(strings.Replace(gateScope, `"allowed_sides"`, `"destinations":[{"host":"127.0.0.1","port":`+port+`}],"allowed_sides"`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	ca.State(t, filepath.Join(x.dir, "state", "a"), "a", granted.Canonical(), k.Public(), []byte("{}"))
	x.agent = ca.Agent(t, "a", []byte(gateScope), nil)
	config = writeFile(t, filepath.Join(x.dir, "proxy.yaml"), fmt.Appendf(nil, `state_dir: state
ca: ca.pem
server_ca: ca.pem
metrics_listen: 127.0.0.1:0
agents:
  - name: a
    tls_key: "%s"
    listeners:
      - {listen: "127.0.0.1:0", protocol: http, callers: [{user: "%d"}]}
      - {listen: "127.0.0.1:0", protocol: tcp, upstream: "%s", callers: [{user: "%d"}]}
sandbox: {write: [%q]}
`, strings.Replace(uri, "?", ";id=%07?", 1), os.Getuid(), x.gate, os.Getuid(), s.Dir))
	if code, _, errs := call("", "proxy", "check", "--config", config); code != 0 {
		t.Fatalf("check: exit code %d: %s", code, errs)
	}
	var listening struct {
		Listeners []struct{ Agent, Listen string }
		Metrics   string
	}
	startCommand(t, &listening, "proxy", "serve", "--config", config)
	x.proxy, x.tunnel, x.watch = listening.Listeners[0].Listen, listening.Listeners[1].Listen, listening.Metrics
	return x
}

const clientBody = `{"id":"A-1"}`

// TestClients: clients that know nothing of Inkan, through the proxy and straight to the gate.
func TestClients(t *testing.T) {
	x := newClients(t)
	n := 0
	action := func() string { n++; return signedFor(t, x.agent, n, []byte(clientBody)) }
	const want = "taken from spiffe://example.org/agent/a"
	run := func(stdin, name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		if err != nil && name != "openssl" { // it ends as the server does
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		return string(out)
	}
	file := func(name string) string { return filepath.Join(x.dir, name) }
	python := `import http.client,sys
c=http.client.HTTPConnection(sys.argv[1])
c.request("POST","http://"+sys.argv[2]+"/orders",sys.argv[4],{"Agent-Action":sys.argv[3],"Content-Type":"application/json"})
print(c.getresponse().read().decode())`
	node := `const [at,gate,jws,body]=process.argv.slice(1);const http=require("http");
const r=http.request({host:at.split(":")[0],port:at.split(":")[1],method:"POST",path:"http://"+gate+"/orders",headers:{"Agent-Action":jws,"Content-Type":"application/json","Content-Length":body.length}},a=>{a.setEncoding("utf8");a.on("data",d=>process.stdout.write(d))});r.end(body)`
	raw := func() string {
		return fmt.Sprintf("POST /orders HTTP/1.1\r\nHost: %s\r\nAgent-Action: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", x.gate, action(), len(clientBody), clientBody)
	}
	for name, got := range map[string]string{
		"curl through the proxy":   run("", "curl", "-s", "-x", "http://"+x.proxy, "-H", "Agent-Action: "+action(), "-H", "Content-Type: application/json", "-d", clientBody, "http://"+x.gate+"/orders"),
		"Python through the proxy": run("", "python3", "-c", python, x.proxy, x.gate, action(), clientBody),
		"Node through the proxy":   run("", "node", "-e", node, x.proxy, x.gate, action(), clientBody),
		"curl through the tunnel":  run("", "curl", "-s", "-H", "Agent-Action: "+action(), "-H", "Content-Type: application/json", "-d", clientBody, "http://"+x.tunnel+"/orders"),
		"curl to the gate":         run("", "curl", "-s", "--cacert", file("ca.pem"), "--cert", file("tls.pem"), "--key", file("tls.key"), "-H", "Agent-Action: "+action(), "-H", "Content-Type: application/json", "-d", clientBody, "https://"+x.gate+"/orders"),
		"openssl to the gate":      run(raw(), "openssl", "s_client", "-quiet", "-tls1_3", "-ign_eof", "-CAfile", file("ca.pem"), "-cert", file("tls.pem"), "-key", file("tls.key"), "-connect", x.gate),
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%s: got %s", name, got)
		}
	}
	for name, x := range map[string]struct{ got, want string }{
		"openssl without a certificate": {run(raw(), "openssl", "s_client", "-quiet", "-tls1_3", "-ign_eof", "-CAfile", file("ca.pem"), "-connect", x.gate), "certificate required"},
		"openssl with TLS 1.2":          {run(raw(), "openssl", "s_client", "-tls1_2", "-CAfile", file("ca.pem"), "-cert", file("tls.pem"), "-key", file("tls.key"), "-connect", x.gate), "protocol version"},
		"curl to another destination":   {run("", "curl", "-s", "-x", "http://"+x.proxy, "http://127.0.0.1:1/"), `"rule":"destinations"`},
		"the gate's health":             {run("", "curl", "-s", "http://"+x.health+"/healthz"), "ok"},
		"the gate's metrics":            {run("", "curl", "-s", "http://"+x.health+"/metrics"), "inkan_gate_forwarded_total 6"},
		"the proxy's health":            {run("", "curl", "-s", "http://"+x.watch+"/healthz"), "ok"},
		"the proxy's metrics":           {run("", "curl", "-s", "http://"+x.watch+"/metrics"), `inkan_proxy_refused_total{agent="a",rule="destinations"} 1`},
	} {
		if !strings.Contains(x.got, x.want) {
			t.Errorf("%s: got %s", name, x.got)
		}
	}
	// More than the agent may send.
	limited := false
	for range 300 {
		if strings.Contains(run("", "curl", "-s", "--cacert", file("ca.pem"), "--cert", file("tls.pem"), "--key", file("tls.key"), "https://"+x.gate+"/["+"1-120]"), `"reason":"rate"`) {
			limited = true
			break
		}
	}
	if !limited {
		t.Error("more requests than the limit are not refused (rate)")
	}
}
