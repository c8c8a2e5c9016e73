package signer_test

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"inkan/audit"
	"inkan/internal/problem"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
)

func cancel(id string) []byte {
	return fmt.Appendf(nil, `{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"2","OrigClOrdID":"1"}}`, id)
}

// statementOf is what was signed.
func statementOf(t *testing.T, s *client.Signed) *scope.Statement {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(s.JWS, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	st, err := scope.ParseStatement(b)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// TestClockDivergence: under a bound all but cancels are refused while the
// divergence is not known; a real chronyd makes it known, and statements say it.
func TestClockDivergence(t *testing.T) {
	self, _ := executables(t)
	if _, err := exec.LookPath("chronyd"); err != nil {
		t.Fatal("chronyd is missing: apt-get install chrony")
	}
	dir, err := os.MkdirTemp("", "chrony") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "sock")
	config := agent("a", self) + "clock: {source: chrony, max_divergence: 1ms, chrony: " + socket + "}\n"

	d := start(t, config)
	c := client.New(d.socket)
	_, err = c.SignJSON(t.Context(), order(client.NewID()))
	if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Rule != string(scope.RuleClockDivergence) || p.Limit != "1000" || !strings.Contains(p.Detail, "chronyc") {
		t.Errorf("without chronyd: %v", err)
	}
	signed, err := c.SignJSON(t.Context(), cancel(client.NewID()))
	if err != nil {
		t.Fatalf("a cancel without chronyd: %v", err)
	}
	if clk := statementOf(t, signed).Clock; clk != nil {
		t.Errorf("the statement knows of the clock: %+v", clk)
	}
	d.end()

	conf := filepath.Join(dir, "conf")
	if err := os.WriteFile(conf, []byte("local stratum 10\nport 0\ncmdport 0\nbindcmdaddress "+socket+"\npidfile "+dir+"/pid\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	daemon := exec.Command("chronyd", "-x", "-d", "-u", "root", "-f", conf)
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = daemon.Process.Kill(), daemon.Wait() }()
	for exec.Command("chronyc", "-h", socket, "-n", "-c", "tracking").Run() != nil {
		if t.Context().Err() != nil {
			t.Fatal("chronyd does not answer")
		}
		time.Sleep(20 * time.Millisecond) // it is starting
	}
	c = client.New(start(t, config).socket)
	if signed, err = c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	if clk := statementOf(t, signed).Clock; clk == nil || clk.Source != scope.ClockChrony || clk.Divergence > 1000 {
		t.Errorf("the statement says of the clock: %+v", clk)
	}
	var status signer.Status
	if err := c.Get(t.Context(), "/v1/status", &status); err != nil || status.Clock.Clock == nil || status.Clock.Source != scope.ClockChrony {
		t.Errorf("status: %+v, %v", status.Clock, err)
	}
}

// TestClockJump: a clock that was set while the signer did not run is found in
// the same boot; an operator may accept it, which stands in the record.
func TestClockJump(t *testing.T) {
	self, _ := executables(t)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	var since unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &since); err != nil {
		t.Fatal(err)
	}
	offset := time.Duration(time.Now().Add(-time.Hour).UnixNano() - since.Nano()) // it was an hour earlier
	saved, err := json.Marshal(map[string]string{"boot": strings.TrimSpace(string(boot)), "offset": offset.String()})
	if err != nil {
		t.Fatal(err)
	}
	d := startIn(t, agent("a", self)+"clock: {source: none}\n", nil, nil, map[string][]byte{"clock.json": saved})
	c := client.New(d.socket)
	refused := func(what, rule string, err error) {
		t.Helper()
		if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Rule != rule {
			t.Errorf("%s: %v, %s is expected", what, err, rule)
		}
	}
	// The certificate is of after the hour. What was signed before it would never verify.
	_, err = c.SignJSON(t.Context(), cancel(client.NewID()))
	refused("a cancel before the certificate", "no_certificate", err)
	refused("a head before the certificate", "no_certificate", c.Checkpoint(t.Context(), &signer.Checkpoint{}))
	older := d.ca.AgentWithKey(t, "a", []byte(scopeJSON), d.agents["a"].Key, func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(-2 * time.Hour) })
	if err := d.signer.Agent("a").SetChain(t.Context(), older.Chain); err != nil {
		t.Fatal(err)
	}
	_, err = c.SignJSON(t.Context(), order(client.NewID()))
	if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Rule != string(scope.RuleClockJump) || !strings.Contains(p.Detail, "forward by 1h0m0") {
		t.Fatalf("an order: %v", err)
	}
	signed, err := c.SignJSON(t.Context(), cancel(client.NewID()))
	if err != nil {
		t.Fatal(err)
	}
	if at := statementOf(t, signed).Time.Time; time.Since(at) < 59*time.Minute {
		t.Errorf("the clock was set forward by an hour, and the record went along: %s", at)
	}
	var out signer.Recovered
	if err := c.Recover(t.Context(), "a", "it was wrong before", &out); err != nil || out.Cause != scope.CauseClock {
		t.Fatalf("%+v, %v", out, err)
	}
	if signed, err = c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	if at := statementOf(t, signed).Time.Time; time.Since(at) > time.Minute {
		t.Errorf("after it was accepted: %s", at)
	}
	d.end()
	if _, err := audit.VerifyFile(t.Context(), filepath.Join(signer.AgentDir(filepath.Join(d.dir, "state"), "a"), signer.LogFile), audit.VerifyOptions{Roots: d.ca.Roots}); err != nil {
		t.Error(err)
	}
}
