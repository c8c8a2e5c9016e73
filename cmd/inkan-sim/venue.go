package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/wire"
)

// venue is a venue's order entry that knows nothing of Inkan, with a gate
// before it, and a proxy on the agents' host that leads there.
type venue struct {
	*world
	ca       *testca.CA // of the venue, not the issuer's
	roots    *x509.CertPool
	backend  *http.Server
	taken    atomic.Int64            // orders that the backend took
	behind   string                  // host:port of the backend
	gateAt   string                  // host:port
	proxyAt  string                  // host:port for HTTP
	tunnelAt string                  // host:port for bytes, to the gate
	impostor string                  // host:port of a server with a certificate of its own making
	held     map[string]net.Listener // so that nobody else gets these addresses before they are used
	gate     *process
	proxy    *process
}

const venueRoutes = `- method: POST
  path: /orders
  kinds: [order.new]
  body:
    id: {field: ord.ClOrdID}
    isin: {field: ord.SecurityID}
    side: {field: ord.Side, values: {buy: "1", sell: "2"}}
    qty: {field: ord.OrderQty}
    price: {field: ord.Price}
    type: {const: limit}
  implied: {ord.SecurityIDSource: "4", ord.OrdType: "2", ord.Currency: EUR, ord.TimeInForce: "0"}
- method: DELETE
  path: "/orders/{ord.OrigClOrdID}"
  kinds: [order.cancel]
  implied: {ord.ClOrdID: "*"}
`

// venueOrder is the order of the function order in the venue's own words.
const venueOrder = `{"id":"A-991","isin":"FR0000120271","side":"buy","qty":400,"price":61.24,"type":"limit"}`

// newVenue chooses where everything listens: scopes name it before it is started.
func newVenue(w *world) (*venue, error) {
	v := &venue{world: w, ca: testca.New(fatal{}), held: make(map[string]net.Listener)}
	for _, to := range []*string{&v.gateAt, &v.proxyAt, &v.tunnelAt, &v.impostor} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		*to = l.Addr().String()
		v.held[*to] = l
	}
	v.roots = v.ca.Roots
	return v, os.MkdirAll(w.path("venue"), 0o755)
}

// release lets others listen at addresses.
func (v *venue) release(addresses ...string) {
	for _, a := range addresses {
		if l := v.held[a]; l != nil {
			_ = l.Close() // nothing was accepted
			delete(v.held, a)
		}
	}
}

func port(address string) string { return address[strings.LastIndex(address, ":")+1:] }

// destinations are the scope's: the gate, and a server that is not what it says.
func (v *venue) destinations() string {
	return fmt.Sprintf("destinations:\n  - {host: 127.0.0.1, port: %s, server_name: gate.example.org}\n  - {host: 127.0.0.1, port: %s, server_name: gate.example.org}\n", port(v.gateAt), port(v.impostor))
}

// start starts backend and gate. agents, if it is not empty, are who may come, from where (YAML).
func (v *venue) start(agents string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	v.behind = l.Addr().String()
	v.backend = &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		n := v.taken.Add(1)
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"accepted":%d,"bytes":%d}`, n, len(b))
	})}
	go func() { _ = v.backend.Serve(l) }() // it ends with this process
	if err := v.certify("gate", v.ca, "gate.example.org", "127.0.0.1"); err != nil {
		return err
	}
	testca.WriteFile(fatal{}, v.path("venue"), "ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: v.ca.Certificate.Raw}))
	if err := v.write("venue/routes.yaml", venueRoutes); err != nil {
		return err
	}
	if err := v.write("venue/gate.yaml", fmt.Sprintf("listen: %s\ncertificate: gate.pem\nkey: gate.key\nca: %s\ntrust_domain: example.org\naudience: [XPAR]\ncrl_url: http://%s/crl\nrevocation_reload: 1s\nreplay_db: seen.db\nbackend: http://%s\nroutes: routes.yaml\n%s",
		v.gateAt, v.world.path("issuer", "ca.pem"), v.addresses.Public, l.Addr(), agents)); err != nil {
		return err
	}
	v.release(v.gateAt)
	var ready struct{ Address string }
	v.gate, err = v.startReady("gate", &ready, "gate", "serve", "--config", v.path("venue", "gate.yaml"))
	return err
}

// certify writes a server's key and certificate.
func (v *venue) certify(name string, ca *testca.CA, names ...string) error {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return err
	}
	testca.WriteFile(fatal{}, v.path("venue"), name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	testca.WriteFile(fatal{}, v.path("venue"), name+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.TLS(fatal{}, "", k.Public(), names, nil).Raw}))
	return nil
}

// startProxy starts a proxy for an agent. tlsKey is where its key is in a token; empty: in the TPM.
func (v *venue) startProxy(agent, tlsKey string, more ...string) error {
	text := fmt.Sprintf("state_dir: state\ntpm: %s\nca: issuer/ca.pem\nserver_ca: venue/ca.pem\nagents:\n  - name: %s\n", v.tpm.Address, agent)
	if tlsKey != "" {
		text += fmt.Sprintf("    tls_key: %q\n", tlsKey)
	}
	text += fmt.Sprintf("    listeners:\n      - {listen: %q, protocol: http, upstream: %q, callers: [{user: \"%d\"}]}\n      - {listen: %q, protocol: tcp, upstream: %q, callers: [{user: \"%d\"}]}\n",
		v.proxyAt, v.gateAt, os.Getuid(), v.tunnelAt, v.gateAt, os.Getuid())
	if err := v.write("proxy.yaml", text+strings.Join(more, "")); err != nil {
		return err
	}
	var ready struct {
		Listeners []struct{ Agent, Listen string }
	}
	v.release(v.proxyAt, v.tunnelAt)
	var err error
	v.proxy, err = v.startReady("proxy", &ready, "proxy", "serve", "--config", v.path("proxy.yaml"))
	return err
}

// identity is an agent's TLS identity in this process, as someone has it who may use the device.
func (v *venue) identity(agent string) (*wire.Identity, error) {
	b, err := os.ReadFile(v.world.path("issuer", "ca.pem"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(b) {
		return nil, errors.New("issuer/ca.pem has no certificate")
	}
	return wire.Open(wire.Options{Dir: v.path("state", agent), Roots: roots, TPM: v.tpm.Address})
}

// withBody puts the digest of a message into an action.
func withBody(action string, body []byte) string {
	return strings.Replace(action, `"ord":`, fmt.Sprintf(`"native":{"fmt":"http-body","sha-256":"%x"},"ord":`, sha256.Sum256(body)), 1)
}

// post sends a request as it is and returns what the server said.
func post(c *http.Client, req *http.Request) (accepted bool, said string, err error) {
	res, err := c.Do(req)
	if err != nil {
		return false, err.Error(), nil // the handshake, most likely
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if err != nil {
		return false, "", err
	}
	if res.StatusCode == http.StatusOK {
		return true, string(b), nil
	}
	return false, problem.Parse(res.StatusCode, res.Header.Get("Content-Type"), b).Error() + " " + string(b), nil
}

// request is a POST of an order with its signed action.
func (v *venue) request(ctx context.Context, jws string, body []byte) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+v.gateAt+"/orders", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Agent-Action": {jws}}
	return req, nil
}

//go:embed trader.py
var traderScript []byte

// python is the interpreter itself, not a link to it.
func python() (string, error) {
	p, err := filepath.EvalSymlinks("/usr/bin/python3")
	if err != nil {
		return "", fmt.Errorf("the scripted agent needs /usr/bin/python3: apt-get install python3: %w", err)
	}
	return p, nil
}

// job is what the scripted agent is told to do: sign an action over a body and
// send it, or something else instead.
type job struct {
	Action  json.RawMessage `json:"action,omitempty"`
	Body    string          `json:"body,omitempty"`
	Instead string          `json:"instead,omitempty"` // what is sent in the place of the body
	Header  string          `json:"header,omitempty"`  // in the place of the signed action
	Method  string          `json:"method,omitempty"`
	URL     string          `json:"url,omitempty"`
}

// trader runs the scripted agent by the command, and returns what became of each job.
func (v *venue) trader(cmd *exec.Cmd, jobs []job) ([]outcome, error) {
	b, err := json.Marshal(jobs)
	if err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(b), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("the scripted agent: %w: %s", err, stderr.String())
	}
	var out []outcome
	if err := json.Unmarshal(stdout.Bytes(), &out); err != nil || len(out) != len(jobs) {
		return nil, fmt.Errorf("the scripted agent said %q: %s", stdout.String(), stderr.String())
	}
	return out, nil
}

// serverOnly checks the server and shows no certificate.
func serverOnly(roots *x509.CertPool) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ServerName: "gate.example.org"}
}

// handshake connects to the gate and says what it makes of it. In TLS 1.3 a
// server refuses a certificate after the client's part of the handshake.
func (v *venue) handshake(ctx context.Context, config *tls.Config) (accepted bool, said string, err error) {
	d := tls.Dialer{Config: config}
	c, err := d.DialContext(ctx, "tcp", v.gateAt)
	if err != nil {
		return false, err.Error(), nil
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return false, "", err
	}
	_, err = c.Read(make([]byte, 1)) // the gate says nothing by itself
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return true, "the gate waits for a request", nil
	}
	return false, fmt.Sprint(err), nil
}
