package main

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"inkan/simulator"
)

// servedGate is a gate as a process of its own.
type servedGate struct {
	Address, Metrics string
	stop             func() error
}

func (v *gateVenue) serve(t *testing.T, name, config string) *servedGate {
	t.Helper()
	g := &servedGate{}
	g.stop = startCommand(t, g, "gate", "serve", "--config", writeFile(t, filepath.Join(v.dir, name), []byte(config)))
	return g
}

// answers fails the test unless a gate answers an action so.
func (v *gateVenue) answers(t *testing.T, what string, g *servedGate, jws string, status int, text string) {
	t.Helper()
	if got, answer := v.post(t, g.Address, []tls.Certificate{v.tls}, jws, gateBody, nil); got != status || !strings.Contains(answer, text) {
		t.Errorf("%s: %d %s; %d with %s is expected", what, got, answer, status, text)
	}
}

func get(t *testing.T, address, path string) (int, string) {
	t.Helper()
	res, err := http.Get("http://" + address + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// TestGatesShareDatabase: gates with one PostgreSQL database let an action through once, over restarts of
// gates and database, and nothing while the database is away.
func TestGatesShareDatabase(t *testing.T) {
	v := newGateVenue(t)
	db := simulator.PostgreSQLForTest(t)
	password := writeFile(t, filepath.Join(t.TempDir(), "password"), []byte(db.Password+"\n"))
	config := v.config("gate.key", "postgres://inkan@/inkan?host="+db.Dir, "replay_db_password_file: "+password+"\nmetrics_listen: 127.0.0.1:0\n")
	first, second := v.serve(t, "first.yaml", config), v.serve(t, "second.yaml", config)
	n := 0
	action := func() string { n++; return signedFor(t, v.agent, n, gateBody) }

	one := action()
	v.answers(t, "an action", first, one, 200, v.agent.ID)
	v.answers(t, "again", first, one, 409, `"reason":"replay"`)
	v.answers(t, "again at the other gate", second, one, 409, `"reason":"replay"`)
	two := action()
	v.answers(t, "another one at the other gate", second, two, 200, v.agent.ID)
	v.answers(t, "which is sent to the first", first, two, 409, `"reason":"replay"`)

	// Sent to both at once, it passes one of them.
	three := action()
	var passed atomic.Int64
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			switch status, text := v.post(t, []*servedGate{first, second}[i%2].Address, []tls.Certificate{v.tls}, three, gateBody, nil); {
			case status == 200:
				passed.Add(1)
			case !strings.Contains(text, `"reason":"replay"`):
				t.Errorf("sent at once: %d %s", status, text)
			}
		})
	}
	wg.Wait()
	if passed.Load() != 1 {
		t.Errorf("sent at once it passed %d times", passed.Load())
	}

	if err := first.stop(); err != nil {
		t.Errorf("it ended so: %v", err)
	}
	first = v.serve(t, "first.yaml", config)
	for i, jws := range []string{one, two, three} {
		v.answers(t, fmt.Sprintf("action %d after a restart of the gate", i+1), first, jws, 409, `"reason":"replay"`)
	}

	four := action()
	if err := db.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, g := range []*servedGate{first, second} {
		v.answers(t, "without a database", g, four, 503, `"reason":"replay_store"`)
		if status, text := get(t, g.Metrics, "/healthz"); status != 503 || !strings.Contains(text, "replay_store") {
			t.Errorf("health without a database: %d %s", status, text)
		}
	}
	if code, _, errs := call("", "gate", "check", "--config", filepath.Join(v.dir, "first.yaml")); code == 0 || !strings.Contains(errs, "opening the receiver's store in database inkan at "+db.Dir) {
		t.Errorf("check without a database: exit code %d: %s", code, errs)
	}
	if err := db.Restart(); err != nil {
		t.Fatal(err)
	}
	// It was not used up: it is sent until it passes, for the pool notices its dead connections one at a time.
	recovers := func(what string, g *servedGate, jws string) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); ; {
			status, text := v.post(t, g.Address, []tls.Certificate{v.tls}, jws, gateBody, nil)
			if status == 200 {
				return
			}
			if !strings.Contains(text, `"reason":"replay_store"`) || time.Now().After(end) {
				t.Fatalf("%s: %d %s", what, status, text)
			}
		}
	}
	recovers("the same action when the database is back", first, four)
	recovers("another one at the other gate", second, action())
	for i, jws := range []string{one, two, three, four} {
		v.answers(t, fmt.Sprintf("action %d after a crash of the database", i+1), first, jws, 409, `"reason":"replay"`)
		v.answers(t, fmt.Sprintf("action %d at the other gate", i+1), second, jws, 409, `"reason":"replay"`)
	}
	if status, text := get(t, first.Metrics, "/healthz"); status != 200 {
		t.Errorf("health afterwards: %d %s", status, text)
	}
	if _, text := get(t, first.Metrics, "/metrics"); !strings.Contains(text, `inkan_gate_refused_total{reason="replay_store"}`) {
		t.Errorf("the metrics do not count replay_store: %s", text)
	}
}

// TestGateDatabaseOverTLS: over TCP a gate that has confined itself knows the server by its
// certificate and is known by its own, also on connections that it makes later.
func TestGateDatabaseOverTLS(t *testing.T) {
	v := newGateVenue(t)
	db := simulator.PostgreSQLForTest(t)
	dir := t.TempDir() // not below the gate's own
	certify(t, v.ca, dir, "server", x509.ExtKeyUsageServerAuth, func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} })
	certify(t, v.ca, dir, "client", x509.ExtKeyUsageClientAuth, func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "inkan"} })
	var pair [2][]byte
	for i, name := range []string{"server.pem", "server.key"} {
		var err error
		if pair[i], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	at, err := db.Listen(pair[0], pair[1])
	if err != nil {
		t.Fatal(err)
	}
	// The server asks for the client's certificate instead of a password.
	ca := filepath.Join(db.Dir, "client-ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: v.ca.Certificate.Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"pg_hba.conf": "hostssl all all 127.0.0.1/32 cert\n", "postgresql.auto.conf": "ssl_ca_file = '" + ca + "'\n"} {
		f, err := os.OpenFile(filepath.Join(db.Dir, "data", name), os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	again := func(end func() error) {
		t.Helper()
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if err := db.Restart(); err != nil {
			t.Fatal(err)
		}
	}
	again(db.Close)

	file := func(name string) string { return filepath.Join(dir, name) }
	store := "postgres://inkan@" + at + "/inkan?sslrootcert=" + filepath.Join(v.dir, "ca.pem")
	if code, _, errs := call("", "gate", "check", "--config", writeFile(t, filepath.Join(v.dir, "bad.yaml"), []byte(v.config("gate.key", store, "")))); code == 0 || !strings.Contains(errs, "certificate") {
		t.Errorf("without a client certificate: exit code %d: %s", code, errs)
	}
	g := v.serve(t, "gate.yaml", v.config("gate.key", store+"&sslcert="+file("client.pem")+"&sslkey="+file("client.key"), ""))
	n := 0
	action := func() string { n++; return signedFor(t, v.agent, n, gateBody) }
	one := action()
	v.answers(t, "an action", g, one, 200, v.agent.ID)
	again(db.Kill)
	passed := false
	for range 20 { // the pool notices its dead connections one at a time
		if status, text := v.post(t, g.Address, []tls.Certificate{v.tls}, action(), gateBody, nil); status == 200 {
			passed = true
			break
		} else if !strings.Contains(text, `"reason":"replay_store"`) {
			t.Errorf("when the database is back: %d %s", status, text)
		}
	}
	if !passed {
		t.Error("nothing passes when the database is back")
	}
	v.answers(t, "the first one again", g, one, 409, `"reason":"replay"`)
}
