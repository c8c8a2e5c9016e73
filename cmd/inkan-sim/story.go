package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"

	"inkan/signer/client"
)

func runDemo(ctx context.Context, out io.Writer, inkan string, hsm, approver, asJSON bool) (err error) {
	w, err := newWorld(out, inkan, asJSON)
	if err != nil {
		return err
	}
	defer w.end()
	w.scope = scopeYAML + "source_networks: [127.0.0.0/8]\n"
	confined := func(ctx context.Context) error {
		if err := w.bot.trade(ctx); err != nil {
			return err
		}
		return w.bot.layers(ctx)
	}
	steps := []func(context.Context) error{w.makeBot, w.bringUp, w.trade, confined, w.attacks}
	if approver {
		w.withApprover, w.bindAtOnce = true, true
		steps = []func(context.Context) error{w.makeBot, w.bringUp, w.trade, confined, w.attacksAsRoot}
	}
	if hsm {
		steps = []func(context.Context) error{w.makeToken, w.makeBot, w.bringUp, w.trade, confined, w.attacksOnToken}
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return w.finish()
}

func (w *world) makeBot(ctx context.Context) (err error) {
	w.bot, err = newBot(ctx, w)
	return err
}

func (w *world) bringUp(ctx context.Context) error {
	w.title("1. A host with a TPM (here swtpm; on a server /dev/tpmrm0)")
	if err := w.startTPM(ctx); err != nil {
		return err
	}
	w.title("2. An issuer, with its own CA and policy key")
	if err := w.startIssuer(ctx); err != nil {
		return err
	}
	if w.withApprover {
		w.title("2a. An approver, which belongs on another host: it checks every action a second time")
		if err := w.startApprover(ctx); err != nil {
			return err
		}
	}
	w.title("3. The inventory: the device, the state it must be in, the agent and its scope")
	if err := w.inventory(ctx); err != nil {
		return err
	}
	if w.bot != nil {
		if err := w.bot.add(ctx); err != nil {
			return err
		}
	}
	w.title("4. The signer makes its keys in the TPM, and has them certified after attestation")
	if err := w.signerConfig(map[string]string{"mm-07": cmp.Or(w.caller, w.inkan)}); err != nil {
		return err
	}
	if w.hsm != nil {
		if err := w.sealPIN(ctx); err != nil {
			return err
		}
	}
	out, err := w.run(ctx, "signer", "enrol", "--config", w.path("signer.yaml"))
	if err != nil {
		return err
	}
	w.say("   %s", strings.TrimSpace(out))
	return w.startSigner()
}

func (w *world) trade(ctx context.Context) error {
	w.title("5. The agent has an order signed, and the venue verifies it")
	if err := w.write("order.json", order(client.NewID())); err != nil {
		return err
	}
	jws, err := w.run(ctx, "sign", "--socket", w.socket(), "--action", w.path("order.json"))
	if err != nil {
		return err
	}
	if err := w.write("order.jws", jws); err != nil {
		return err
	}
	out, err := w.run(ctx, w.verifyArgs("order.jws", "--replay-db", w.path("venue.db"))...)
	if err != nil {
		return err
	}
	w.say("   %s", strings.ReplaceAll(strings.TrimSpace(out), "\n", "\n   "))
	if w.keptJWS, err = w.run(ctx, "sign", "--socket", w.socket(), "--action", w.path("order.json"), "--new-id"); err != nil {
		return err
	}
	out, err = w.run(ctx, "audit", "verify", "--log", w.path("state", "mm-07", "log.db"), "--ca", w.path("issuer", "ca.pem"), "--journal", w.path("state", "signatures.journal"))
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(out, "\n")
	w.say("   %s", first)
	if !strings.Contains(first, "verifies: 2 entries") {
		return errors.New("the record does not have the two orders")
	}
	out, err = w.run(ctx, "doctor", "--config", w.path("signer.yaml"), "--json")
	if err != nil {
		return err
	}
	var report struct {
		Findings []struct{ State string }
		Refused  int
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		return err
	}
	w.say("   %d findings, nothing would be refused", len(report.Findings))
	return nil
}

func (w *world) verifyArgs(jws string, more ...string) []string {
	return append([]string{"verify", "--ca", w.path("issuer", "ca.pem"), "--audience", "XPAR", "--crl-url", "http://" + w.addresses.Public + "/crl", "--source-address", "127.0.0.1", "--jws", w.path(jws)}, more...)
}
