package main

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
)

// startApprover makes an approver and starts it.
func (w *world) startApprover(ctx context.Context) error {
	args := []string{"approver", "init", "--dir", w.path("approver"), "--trust-domain", "example.org", "--ca", w.path("issuer", "ca.pem"), "--crl-url", "http://" + w.addresses.Public + "/crl", "--listen", "127.0.0.1:0"}
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
	var ready struct{ Signers string }
	if err := w.startDaemon("approver", &ready, "approver", "serve", "--config", filepath.Join(w.path("approver"), "approver.yaml")); err != nil {
		return err
	}
	w.approverAt = append(w.approverAt, ready.Signers)
	return nil
}
