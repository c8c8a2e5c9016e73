package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"inkan/internal/jws"
	"inkan/internal/problem"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
	"inkan/verify"
)

// controls is an agent under people who may narrow, stop and release it. Each
// has one power; mallory has a key that is nobody's.
type controls struct {
	*limits
	keys map[string]*ecdsa.PrivateKey
}

const controlledScope = `version: 1
allowed_actions: [order.new]
allowed_venues: [XPAR]
allowed_instruments:
  - id: isin:FR0000120271
allowed_sides: ["1", "2"]
allowed_ord_types: ["2"]
allowed_tif: ["0"]
max_order_notional:
  - {currency: EUR, amount: "25000"%s}
max_order_qty:
  - {instrument: "*", qty: "600"}
human_approval_above:
  - {currency: EUR, amount: "%s"}
`

const agentID = "spiffe://example.org/agent/mm-07"

func attackControls(ctx context.Context, w *world) error {
	c := &controls{keys: make(map[string]*ecdsa.PrivateKey)}
	var people strings.Builder
	for _, power := range []scope.Power{scope.MayApprove, scope.MayOverride, scope.MayPolicy, scope.MayRearm, "mallory"} {
		text, err := c.person(w, string(power))
		if err != nil {
			return err
		}
		if power != "mallory" {
			fmt.Fprintf(&people, "  - {name: %s, key: %s, may: [%s]}\n", power, text, power)
		}
	}
	w.scope = fmt.Sprintf(controlledScope, ", block: soft", "30000") + "controllers:\n" + people.String()
	me, err := os.Executable()
	if err != nil {
		return err
	}
	for _, step := range []func() error{
		func() error { return w.startTPM(ctx) }, func() error { return w.startIssuer(ctx) }, func() error { return w.inventory(ctx) },
		func() error { return w.signerConfig(map[string]string{"mm-07": me}) },
		func() error { // the operator is whoever runs the inkan command, which the agent is not
			config, err := os.ReadFile(w.path("signer.yaml"))
			if err != nil {
				return err
			}
			return w.write("signer.yaml", string(config)+fmt.Sprintf("operators:\n  - user: \"%d\"\n    executable: %s\n", os.Getuid(), w.inkan))
		},
		w.startSigner,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	c.limits = &limits{w, client.New(w.socket())}
	for _, step := range []func(context.Context) error{c.overrides, c.approvals, c.kills, c.issuerKills, c.policies} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// person makes a key and writes it into a file with its name.
func (c *controls) person(w *world, name string) (string, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return "", err
	}
	c.keys[name] = k
	if err := w.write(name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))); err != nil {
		return "", err
	}
	return scope.ControllerKey(&k.PublicKey)
}

// signs has a person sign a document with the command.
func (c *controls) signs(ctx context.Context, who string, args ...string) (string, error) {
	out, err := c.run(ctx, append(args, "--agent", agentID, "--key", "file:"+c.path(who+".key"))...)
	return strings.TrimSpace(out), err
}

// says runs a command that an attack is carried out with.
func (c *controls) says(ctx context.Context, stdin string, args ...string) (bool, string, error) {
	r, err := c.try(ctx, stdin, args...)
	if err != nil {
		return false, "", err
	}
	return r.code == 0, strings.TrimSpace(r.stdout + r.stderr), nil
}

func (c *controls) acts(ctx context.Context, body string, authorizations ...string) (bool, string, error) {
	_, err := c.signer.SignJSON(ctx, []byte(body), authorizations...)
	return answered(err)
}

// answered takes a refusal out of the signer's answer.
func answered(err error) (accepted bool, said string, _ error) {
	if p, ok := errors.AsType[*problem.Problem](err); ok {
		return false, p.Rule + ": " + p.Detail, nil
	}
	return err == nil, "done", err
}

// needs fails unless something is done that an attack begins with, or that must
// stay possible.
func needs(what string) func(accepted bool, said string, err error) error {
	return func(accepted bool, said string, err error) error {
		if err == nil && !accepted {
			err = fmt.Errorf("%s was refused: %s", what, said)
		}
		return err
	}
}

// authorizes has a person sign for an action.
func (c *controls) authorizes(ctx context.Context, who, command, body string, more ...string) (string, error) {
	if err := c.write("action.json", body); err != nil {
		return "", err
	}
	return c.signs(ctx, who, append([]string{command, "sign", "--action", c.path("action.json"), "--reason", "client is waiting"}, more...)...)
}

func (c *controls) overrides(ctx context.Context) error {
	lift := []string{"--rule", "max_order_notional"}
	large := func() string { return order(client.NewID(), `"400"`, `"450"`) } // 27,558
	first := large()
	text, err := c.authorizes(ctx, "override", "override", first, lift...)
	if err != nil {
		return err
	}
	if err := needs("an order with an override")(c.acts(ctx, first, text)); err != nil {
		return err
	}
	// Its id again with other bytes, and its override with another order.
	if err := c.attack("an override used again for a larger order under its id", "signer", "action id was used for another action", func() (bool, string, error) {
		return c.acts(ctx, strings.Replace(first, `"450"`, `"460"`, 1), text)
	}); err != nil {
		return err
	}
	if err := c.attack("an override for another order", "signer", "authorization_action", func() (bool, string, error) { return c.acts(ctx, large(), text) }); err != nil {
		return err
	}
	for _, a := range []struct{ name, who, qty, rule, check string }{
		{"an override of a hard limit", "override", "601", "max_order_qty", "authorization_hard"},
		{"an override of another limit than the one in the way", "override", "450", "max_order_qty", "max_order_notional"},
		{"an override by a key that is no controller's", "mallory", "450", "max_order_notional", "control_key"},
		{"an override by a controller who may not", "rearm", "450", "max_order_notional", "control_power"},
	} {
		body := order(client.NewID(), `"400"`, `"`+a.qty+`"`)
		text, err := c.authorizes(ctx, a.who, "override", body, "--rule", a.rule)
		if err != nil {
			return err
		}
		if err := c.attack(a.name, "signer", a.check, func() (bool, string, error) { return c.acts(ctx, body, text) }); err != nil {
			return err
		}
	}
	return c.attack("the agent signs its override itself", "signer", "control_signature", func() (bool, string, error) {
		body := large()
		text, err := c.authorizes(ctx, "override", "override", body, lift...)
		if err != nil {
			return false, "", err
		}
		forged, err := c.resign("mallory", text, "client is waiting", "client is waving")
		if err != nil {
			return false, "", err
		}
		return c.acts(ctx, body, forged)
	})
}

// resign changes a document and signs it with another key under the same header.
func (c *controls) resign(who, text, from, to string) (string, error) {
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		return "", errors.New("not a JWS")
	}
	payload := strings.Replace(string(decode(parts[1])), from, to, 1)
	input := []byte(parts[0] + "." + encode([]byte(payload)))
	signature, err := jws.Sign(c.keys[who], input)
	return jws.Compact(input, signature), err
}

func (c *controls) approvals(ctx context.Context) error {
	body := order(client.NewID(), `"400"`, `"500"`) // 30,620
	override, err := c.authorizes(ctx, "override", "override", body, "--rule", "max_order_notional")
	if err != nil {
		return err
	}
	if err := c.attack("an order above the approval amount without approval", "signer", "human_approval_above", func() (bool, string, error) { return c.acts(ctx, body, override) }); err != nil {
		return err
	}
	body = order(client.NewID(), `"400"`, `"500"`)
	if override, err = c.authorizes(ctx, "override", "override", body, "--rule", "max_order_notional"); err != nil {
		return err
	}
	own, err := c.authorizes(ctx, "override", "approval", body)
	if err != nil {
		return err
	}
	if err := c.attack("an approval by who may only override", "signer", "control_power", func() (bool, string, error) { return c.acts(ctx, body, override, own) }); err != nil {
		return err
	}
	body = order(client.NewID(), `"400"`, `"500"`)
	if override, err = c.authorizes(ctx, "override", "override", body, "--rule", "max_order_notional"); err != nil {
		return err
	}
	approval, err := c.authorizes(ctx, "approve", "approval", body)
	if err != nil {
		return err
	}
	return needs("an order with override and approval")(c.acts(ctx, body, override, approval))
}

func (c *controls) kills(ctx context.Context) error {
	out, err := c.run(ctx, "kill", "--socket", c.socket(), "--agent", "mm-07", "--reason", "runs wild", "--json")
	if err != nil {
		return err
	}
	var stopped []signer.Controlled
	if err := json.Unmarshal([]byte(out), &stopped); err != nil || len(stopped) != 1 {
		return fmt.Errorf("kill printed %s", out)
	}
	small := func() (bool, string, error) { return c.acts(ctx, order(client.NewID(), `"400"`, `"1"`)) }
	cancel := func() (bool, string, error) {
		return c.acts(ctx, fmt.Sprintf(`{"id":%q,"aud":"XPAR","act":"order.cancel","ord":{"ClOrdID":"c","OrigClOrdID":"A-991","SecurityID":"FR0000120271","SecurityIDSource":"4","Side":"1"}}`, client.NewID()))
	}
	if err := c.attack("an order after the kill", "signer", "kill", small); err != nil {
		return err
	}
	if err := needs("a cancel after the kill")(cancel()); err != nil {
		return err
	}
	c.world.signer.stop()
	if err := c.startSigner(); err != nil {
		return err
	}
	if err := c.attack("an order after the kill and a restart of the signer", "signer", "kill", small); err != nil {
		return err
	}
	if err := needs("a cancel after the restart")(cancel()); err != nil {
		return err
	}
	entry := fmt.Sprint(uint64(stopped[0].Event))
	rearm := func(who, entry string) (string, error) {
		return c.signs(ctx, who, "rearm", "sign", "--entry", entry, "--reason", "mended")
	}
	send := func(text string) (bool, string, error) {
		return c.says(ctx, text, "rearm", "send", "--socket", c.socket(), "--document", "-")
	}
	for _, a := range []struct{ name, who, check string }{
		{"re-armed by a key that is no controller's", "mallory", "control_key"}, {"re-armed by who may only sign policies", "policy", "control_power"},
	} {
		text, err := rearm(a.who, entry)
		if err != nil {
			return err
		}
		if err := c.attack(a.name, "signer", a.check, func() (bool, string, error) { return send(text) }); err != nil {
			return err
		}
	}
	if err := c.attack("re-armed by the agent", "signer", "caller", func() (bool, string, error) {
		return answered(c.signer.Post(ctx, "/v1/rearm", signer.DocumentRequest{Document: "x"}, &struct{}{}))
	}); err != nil {
		return err
	}
	text, err := rearm("rearm", entry)
	if err != nil {
		return err
	}
	if err := needs("the re-arm document")(send(text)); err != nil {
		return err
	}
	if err := needs("an order after the agent was re-armed")(small()); err != nil {
		return err
	}
	if _, err := c.run(ctx, "kill", "--socket", c.socket(), "--scope", "venue", "--venue", "XPAR", "--reason", "halted"); err != nil {
		return err
	}
	if err := c.attack("the same re-arm document again, for a later kill", "signer", "rearm_unknown", func() (bool, string, error) { return send(text) }); err != nil {
		return err
	}
	var status signer.Status
	if out, err = c.run(ctx, "status", "--socket", c.socket(), "--json"); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil || len(status.Agents) != 1 || len(status.Agents[0].Controls.Kills) != 1 {
		return fmt.Errorf("status shows %s", out)
	}
	if text, err = rearm("rearm", fmt.Sprint(uint64(status.Agents[0].Controls.Kills[0].Event))); err != nil {
		return err
	}
	return needs("the second re-arm document")(send(text))
}

// issuerKills: the issuer's administrator stops all agents, for signers and receivers.
func (c *controls) issuerKills(ctx context.Context) error {
	signed, err := c.signer.SignJSON(ctx, []byte(order(client.NewID(), `"400"`, `"1"`))) // that the venue has not seen yet
	if err != nil {
		return err
	}
	dir := c.path("issuer")
	id, err := c.run(ctx, "issuer", "kill", "add", "--dir", dir, "--scope", "firm", "--reason", "drill")
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(c.path("issuer", "ca.pem"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	receiver := func(age time.Duration, at string) (*verify.Receiver, error) {
		return verify.NewReceiver(verify.Config{Audiences: []string{"XPAR"}, Roots: roots, Revocation: verify.NoRevocation{}, Replay: verify.NoReplay{}, Kills: &verify.KillList{MaxAge: age, Load: verify.HTTPLoader(at)}})
	}
	for _, a := range []struct {
		name, check, path string
		age               time.Duration
	}{
		{"an action from before the kill, at the venue", "killed", "/kills", time.Minute},
		{"an action, at a venue that cannot see the kill list", "kill_state_unknown", "/nothing", time.Minute},
		{"an action, at a venue whose kill list is too old", "kill_state_unknown", "/kills", time.Nanosecond},
	} {
		r, err := receiver(a.age, "http://"+c.addresses.Public+a.path)
		if err != nil {
			return err
		}
		if err := c.attack(a.name, "venue", a.check, func() (bool, string, error) {
			_, err := r.Verify(ctx, []byte(signed.JWS), nil)
			if refusal, ok := errors.AsType[*verify.Refusal](err); ok {
				return false, refusal.Error(), nil
			}
			return err == nil, "accepted", err
		}); err != nil {
			return err
		}
	}
	var status signer.Status
	for end := time.Now().Add(time.Minute); len(status.Agents) == 0 || len(status.Agents[0].Controls.Kills) == 0; time.Sleep(100 * time.Millisecond) {
		out, err := c.run(ctx, "status", "--socket", c.socket(), "--json")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &status); err != nil {
			return err
		}
		if time.Now().After(end) {
			return errors.New("the signer did not take the issuer's kill over")
		}
	}
	small := func() (bool, string, error) { return c.acts(ctx, order(client.NewID(), `"400"`, `"1"`)) }
	if err := c.attack("an order after the issuer's kill", "signer", "kill", small); err != nil {
		return err
	}
	if _, err := c.run(ctx, "issuer", "kill", "lift", "--dir", dir, "--id", strings.TrimSpace(id)); err != nil {
		return err
	}
	if err := c.attack("an order after the kill was lifted, and nobody has re-armed", "signer", "kill", small); err != nil {
		return err
	}
	text, err := c.signs(ctx, "rearm", "rearm", "sign", "--entry", fmt.Sprint(uint64(status.Agents[0].Controls.Kills[0].Event)), "--reason", "drill is over")
	if err != nil {
		return err
	}
	if err := needs("the re-arm document")(c.says(ctx, text, "rearm", "send", "--socket", c.socket(), "--document", "-")); err != nil {
		return err
	}
	return needs("an order after the drill")(small())
}

func (c *controls) policies(ctx context.Context) error {
	policy := func(who, version, amount string) (string, error) {
		if err := c.write("policy.yaml", fmt.Sprintf(controlledScope, "", amount)); err != nil {
			return "", err
		}
		return c.signs(ctx, who, "policy", "sign", "--scope", c.path("policy.yaml"), "--version", version)
	}
	send := func(text string) (bool, string, error) {
		return c.says(ctx, text, "policy", "send", "--socket", c.socket(), "--document", "-")
	}
	for _, a := range []struct{ name, who, amount, from, to, check string }{
		{"a policy wider than the certificate", "policy", "30001", "", "", "policy_wider"},
		{"an unknown limit in a policy", "policy", "30000", `"max_order_notional"`, `"max_order_everything":[],"max_order_notional"`, "control_form"},
		{"a policy by a key that is no controller's", "mallory", "30000", "", "", "control_key"},
		{"a policy by a controller who may not", "override", "30000", "", "", "control_power"},
		{"a policy that brings its own controllers", "policy", "30000", `"human_approval_above"`, `"controllers":[{"key":"AAAA","may":["rearm"],"name":"me"}],"human_approval_above"`, "control_form"},
		{"a policy for another agent", "policy", "30000", "mm-07", "mm-08", "control_agent"},
	} {
		text, err := policy(a.who, "5", a.amount)
		if err == nil && a.from != "" {
			text, err = c.resign(a.who, text, a.from, a.to)
		}
		if err != nil {
			return err
		}
		if err := c.attack(a.name, "signer", a.check, func() (bool, string, error) { return send(text) }); err != nil {
			return err
		}
	}
	good, err := policy("policy", "7", "100")
	if err != nil {
		return err
	}
	if err := needs("a narrower policy")(send(good)); err != nil {
		return err
	}
	if err := c.attack("an order that the certificate allows and the policy does not", "signer", "human_approval_above", func() (bool, string, error) {
		return c.acts(ctx, order(client.NewID(), `"400"`, `"2"`))
	}); err != nil {
		return err
	}
	if err := needs("an order inside the policy")(c.acts(ctx, order(client.NewID(), `"400"`, `"1"`))); err != nil {
		return err
	}
	older, err := policy("policy", "6", "30000")
	if err != nil {
		return err
	}
	if err := c.attack("an older version of the policy", "signer", "policy_version", func() (bool, string, error) { return send(older) }); err != nil {
		return err
	}
	c.world.signer.stop()
	return needs("the record's verification")(c.says(ctx, "", "audit", "verify", "--log", c.path("state", "mm-07", "log.db"), "--ca", c.path("issuer", "ca.pem")))
}
