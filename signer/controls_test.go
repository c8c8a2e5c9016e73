package signer_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"inkan/internal/problem"
	"inkan/internal/testca"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
)

// person is a controller that may do everything, and one who is none.
func person(t *testing.T) (key *ecdsa.PrivateKey, member string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	text, err := scope.ControllerKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, fmt.Sprintf(`"controllers":[{"key":%q,"may":["approve","override","policy","rearm"],"name":"risk"}],`, text)
}

func ruled(t *testing.T, what, rule string, err error) {
	t.Helper()
	p, ok := errors.AsType[*problem.Problem](err)
	if rule == "" && err != nil || rule != "" && (!ok || p.Rule != rule) {
		t.Errorf("%s: %v, %q is expected", what, err, rule)
	}
}

// controlled is a signer whose agent has a scope with a controller.
func controlled(t *testing.T, more string) (*desk, *client.Client, *ecdsa.PrivateKey) {
	t.Helper()
	self, _ := executables(t)
	d := start(t, agent("a", self)+more)
	key, member := person(t)
	text := strings.Replace(strings.Replace(scopeJSON, `"amount":"25000"`, `"amount":"25000","block":"soft"`, 1), `"max_order_notional"`, member+`"human_approval_above":[{"amount":"20000","currency":"EUR"}],"max_order_notional"`, 1)
	if err := d.signer.Agent("a").SetChain(t.Context(), d.ca.AgentWithKey(t, "a", []byte(text), d.agents["a"].Key, nil).Chain); err != nil {
		t.Fatal(err)
	}
	return d, client.New(d.socket), key
}

func sell(t *testing.T, qty string) *scope.Action {
	t.Helper()
	a, err := scope.ParseAction(order(client.NewID(), `"OrderQty":"100"`, `"OrderQty":"`+qty+`"`))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestKillAndRearm(t *testing.T) {
	d, c, key := controlled(t, "")
	kill := func(q signer.KillRequest) (out []signer.Controlled, err error) {
		err = c.Post(t.Context(), "/v1/kill", q, &out)
		return out, err
	}
	act := func() error { _, err := c.Sign(t.Context(), sell(t, "1")); return err }
	ruled(t, "before", "", act())
	for _, q := range []signer.KillRequest{{Scope: scope.KillAgent, Reason: "x"}, {Scope: scope.KillAgent, Agent: "b", Reason: "x"}, {Scope: scope.KillFirm, Agent: "a", Reason: "x"}, {Scope: "desk", Agent: "a", Reason: "x"}, {Scope: scope.KillVenue, Reason: "x"}, {Scope: scope.KillAgent, Agent: "a"}} {
		_, err := kill(q)
		ruled(t, fmt.Sprintf("%+v", q), string(scope.RuleControlForm), err)
	}
	out, err := kill(signer.KillRequest{Scope: scope.KillFirm, Reason: "runs wild"})
	if err != nil || len(out) != 1 || out[0] != (signer.Controlled{Agent: "a", Event: 2}) {
		t.Fatalf("%+v, %v", out, err)
	}
	ruled(t, "after the kill", "kill", act())
	_, err = c.SignJSON(t.Context(), []byte(fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"2","OrigClOrdID":"1","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1"}}`, client.NewID())))
	ruled(t, "a cancel", "", err)
	var status signer.Status
	if err := c.Get(t.Context(), "/v1/status", &status); err != nil || len(status.Agents[0].Controls.Kills) != 1 || !strings.HasPrefix(status.Agents[0].Controls.Kills[0].By, "uid ") {
		t.Errorf("%+v, %v", status.Agents, err)
	}
	rearm := func(k *ecdsa.PrivateKey, entry scope.Counter) error {
		text, err := scope.SignRearm(k, d.agents["a"].ID, entry, "mended", time.Now().UTC().Truncate(time.Second), time.Now().UTC().Truncate(time.Second).Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		var out signer.Controlled
		return c.Post(t.Context(), "/v1/rearm", signer.DocumentRequest{Document: text}, &out)
	}
	other, _ := person(t)
	ruled(t, "re-armed by nobody", "control_key", rearm(other, 2))
	ruled(t, "another entry", "rearm_unknown", rearm(key, 1))
	ruled(t, "re-armed", "", rearm(key, 2))
	ruled(t, "and again", "rearm_unknown", rearm(key, 2))
	ruled(t, "no document", "control_form", c.Post(t.Context(), "/v1/rearm", signer.DocumentRequest{Document: "yes"}, &struct{}{}))
	ruled(t, "after all", "", act())
}

func TestAuthorizedAction(t *testing.T) {
	d, c, key := controlled(t, "")
	now := time.Now().UTC().Truncate(time.Second)
	sign := func(a *scope.Action, rule scope.Rule) string {
		text, err := scope.SignAuthorization(key, d.agents["a"].ID, a, rule, "client is waiting", now, now.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	a := sell(t, "410") // 20,500
	approval := sign(a, scope.RuleApproval)
	s, err := c.Sign(t.Context(), a, approval)
	if err != nil || s.JWS == "" {
		t.Fatalf("approved: %v", err)
	}
	again, err := c.Sign(t.Context(), a, approval)
	if err != nil || again.JWS != s.JWS {
		t.Errorf("the same action again: %v", err)
	}
	b := sell(t, "600") // 30,000
	override := sign(b, scope.RuleOrderNotional)
	approval = sign(b, scope.RuleApproval)
	x := sell(t, "600")
	_, err = c.Sign(t.Context(), x, override, approval)
	ruled(t, "for another order", "authorization_action", err)
	_, err = c.Sign(t.Context(), x, sign(x, scope.RuleOrderNotional), sign(x, scope.RuleApproval))
	ruled(t, "an id that was denied stays denied", "authorization_action", err)
	y := sell(t, "600")
	_, err = c.Sign(t.Context(), y, sign(y, scope.RuleOrderNotional))
	ruled(t, "without approval", "human_approval_above", err)
	_, err = c.Sign(t.Context(), b, override, approval)
	ruled(t, "with both", "", err)
}

func TestPolicyFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "policy.jws")
	d, c, key := controlled(t, "    policy: "+file+"\n")
	now := time.Now().UTC().Truncate(time.Second)
	policy := func(version uint32, amount string) string {
		s, err := scope.Parse([]byte(strings.Replace(scopeJSON, `"max_order_notional":[{"amount":"25000"`, `"human_approval_above":[{"amount":"20000","currency":"EUR"}],"max_order_notional":[{"amount":"`+amount+`"`, 1)))
		if err != nil {
			t.Fatal(err)
		}
		text, err := scope.SignPolicy(key, d.agents["a"].ID, version, s, now, now.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	write := func(text string) {
		if err := os.WriteFile(file+".new", []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	until := func(what string, ok func(*signer.AgentStatus) bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			var s signer.Status
			if err := c.Get(t.Context(), "/v1/status", &s); err != nil {
				t.Fatal(err)
			}
			if ok(&s.Agents[0]) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %+v, %s", what, s.Agents[0].Controls, s.Agents[0].PolicyError)
			}
		}
	}
	until("no file", func(a *signer.AgentStatus) bool { return strings.Contains(a.PolicyError, "no such file") })
	_, err := c.Sign(t.Context(), sell(t, "101"))
	ruled(t, "before the policy", "", err)
	write(policy(1, "5000"))
	until("the first", func(a *signer.AgentStatus) bool { return a.Controls.Policy != nil && a.Controls.Policy.Version == 1 })
	_, err = c.Sign(t.Context(), sell(t, "101"))
	ruled(t, "under the policy", "max_order_notional", err)
	write(policy(2, "25001"))
	until("a wider one", func(a *signer.AgentStatus) bool {
		return strings.HasPrefix(a.PolicyError, "policy_wider") && a.Controls.Policy.Version == 1
	})
	var out signer.Controlled
	ruled(t, "from an operator", "", c.Post(t.Context(), "/v1/policy", signer.DocumentRequest{Document: policy(3, "6000")}, &out))
	ruled(t, "an older one", "policy_version", c.Post(t.Context(), "/v1/policy", signer.DocumentRequest{Document: policy(2, "6000")}, &out))
	signed, err := c.Sign(t.Context(), sell(t, "101"))
	ruled(t, "under the next policy", "", err)
	if p, _ := scope.ParsePolicy(policy(3, "6000")); p == nil || signed == nil {
		t.Fatal("no policy")
	}
}

// TestKillWithoutAnAnswer: whoever stops all agents has stopped all of them, though the
// connection breaks before the answer.
func TestKillWithoutAnAnswer(t *testing.T) {
	const agents = 24
	var config strings.Builder
	for i := range agents {
		fmt.Fprintf(&config, "  - {name: a%d, callers: [{user: \"%d\"}]}\n", i, 70000+i)
	}
	d := start(t, config.String())
	conn, err := net.Dial("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	body := `{"scope":"firm","reason":"drill"}`
	if _, err := fmt.Fprintf(conn, "POST /v1/kill HTTP/1.1\r\nHost: signer\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	c := client.New(d.socket)
	stopped := 0
	for end := time.Now().Add(10 * time.Second); stopped < agents && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		var s signer.Status
		if err := c.Get(t.Context(), "/v1/status", &s); err != nil {
			t.Fatal(err)
		}
		stopped = 0
		for _, a := range s.Agents {
			stopped += len(a.Controls.Kills)
		}
	}
	if stopped != agents {
		t.Errorf("%d of %d agents are stopped", stopped, agents)
	}
}

// TestKillOfSome: the answer says which agents were stopped and which were not.
func TestKillOfSome(t *testing.T) {
	self, other := executables(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	d := startWith(t, agent("a", self)+agent("b", other), nil, map[string]*testca.Agent{"b": {Key: key, Chain: []*x509.Certificate{}}})
	c := client.New(d.socket)
	err = c.Post(t.Context(), "/v1/kill", signer.KillRequest{Scope: scope.KillFirm, Reason: "drill"}, &[]signer.Controlled{})
	if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Rule != "no_certificate" || !strings.Contains(p.Detail, "stopped: a (entry 1); not stopped: b (agent b has no certificate yet") {
		t.Errorf("%v", err)
	}
	_, err = c.Sign(t.Context(), sell(t, "1"))
	ruled(t, "after the kill", "kill", err)
}
