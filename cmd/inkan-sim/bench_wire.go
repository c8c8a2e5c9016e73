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
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"inkan/internal/testca"
	"inkan/simulator"
)

// benchClients is at how many clients the wire is measured.
const benchClients = 4

// wires measures the network layer: the proxy, a process under its own sandbox,
// with its key in swtpm and in SoftHSM, to a server on the same machine; what
// the gate adds to a request; what inkan run adds to a start.
func (b *bench) wires(ctx context.Context) error {
	for _, device := range []string{"swtpm", "SoftHSM"} {
		if err := b.wireWith(ctx, device); err != nil {
			return err
		}
	}
	if err := b.gateAdds(ctx); err != nil {
		return err
	}
	return b.startAdds(ctx)
}

func (b *bench) wireWith(ctx context.Context, device string) error {
	w, err := newWorld(b.out, b.inkan, true)
	if err != nil {
		return err
	}
	defer w.end()
	v, err := newVenue(w)
	if err != nil {
		return err
	}
	sandbox := ""
	if device == "SoftHSM" {
		if w.hsm, err = simulator.NewSoftHSM(ctx, w.path("token")); err != nil {
			return err
		}
		if err := os.Setenv("SOFTHSM2_CONF", w.hsm.Config); err != nil { // where this module looks for its tokens
			return err
		}
		out, err := w.run(ctx, "hsm", "keygen", "--token", w.tokenURI(), "--label", "tls")
		if err != nil {
			return err
		}
		w.tlsURI, sandbox = strings.TrimSpace(out), fmt.Sprintf("sandbox: {write: [%q]}\n", w.hsm.Dir)
	}
	w.scope = scopeYAML + v.destinations()
	for _, step := range []func() error{
		func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": w.inkan}) },
		func() error { _, err := w.run(ctx, "signer", "enrol", "--config", w.path("signer.yaml")); return err },
		v.echo, func() error { return v.startProxy("mm-07", w.tlsURI, sandbox) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return b.throughProxy(v, device)
}

// echo serves TLS where the gate would be: it returns what it gets, and resumes no session.
func (v *venue) echo() error {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	ca, err := os.ReadFile(v.path("issuer", "ca.pem"))
	if err != nil || !pool.AppendCertsFromPEM(ca) {
		return errors.Join(errors.New("issuer/ca.pem has no certificate"), err)
	}
	leaf := v.ca.TLS(fatal{}, "", k.Public(), []string{"gate.example.org"}, nil)
	testca.WriteFile(fatal{}, v.path("venue"), "ca.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: v.ca.Certificate.Raw}))
	v.release(v.gateAt)
	l, err := tls.Listen("tcp", v.gateAt, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: k}}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, SessionTicketsDisabled: true})
	if err != nil {
		return err
	}
	go func() { // it ends with this process
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 64<<10)) // to its end
			}()
		}
	}()
	return nil
}

// throughProxy measures tunnels of the proxy: beginnings, and messages there and back.
func (b *bench) throughProxy(v *venue, device string) error {
	dial := func() (net.Conn, error) { return net.Dial("tcp", v.tunnelAt) }
	name := "proxy, key in " + device + ": "
	if _, err := b.run(name+"handshake", benchClients, nil, func(int) error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return roundTrip(c, []byte("x"))
	}); err != nil {
		return err
	}
	for _, size := range []int{256, 1 << 20} {
		message := bytes.Repeat([]byte("x"), size)
		conns := make([]net.Conn, benchClients)
		for i := range conns {
			var err error
			if conns[i], err = dial(); err != nil {
				return err
			}
			defer conns[i].Close()
		}
		what := map[int]string{256: "256 B there and back", 1 << 20: "1 MiB there and back"}[size]
		if _, err := b.run(name+what, benchClients, nil, func(client int) error { return roundTrip(conns[client], message) }); err != nil {
			return err
		}
	}
	return nil
}

// roundTrip sends a message and waits for it to come back.
func roundTrip(c net.Conn, message []byte) error {
	sent := make(chan error, 1)
	if len(message) > 64<<10 { // more than fits in between
		go func() { _, err := c.Write(message); sent <- err }()
	} else {
		_, err := c.Write(message)
		sent <- err
	}
	buffer := make([]byte, min(len(message), 64<<10))
	for left := len(message); left > 0; {
		n, err := c.Read(buffer[:min(left, len(buffer))])
		if err != nil {
			return err
		}
		left -= n
	}
	return <-sent
}

// gateAdds measures a request through the gate beside the same one through a plain
// reverse proxy over the same kind of TLS connection, to the same backend.
func (b *bench) gateAdds(ctx context.Context) error {
	w, err := newWorld(b.out, b.inkan, true)
	if err != nil {
		return err
	}
	defer w.end()
	x, err := newWired(ctx, w, "")
	if err != nil {
		return err
	}
	defer x.close()
	if b.check == nil { // the section verify has not run
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		digest := sha256.Sum256([]byte("raw"))
		sig, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
		if err != nil {
			return err
		}
		if b.check, err = b.run("ecdsa.VerifyASN1, raw", 1, nil, func(int) error {
			if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig) {
				return errors.New("does not verify")
			}
			return nil
		}); err != nil {
			return err
		}
	}
	plain, stop, err := x.plainProxy()
	if err != nil {
		return err
	}
	defer stop()
	ask := func(c *http.Client, at, jws string) error {
		req, err := x.request(ctx, jws, []byte(venueOrder))
		if err != nil {
			return err
		}
		req.URL.Host = at
		ok, said, err := post(c, req)
		if err == nil && !ok {
			err = errors.New(said)
		}
		return err
	}
	var beside, through []time.Duration
	toPlain, toGate := as(x.own, x.roots, "127.0.0.1"), as(x.own, x.roots, "127.0.0.1") // a connection each
	const requests = 300
	before, err := ticks(x.venue.gate.cmd.Process.Pid)
	if err != nil {
		return err
	}
	for range requests { // each action is used once; the two take turns, so that both see the same machine
		jws, err := x.sign(ctx, venueOrder)
		if err != nil {
			return err
		}
		for _, m := range []struct {
			c  *http.Client
			at string
			to *[]time.Duration
		}{{toPlain, plain, &beside}, {toGate, x.gateAt, &through}} {
			begun := time.Now()
			if err := ask(m.c, m.at, jws); err != nil {
				return err
			}
			*m.to = append(*m.to, time.Since(begun))
		}
	}
	after, err := ticks(x.venue.gate.cmd.Process.Pid)
	if err != nil {
		return err
	}
	row := func(name string, all []time.Duration) measurement {
		slices.Sort(all)
		m := measurement{Name: name, Clients: 1, P50: all[len(all)/2], P99: all[len(all)*99/100], Beside: b.check.Name}
		m.PerSecond, m.Ratio = 1/m.P50.Seconds(), float64(m.P50)/float64(b.check.P50)
		return m
	}
	one, other := row("a reverse proxy over mutual TLS, no check", beside), row("the gate, one request", through)
	b.rows = append(b.rows, one, other)
	added := other.P50 - one.P50
	b.notes = append(b.notes, fmt.Sprintf("The gate adds %s to a request, %.2f times a signature check; its durable store of what was seen is in that. Its process used %s of CPU for each.",
		added.Round(time.Microsecond), float64(added)/float64(b.check.P50), (after-before)/requests))
	return nil
}

// plainProxy forwards to the backend over TLS as the gate speaks it, and checks nothing.
func (x *wired) plainProxy() (at string, stop func(), err error) {
	pair, err := tls.LoadX509KeyPair(x.path("venue", "gate.pem"), x.path("venue", "gate.key"))
	if err != nil {
		return "", nil, err
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert})
	if err != nil {
		return "", nil, err
	}
	s := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: x.behind})}
	go func() { _ = s.Serve(l) }() // it ends with Close
	return l.Addr().String(), func() { _ = s.Close() }, nil
}

// startAdds measures what inkan run adds to the start of a program.
func (b *bench) startAdds(ctx context.Context) error {
	w, err := newWorld(b.out, b.inkan, true)
	if err != nil {
		return err
	}
	defer w.end()
	if err := w.makeBot(ctx); err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) }, func() error { return w.bot.add(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": w.inkan}) },
		func() error { _, err := w.run(ctx, "signer", "enrol", "--config", w.path("signer.yaml")); return err },
		w.startSigner,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	bare, err := b.run("start of /usr/bin/true", 1, nil, func(int) error { return exec.CommandContext(ctx, "/usr/bin/true").Run() })
	if err != nil {
		return err
	}
	run, err := b.run("start under inkan run", 1, bare, func(int) error {
		out, err := exec.CommandContext(ctx, w.inkan, "run", "--socket", w.socket(), "--agent", "bot", "--", "/usr/bin/true").CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
	if err != nil {
		return err
	}
	b.notes = append(b.notes, fmt.Sprintf("inkan run adds %s to a start, with a network that a supervisor decides: two processes, measured, recorded, confined.", (run.P50-bare.P50).Round(10*time.Microsecond)))
	return nil
}

// ticks reads the user and system time of a process (proc(5), stat, fields 14
// and 15, in hundredths of a second).
func ticks(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 13 {
		return 0, errors.New("malformed /proc/PID/stat")
	}
	var sum time.Duration
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum, nil
}
