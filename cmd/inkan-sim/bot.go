package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"

	"inkan/signer/client"
)

// bot is the demo's agent that runs under inkan run and trades through proxy
// and gate.
type bot struct {
	*venue
	name   string
	keyURI string // of its keys in the token; empty: they are in the TPM
	tlsURI string
}

const botScope = scopeYAML + `os:
  execute: [%s]
  read: [%s]
  write: [/dev/null]
  connect:
    - {network: 127.0.0.1/32, ports: [%s]}
  env: [LANG]
`

// newBot chooses where its venue and its proxy are, and in a token makes its keys.
func newBot(ctx context.Context, w *world) (*bot, error) {
	v, err := newVenue(w)
	if err != nil {
		return nil, err
	}
	b := &bot{venue: v, name: "bot"}
	if w.hsm == nil {
		return b, nil
	}
	for label, to := range map[string]*string{"bot": &b.keyURI, "bot-tls": &b.tlsURI} {
		out, err := w.run(ctx, "hsm", "keygen", "--token", w.tokenURI(), "--label", label)
		if err != nil {
			return nil, err
		}
		*to = strings.TrimSpace(out)
	}
	return b, nil
}

// add puts it into the issuer's inventory.
func (b *bot) add(ctx context.Context) error {
	if err := b.write("bot.py", string(traderScript)); err != nil {
		return err
	}
	scope := fmt.Sprintf(botScope, libraries(), b.path("bot.py"), port(b.proxyAt)) + b.destinations()
	if err := b.write("bot.yaml", scope); err != nil {
		return err
	}
	kind := b.keyFlags()
	if b.tlsURI != "" {
		kind = append(kind, "--tls-hsm")
	}
	_, err := b.world.run(ctx, append([]string{"issuer", "agent", "add", "--dir", b.path("issuer"), "--name", b.name, "--device", "host1", "--scope", b.path("bot.yaml")}, kind...)...)
	return err
}

// signerEntry is its part of the signer's configuration: inkan run may start it.
func (b *bot) signerEntry() string {
	text := fmt.Sprintf("  - name: %s\n    callers:\n      - {user: \"%d\", executable: %s, launcher: true}\n", b.name, os.Getuid(), b.inkan)
	if b.keyURI != "" {
		text += fmt.Sprintf("    key: %q\n    tls_key: %q\n", b.keyURI, b.tlsURI)
	}
	return text
}

// command is the bot, confined.
func (b *bot) command(ctx context.Context) (*exec.Cmd, error) {
	python, err := python()
	if err != nil {
		return nil, err
	}
	args := []string{"run", "--socket", b.socket(), "--agent", b.name, "--file", b.path("bot.py"), "--", python, "-I", b.path("bot.py"), b.proxyAt}
	b.say("   $ inkan %s", b.short(strings.Join(args, " ")))
	return exec.CommandContext(ctx, b.inkan, args...), nil
}

// trade: an order, from the confined agent to a backend that knows nothing of it.
func (b *bot) trade(ctx context.Context) error {
	b.title("5a. An agent under inkan run trades through the proxy and the gate")
	if err := b.start(""); err != nil {
		return err
	}
	sandbox := ""
	if b.hsm != nil { // SoftHSM's tokens are files
		sandbox = fmt.Sprintf("sandbox: {write: [%q]}\n", b.hsm.Dir)
	}
	if err := b.startProxy(b.name, b.tlsURI, sandbox); err != nil {
		return err
	}
	cmd, err := b.command(ctx)
	if err != nil {
		return err
	}
	action := json.RawMessage(order("x"))
	out, err := b.trader(cmd, []job{{Action: action, Body: venueOrder}, {Action: action, Body: venueOrder}})
	if err != nil {
		return err
	}
	for _, o := range out {
		if !o.Accepted {
			return fmt.Errorf("an order in scope did not reach the backend: %s", o.Said)
		}
	}
	b.say("   the venue's backend, which knows nothing of Inkan, answered: %s", out[1].Said)
	if n := b.taken.Load(); n != 2 {
		return fmt.Errorf("the backend took %d orders, two were sent", n)
	}
	return nil
}

// layers shows each layer refusing with the others switched off.
func (b *bot) layers(ctx context.Context) error {
	b.title("5b. Each layer refuses alone")
	action := json.RawMessage(order("x"))
	// The operating system: the agent goes around the proxy, straight to the venue's backend.
	b.layer = "os"
	if err := b.attack("agent goes past the proxy to the backend", "kernel", "PermissionError", func() (bool, string, error) {
		cmd, err := b.command(ctx)
		if err != nil {
			return false, "", err
		}
		cmd.Args[len(cmd.Args)-1] = b.behind // it may connect to the proxy's port alone
		out, err := b.trader(cmd, []job{{Action: action, Body: venueOrder}})
		if err != nil {
			return false, "", err
		}
		return out[0].Accepted, out[0].Said, nil
	}); err != nil {
		return err
	}
	// The network: a process that is not confined, with an action that was properly signed.
	b.layer = "network"
	signed, err := b.try(ctx, withBody(order(client.NewID()), []byte(venueOrder)), "sign", "--socket", b.socket(), "--action", "-")
	if err != nil || signed.code != 0 {
		return fmt.Errorf("signing an order: %w: %s", err, signed.stderr)
	}
	jws := strings.TrimSpace(signed.stdout)
	if err := b.attack("signed order without a certificate", "gate", "certificate required", func() (bool, string, error) { return b.handshake(ctx, serverOnly(b.roots)) }); err != nil {
		return err
	}
	if err := b.attack("another destination than the scope's", "proxy", "destinations", func() (bool, string, error) {
		return b.throughProxy(ctx, jws, "http://"+b.addresses.Agent+"/", venueOrder)
	}); err != nil {
		return err
	}
	// The application: the right certificate, another action.
	b.layer = "application"
	if err := b.attack("order that was signed by another agent", "gate", "peer", func() (bool, string, error) { return b.throughProxy(ctx, jws, "/orders", venueOrder) }); err != nil {
		return err
	}
	if err := b.attack("order that was not signed", "gate", "form", func() (bool, string, error) { return b.throughProxy(ctx, "", "/orders", venueOrder) }); err != nil {
		return err
	}
	if err := b.attack("order that was changed after signing", "gate", "body", func() (bool, string, error) {
		cmd, err := b.command(ctx)
		if err != nil {
			return false, "", err
		}
		out, err := b.trader(cmd, []job{{Action: action, Body: venueOrder, Instead: strings.Replace(venueOrder, `400`, `401`, 1)}})
		if err != nil {
			return false, "", err
		}
		return out[0].Accepted, out[0].Said, nil
	}); err != nil {
		return err
	}
	b.layer = ""
	if n := b.taken.Load(); n != 2 {
		return fmt.Errorf("the backend took %d orders, two were in order", n)
	}
	return nil
}

// throughProxy posts a message from a process that is not confined.
func (v *venue) throughProxy(ctx context.Context, jws, url, body string) (bool, string, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", v.proxyAt)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+v.proxyAt+"/orders", bytes.NewReader([]byte(body)))
	if err != nil {
		return false, "", err
	}
	c := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: 30 * time.Second}
	if strings.HasPrefix(url, "http") { // in absolute form, as to any HTTP proxy
		if req.URL, err = req.URL.Parse(url); err != nil {
			return false, "", err
		}
		proxy := *req.URL
		proxy.Host, proxy.Path = v.proxyAt, ""
		c.Transport = &http.Transport{Proxy: http.ProxyURL(&proxy), DisableKeepAlives: true}
		req.Host = ""
	}
	req.Header = http.Header{"Content-Type": {"application/json"}}
	if jws != "" {
		req.Header.Set("Agent-Action", jws)
	}
	ok, said, err := post(c, req)
	return ok, said, errors.Join(err)
}
