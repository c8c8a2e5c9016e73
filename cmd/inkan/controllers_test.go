package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"inkan/signer"
	"inkan/simulator"
)

// TestControllersKeysInDevices: people whose keys are in a token or in a TPM sign
// policies, overrides, approvals and re-arms with the command, and the signer takes them; what another
// key of the same device signs it does not.
func TestControllersKeysInDevices(t *testing.T) {
	_, tokenURI := token(t)
	desk := simulator.TPMForTest(t) // of their own, not the host's
	keys := t.TempDir()
	makes := map[string]func(name string) string{
		"pkcs11": func(name string) string { return keygen(t, "hsm", "keygen", "--token", tokenURI, "--label", name) },
		"tpm": func(name string) string {
			return keygen(t, "tpm", "keygen", "--tpm", desk.Address, "--out", filepath.Join(keys, name+".tss2.pem"))
		},
	}
	people, strangers := make(map[string]string), make(map[string]string) // URIs
	var list []string
	for kind, makesKey := range makes {
		people[kind], strangers[kind] = makesKey("risk"), makesKey("stranger")
		for _, uri := range []string{people[kind], strangers[kind]} {
			if !strings.HasPrefix(uri, kind+":") {
				t.Fatalf("the key is %s", uri)
			}
		}
		list = append(list, fmt.Sprintf(`{"key":%q,"may":["approve","override","policy","rearm"],"name":%q}`, keygen(t, "scope", "key", "--key", people[kind]), kind))
	}
	const limits = `"human_approval_above":[{"amount":"30000","currency":"EUR"}],"max_order_notional":[{"amount":"25000","block":"soft","currency":"EUR"}]`
	certified := strings.Replace(gateScope, `"max_order_notional":[{"amount":"25000","currency":"EUR"}]`, `"controllers":[`+strings.Join(list, ",")+`],`+limits, 1)
	h := newHost(t, certified)
	startCommand(t, new(struct{ Socket string }), "signer", "serve", "--config", h.path("signer.yaml"))

	// by has a person sign a document with a command, and returns its file.
	by := func(uri string, args ...string) string {
		t.Helper()
		out := filepath.Join(t.TempDir(), "document")
		h.must(t, append(args, "--agent", hostAgent, "--key", uri, "--out", out)...)
		return out
	}
	send := func(what, document string) []string {
		return []string{what, "send", "--socket", h.path("s"), "--document", document}
	}
	version := 0
	for kind, uri := range people {
		t.Run(kind, func(t *testing.T) {
			stranger := strangers[kind]

			// A policy narrows.
			version++
			today := h.write(t, "today.json", strings.Replace(strings.Replace(gateScope, `"max_order_notional":[{"amount":"25000","currency":"EUR"}]`, limits, 1), `"25000"`, fmt.Sprintf(`"%d"`, 10000-version), 1))
			policy := []string{"policy", "sign", "--scope", today, "--version", fmt.Sprint(version)}
			h.refused(t, "a stranger's policy", "control_key", send("policy", by(stranger, policy...))...)
			document := by(uri, policy...)
			h.must(t, "policy", "check", "--scope", h.path("scope.json"), "--document", document)
			h.must(t, send("policy", document)...)
			large, small := h.order(t, 200), h.order(t, 190) // 10,000 and 9,500
			h.refused(t, "an order outside the policy", fmt.Sprintf("at most %d EUR", 10000-version), h.sign(large)...)
			h.must(t, h.sign(small)...)

			// An override lifts the limit for one order.
			override := func(action string) []string {
				return []string{"override", "sign", "--action", action, "--rule", "max_order_notional", "--reason", "confirmed by telephone"}
			}
			large = h.order(t, 500)
			h.refused(t, "a stranger's override", "control_key", h.sign(large, "--authorization", by(stranger, override(large)...))...)
			large = h.order(t, 500)
			lifted := by(uri, override(large)...)
			jws := h.must(t, h.sign(large, "--authorization", lifted)...)
			h.verifies(t, jws, "--policies", filepath.Dir(document))
			if code, _, errs := call(jws, "verify", "--ca", h.path("issuer/ca.pem"), "--audience", "XPAR", "--no-revocation", "--jws", "-"); code != exitUnproven || !strings.Contains(errs, "policy") {
				t.Errorf("verified without the policy: exit code %d: %s", code, errs)
			}
			h.refused(t, "an override of another order", "authorization_action", h.sign(h.order(t, 500), "--authorization", lifted)...)

			// An approval is needed above another amount, besides.
			larger := h.order(t, 700) // 35,000
			approval := []string{"approval", "sign", "--action", larger, "--reason", "client is waiting"}
			h.must(t, h.sign(larger, "--authorization", by(uri, override(larger)...), "--authorization", by(uri, approval...))...)

			// A re-arm ends a kill.
			killed := fromJSON[[]signer.Controlled](t, h.must(t, "kill", "--socket", h.path("s"), "--agent", "mm-07", "--reason", "prices look wrong", "--json"))
			h.refused(t, "an order after a kill", "kill", h.sign(h.order(t, 1))...)
			rearm := []string{"rearm", "sign", "--entry", fmt.Sprint(killed[0].Event), "--reason", "prices checked"}
			h.refused(t, "a stranger's re-arm", "control_key", send("rearm", by(stranger, rearm...))...)
			h.must(t, send("rearm", by(uri, rearm...))...)
			h.must(t, h.sign(h.order(t, 1))...)
		})
	}
	status := fromJSON[signer.Status](t, h.must(t, "status", "--socket", h.path("s"), "--json"))
	if p := status.Agents[0].Controls.Policy; p == nil || int(p.Version) != version || len(status.Agents[0].Controls.Kills) != 0 {
		b, _ := json.Marshal(status.Agents[0].Controls)
		t.Errorf("the status says %s", b)
	}
	h.must(t, "audit", "checkpoint", "--socket", h.path("s"))
	h.must(t, "audit", "verify", "--log", h.path("state/mm-07/log.db"), "--ca", h.path("issuer/ca.pem"))
}
