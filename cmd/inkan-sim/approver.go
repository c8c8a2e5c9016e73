package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"inkan/simulator"
)

// startApprover makes an approver and starts it.
func (w *world) startApprover(ctx context.Context) error {
	listen := "127.0.0.1:0"
	if w.reserve != "" { // it comes back at the same address
		ports, err := simulator.FreePorts(1)
		if err != nil {
			return err
		}
		listen = ports[0]
	}
	args := []string{"approver", "init", "--dir", w.path("approver"), "--trust-domain", "example.org", "--ca", w.path("issuer", "ca.pem"), "--crl-url", "http://" + w.addresses.Public + "/crl", "--listen", listen}
	agents := w.agents
	if w.bot != nil {
		agents = append(slices.Clone(agents), w.bot.name)
	}
	for _, a := range agents {
		args = append(args, "--agent", a)
	}
	out, err := w.run(ctx, args...)
	if err != nil {
		return err
	}
	w.say("   %s", strings.ReplaceAll(strings.TrimSpace(w.short(out)), "\n", "\n   "))
	if w.reserve != "" {
		if err := w.offerReserve(); err != nil {
			return err
		}
	}
	at, err := w.serveApprover()
	w.approverAt = append(w.approverAt, at)
	return err
}

func (w *world) serveApprover() (at string, err error) {
	var ready struct{ Signers string }
	err = w.startDaemon("approver", &ready, "approver", "serve", "--config", filepath.Join(w.path("approver"), "approver.yaml"))
	return ready.Signers, err
}

// offerReserve has the approver consent to the first agent's reserve.
func (w *world) offerReserve() error {
	if err := w.write("reserve.yaml", w.reserve); err != nil {
		return err
	}
	file := w.path("approver", "approver.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	name := "- name: " + w.agents[0] + "\n"
	if !strings.Contains(string(b), name) {
		return fmt.Errorf("%s does not have %q", file, name)
	}
	text := strings.Replace(string(b), name, fmt.Sprintf("%s      reserve: {scope: %q, for: %s}\n", name, w.path("reserve.yaml"), reserveFor), 1)
	return os.WriteFile(file, []byte(text), 0o644)
}
