package signer_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/internal/anchor"
	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/simulator"
	"inkan/tpm"
)

// TestRecovery: a record that is gone has the agent refused until an operator
// takes it up again, with a reason, which then stands in it.
func TestRecovery(t *testing.T) {
	self, _ := executables(t)
	dev, err := tpm.Open(simulator.TPMForTest(t).Address)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if err := dev.Counter("a").Make(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "signer") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	key, member := person(t)
	a := testca.New(t).Agent(t, "a", []byte(strings.Replace(scopeJSON, `"max_order_notional"`, member+`"max_order_notional"`, 1)), nil)
	start := func(operators string) (c *client.Client, end func()) {
		t.Helper()
		config, err := signer.ParseConfig(fmt.Appendf(nil, "socket: s\nstate_dir: state\ntpm: none\nissuer: {url: 'https://localhost', ca: none}\nagents:\n%s    rollback_interval: 10ms\n    policy: a.policy\n%s", agent("a", self), operators), dir)
		if err != nil {
			t.Fatal(err)
		}
		s, err := signer.Open(t.Context(), config, map[string]signer.Credentials{"a": {Key: a.Key, Chain: a.Chain, Anchor: anchor.New(dev, "a")}}, nil, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		ready, ended := make(chan struct{}), make(chan error, 1)
		go func() { ended <- s.Serve(ctx, func() { close(ready) }) }()
		<-ready
		return client.New(filepath.Join(dir, "s")), func() {
			stop()
			if err := errors.Join(<-ended, s.Close()); err != nil && !errors.Is(err, http.ErrServerClosed) {
				t.Error(err)
			}
		}
	}
	refused := func(err error, status int, text string) {
		t.Helper()
		p, ok := errors.AsType[*problem.Problem](err)
		if !ok || p.Status != status || !strings.Contains(p.Rule+": "+p.Detail, text) {
			t.Errorf("%v, expected %d with %q", err, status, text)
		}
	}
	var out signer.Recovered
	c, end := start("")
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	refused(c.Recover(t.Context(), "a", "nothing happened", &out), http.StatusConflict, "nothing was found")
	end()
	if err := os.RemoveAll(filepath.Join(dir, "state")); err != nil {
		t.Fatal(err)
	}

	// A policy for when it is taken up again.
	now := time.Now().UTC().Truncate(time.Second)
	narrow, err := scope.Parse([]byte(scopeJSON))
	if err != nil {
		t.Fatal(err)
	}
	policy, err := scope.SignPolicy(key, a.ID, 1, narrow, now, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a.policy"), []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}

	c, end = start("operators:\n  - {user: '12345'}\n")
	refused(c.Recover(t.Context(), "a", "it is mine", &out), http.StatusForbidden, "caller")
	end()

	c, end = start("")
	defer func() { end() }()
	_, err = c.SignJSON(t.Context(), order(client.NewID()))
	refused(err, http.StatusServiceUnavailable, string(scope.RuleRollback)+": the record is empty")
	var status signer.Status
	if err := c.Get(t.Context(), "/v1/status", &status); err != nil {
		t.Fatal(err)
	}
	if x := status.Agents[0]; x.Rollback.Finding == nil || x.Rollback.Finding.Cause != scope.CauseLost || !strings.Contains(x.Error, "the record is empty") {
		t.Errorf("status: %+v", x)
	}
	refused(c.Recover(t.Context(), "b", "which?", &out), http.StatusNotFound, "no agent")
	for _, reason := range []string{"", " ", "two\nlines", strings.Repeat("x", 300)} {
		refused(c.Recover(t.Context(), "a", reason, &out), http.StatusBadRequest, "reason")
	}
	if err := c.Recover(t.Context(), "a", "the disk was replaced", &out); err != nil {
		t.Fatal(err)
	}
	if out.Agent != "a" || out.Counter != 1 || out.Cause != scope.CauseLost {
		t.Errorf("recovered: %+v", out)
	}
	if _, err := c.SignJSON(t.Context(), order(client.NewID())); err != nil { // its scope has no limit over time
		t.Errorf("after the recovery: %v", err)
	}
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if err := c.Get(t.Context(), "/v1/status", &status); err != nil {
			t.Fatal(err)
		}
		if status.Agents[0].Controls.Policy != nil && status.Agents[0].PolicyError == "" {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("the policy in the file was not taken over: %s", status.Agents[0].PolicyError)
		}
	}
}
