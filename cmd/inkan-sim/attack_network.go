package main

import (
	"bufio"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"inkan/attest"
	"inkan/internal/jws"
	"inkan/internal/testca"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/tpm"
	"inkan/wire"
)

// wired is attacks on the wire: the attacker runs unconfined, as the user that
// may use the TPM, and every action that is sent is one that the agent's signer signed.
type wired struct {
	*venue
	signer *client.Client // as agent mm-07
	own    *wire.Identity // of mm-07
}

// newWired sets up two agents that this process and the command act as, a
// venue, its gate and a proxy.
func newWired(ctx context.Context, w *world, agents string) (*wired, error) {
	me, err := os.Executable()
	if err != nil {
		return nil, err
	}
	v, err := newVenue(w)
	if err != nil {
		return nil, err
	}
	w.scope = strings.Replace(scopeYAML, "[order.new, order.replace]", "[order.new, order.cancel]", 1) + v.destinations() + w.where
	w.agents = []string{"mm-07", "mm-08"}
	x := &wired{venue: v}
	for _, step := range []func() error{
		func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": me, "mm-08": w.inkan}) },
		func() error { _, err := w.run(ctx, "signer", "enrol", "--config", w.path("signer.yaml")); return err },
		w.startSigner, func() error { return v.start(agents) }, func() error { return v.startProxy("mm-07", "") },
		func() error { x.own, err = v.identity("mm-07"); return err },
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	x.signer = client.New(w.socket())
	return x, nil
}

func (x *wired) close() { _ = x.own.Close() } // nothing is left to save

// sign has an order signed over a body.
func (x *wired) sign(ctx context.Context, body string, changes ...string) (string, error) {
	s, err := x.signer.SignJSON(ctx, []byte(withBody(order(client.NewID(), changes...), []byte(body))))
	if err != nil {
		return "", err
	}
	return s.JWS, nil
}

// as is an HTTP client with the agent's certificate, from an address of this host.
func as(i *wire.Identity, roots *x509.CertPool, from string) *http.Client {
	config := i.TLSConfig(roots)
	config.ServerName = "gate.example.org"
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: config, DialContext: d.DialContext, MaxIdleConns: 1}, Timeout: 30 * time.Second}
}

// trade sends a fresh order that is properly signed.
func (x *wired) trade(ctx context.Context, c *http.Client) (accepted bool, said string, err error) {
	jws, err := x.sign(ctx, venueOrder)
	if err != nil {
		return false, "", err
	}
	req, err := x.request(ctx, jws, []byte(venueOrder))
	if err != nil {
		return false, "", err
	}
	return post(c, req)
}

func attackNetwork(ctx context.Context, w *world) error {
	x, err := newWired(ctx, w, "agents:\n  \"spiffe://example.org/agent/mm-07\": [127.0.0.1/32]\n  \"spiffe://example.org/agent/mm-08\": []\n")
	if err != nil {
		return err
	}
	defer x.close()
	right := as(x.own, x.roots, "127.0.0.1")
	for range 2 {
		if ok, said, err := x.trade(ctx, right); err != nil || !ok {
			return fmt.Errorf("what is in order is refused: %w: %s", err, said)
		}
	}
	w.say("   the agent's own connection trades, and the action is signed in all that follows")
	for _, step := range []func(context.Context) error{x.certificates, x.addresses, x.throughTheProxy, x.revocation} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if n := x.taken.Load(); n != 3 { // two above, one before the revocation
		return fmt.Errorf("the backend took %d orders, 3 were in order", n)
	}
	return nil
}

// actionKey is an agent's action key, as root has the use of it, with its chain.
func (x *wired) actionKey(agent string) (crypto.Signer, []*x509.Certificate, io.Closer, error) {
	state, err := signer.OpenState(x.path("state"), agent)
	if err != nil {
		return nil, nil, nil, err
	}
	keys, err := state.Keys(attest.PurposeAction)
	if err != nil {
		return nil, nil, nil, err
	}
	chain, err := state.Chain(attest.PurposeAction)
	if err != nil {
		return nil, nil, nil, err
	}
	var policies tpm.Policies
	if _, err := state.Policies(&policies); err != nil {
		return nil, nil, nil, err
	}
	d, err := tpm.Open(x.tpm.Address)
	if err != nil {
		return nil, nil, nil, err
	}
	k, err := d.LoadKey(keys[attest.PurposeAction], &policies)
	if err != nil {
		return nil, nil, nil, errors.Join(err, d.Close())
	}
	return k, chain, d, nil
}

// certificates: none, another's, of another kind, by another protocol.
func (x *wired) certificates(ctx context.Context) error {
	other, err := x.identity("mm-08")
	if err != nil {
		return err
	}
	defer other.Close()
	action, chain, closer, err := x.actionKey("mm-07")
	if err != nil {
		return err
	}
	defer closer.Close()
	config := func(change func(*tls.Config)) *tls.Config {
		c := x.own.TLSConfig(x.roots)
		c.ServerName = "gate.example.org"
		change(c)
		return c
	}
	forged := testca.New(fatal{})
	forgedKey := forged.Agent(fatal{}, "mm-07", []byte(benchScope), nil).Key
	handshakes := []struct {
		name, check string
		config      *tls.Config
	}{
		{"no certificate", "certificate required", serverOnly(x.roots)},
		{"certificate of another CA", "remote error: tls", config(func(c *tls.Config) {
			leaf := forged.TLS(fatal{}, "spiffe://example.org/agent/mm-07", forgedKey.Public(), nil, nil)
			c.GetClientCertificate = only(tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: forgedKey})
		})},
		{"action certificate in the TLS one's place", "remote error: tls", config(func(c *tls.Config) {
			c.GetClientCertificate = only(tls.Certificate{Certificate: [][]byte{chain[0].Raw}, PrivateKey: action})
		})},
		{"the agent's certificate without its key", "remote error: tls", config(func(c *tls.Config) {
			b, _ := x.own.TLSConfig(nil).GetClientCertificate(nil) // it is there
			c.GetClientCertificate = only(tls.Certificate{Certificate: b.Certificate, PrivateKey: forgedKey})
		})},
		{"downgrade to TLS 1.2", "protocol version", config(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 })},
	}
	for _, a := range handshakes {
		if err := x.attack(a.name, "gate", a.check, func() (bool, string, error) { return x.handshake(ctx, a.config) }); err != nil {
			return err
		}
	}
	if err := x.gated("TLS key signs an action", "certificate", func() (bool, string, error) {
		good, err := x.sign(ctx, venueOrder)
		if err != nil {
			return false, "", err
		}
		pair, err := x.own.TLSConfig(nil).GetClientCertificate(nil)
		if err != nil {
			return false, "", err
		}
		h, err := jws.NewHeader("ES256", []*x509.Certificate{pair.Leaf}, true)
		if err != nil {
			return false, "", err
		}
		input := h.SigningInput(decode(strings.Split(good, ".")[1]))
		sig, err := jws.Sign(pair.PrivateKey.(crypto.Signer), input)
		if err != nil {
			return false, "", err
		}
		req, err := x.request(ctx, jws.Compact(input, sig), []byte(venueOrder))
		if err != nil {
			return false, "", err
		}
		return post(as(x.own, x.roots, "127.0.0.1"), req)
	}); err != nil {
		return err
	}
	if err := x.gated("another agent's certificate", "peer", func() (bool, string, error) { return x.trade(ctx, as(other, x.roots, "127.0.0.1")) }); err != nil {
		return err
	}
	return x.attack("plain HTTP to the gate", "gate", "HTTP request to an HTTPS server", func() (bool, string, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", x.gateAt)
		if err != nil {
			return false, "", err
		}
		defer c.Close()
		if _, err := io.WriteString(c, "POST "); err != nil { // no more, so that the answer is not lost to what was not read
			return false, "", err
		}
		b, err := io.ReadAll(c)
		return strings.Contains(string(b), " 200 "), string(b), err
	})
}

// only shows this certificate, whatever the server asks for.
func only(c tls.Certificate) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
}

func (x *wired) addresses(ctx context.Context) error {
	return x.gated("the right certificate from a wrong address", "network", func() (bool, string, error) { return x.trade(ctx, as(x.own, x.roots, "127.0.0.2")) })
}

// throughTheProxy: what the proxy is asked for that it must not do.
func (x *wired) throughTheProxy(ctx context.Context) error {
	x.release(x.impostor)
	l, err := tls.Listen("tcp", x.impostor, impostorTLS())
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") // whether it gets so far shows
			_ = c.Close()
		}
	}()
	// A proxy that goes wherever a request says, if the scope names it.
	if err := x.write("proxy2.yaml", fmt.Sprintf("state_dir: state\ntpm: %s\nca: issuer/ca.pem\nserver_ca: venue/ca.pem\nagents:\n  - name: mm-07\n    listeners:\n      - {listen: \"127.0.0.1:0\", protocol: http, callers: [{user: \"%d\"}]}\n", x.tpm.Address, os.Getuid())); err != nil {
		return err
	}
	var ready struct {
		Listeners []struct{ Agent, Listen string }
	}
	if _, err = x.startReady("proxy2", &ready, "proxy", "serve", "--config", x.path("proxy2.yaml")); err != nil {
		return err
	}
	raw := func(text string) func() (bool, string, error) {
		return func() (bool, string, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, "tcp", ready.Listeners[0].Listen)
			if err != nil {
				return false, "", err
			}
			defer c.Close()
			if _, err := io.WriteString(c, text); err != nil {
				return false, "", err
			}
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				return false, "", err
			}
			b, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
			return res.StatusCode == http.StatusOK, string(b), err
		}
	}
	for _, a := range []struct{ name, check, text string }{
		{"a destination that the scope does not name", "destinations", "GET http://" + x.world.addresses.Agent + "/ HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"the backend, past the gate", "destinations", "POST http://" + x.behind + "/orders HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"},
		{"CONNECT, to speak TLS itself", "request", "CONNECT " + x.gateAt + " HTTP/1.1\r\nHost: x\r\n\r\n"},
	} {
		if err := x.attack("proxy: "+a.name, "proxy", a.check, raw(a.text)); err != nil {
			return err
		}
	}
	if err := x.attack("proxy: used by another user", "proxy", "caller", func() (bool, string, error) {
		if os.Getuid() != 0 {
			return false, "", errors.New("run as root: the attack is made by another user")
		}
		cmd := exec.CommandContext(ctx, "curl", "-s", "http://"+x.proxyAt+"/orders")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.Output()
		return false, string(out), err
	}); err != nil {
		return err
	}
	return x.attack("a server that is not the venue", "proxy", "tls", func() (bool, string, error) {
		c := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: ready.Listeners[0].Listen})}, Timeout: 30 * time.Second}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+x.impostor+"/", nil)
		if err != nil {
			return false, "", err
		}
		return post(c, req)
	})
}

// impostorTLS is a server that says it is the gate, certified by nobody that counts.
func impostorTLS() *tls.Config {
	ca := testca.New(fatal{})
	k := ca.Agent(fatal{}, "x", []byte(benchScope), nil).Key
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{ca.TLS(fatal{}, "", k.Public(), []string{"gate.example.org"}, nil).Raw}, PrivateKey: k}}}
}

// revocation comes last: it ends the agent's certificate.
func (x *wired) revocation(ctx context.Context) error {
	open := as(x.own, x.roots, "127.0.0.1")
	if ok, said, err := x.trade(ctx, open); err != nil || !ok {
		return fmt.Errorf("what is in order is refused: %w: %s", err, said)
	}
	b, err := os.ReadFile(x.path("state", "mm-07", "tls.pem"))
	if err != nil {
		return err
	}
	block, _ := pem.Decode(b)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return err
	}
	if _, err := x.run(ctx, "issuer", "certificate", "revoke", "--dir", x.path("issuer"), "--serial", fmt.Sprintf("%x", leaf.SerialNumber), "--reason", "keyCompromise"); err != nil {
		return err
	}
	// The gate gets the list again after a second; until it has, the connection goes on, so
	// requests are sent that no route takes.
	deadline := time.Now().Add(30 * time.Second)
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+x.gateAt+"/nothing", nil)
		if err != nil {
			return err
		}
		if _, said, err := post(open, req); err != nil || !strings.Contains(said, "route") {
			break
		}
		if time.Now().After(deadline) {
			break // the attack below shows it
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err := x.gated("connection reuse after revocation", "certificate_revoked", func() (bool, string, error) { return x.trade(ctx, open) }); err != nil {
		return err
	}
	return x.gated("revoked certificate, new connection", "certificate_revoked", func() (bool, string, error) { return x.trade(ctx, as(x.own, x.roots, "127.0.0.1")) })
}

// rawOrder is an order in JSON as an action's raw value.
func rawOrder(changes ...string) json.RawMessage { return json.RawMessage(order("x", changes...)) }
