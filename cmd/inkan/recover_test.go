package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"inkan/signer"
)

// TestRecoverAfterUpdate: a signer that was replaced by another build signs nothing, and says
// what to do; after the command it goes on where the record ended, with all that was used.
func TestRecoverAfterUpdate(t *testing.T) {
	h := newHost(t, strings.Replace(gateScope, `"max_order_notional"`, `"max_notional_per_window":[{"amount":"10000","currency":"EUR","window":{"rolling_s":3600}}],"max_order_notional"`, 1))
	first, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(t.TempDir(), "inkan")
	if err := os.WriteFile(second, append(b, 0), 0o700); err != nil { // the same program, with another digest
		t.Fatal(err)
	}
	var log *bytes.Buffer // of the signer that runs
	stop := func() {}
	stops := func() {
		t.Helper()
		stop()
		stop = func() {}
	}
	starts := func(program string) {
		t.Helper()
		stops()
		log = new(bytes.Buffer)
		end := startProgram(t, program, log, new(struct{ Socket string }), "signer", "serve", "--config", h.path("signer.yaml"))
		stop = func() {
			t.Helper()
			if err := end(); err != nil {
				t.Fatalf("the signer ended so: %v: %s", err, log)
			}
		}
	}
	show := []string{"audit", "show", "--log", h.path("state/mm-07/log.db")}
	record := func() (entries []string) {
		t.Helper()
		for _, e := range fromJSON[[]json.RawMessage](t, h.must(t, append(show, "--json")...)) {
			entries = append(entries, string(e))
		}
		return entries
	}
	const next = "if the signer was updated, have an operator run inkan signer recover"
	recovers := []string{"signer", "recover", "--socket", h.path("s"), "--agent", "mm-07", "--reason", "updated to the next version"}

	starts(first)
	order := h.order(t, 100) // 5,000
	signed := h.must(t, h.sign(order)...)
	if code, _, errs := call("", recovers...); code == 0 || !strings.Contains(errs, "nothing was found") {
		t.Errorf("a recovery of what is in order: exit code %d: %s", code, errs)
	}
	starts(second)
	stops()
	if !strings.Contains(log.String(), next) {
		t.Errorf("the log of the start does not say what to do: %s", log)
	}
	for range 2 { // it does not heal by itself
		starts(second)
		h.refused(t, "an order at the other build", next, h.sign(h.order(t, 1))...)
		h.refused(t, "an order that was signed before", next, h.sign(order)...)
		if status := h.must(t, "status", "--socket", h.path("s")); !strings.Contains(status, "found (program): inkan signer recover") {
			t.Errorf("the status does not say what to do: %s", status)
		}
	}
	starts(first)
	h.must(t, h.sign(h.order(t, 1))...) // the first build is in its place again, and nothing has happened
	stops()
	before := record()

	starts(second)
	out := h.must(t, append(recovers, "--json")...)
	if got := fromJSON[signer.Recovered](t, out); got.Cause != "program" || got.Counter != 3 {
		t.Errorf("recovered: %s", out)
	}
	if again := h.must(t, h.sign(order)...); again != signed {
		t.Error("an order that was signed before is another one now")
	}
	h.refused(t, "an order above what is left", "max_notional_per_window", h.sign(h.order(t, 100))...)
	h.verifies(t, h.must(t, h.sign(h.order(t, 99))...)) // 10,000 with those before
	starts(second)
	h.refused(t, "an order above what is left, after a restart", "max_notional_per_window", h.sign(h.order(t, 1))...)
	h.must(t, "audit", "checkpoint", "--socket", h.path("s"))
	starts(first)
	h.refused(t, "an order at the older build, put back", next, h.sign(h.order(t, 1))...)
	stops()

	after := record()
	if len(before) != 2 || len(after) <= 2 || !slices.Equal(before, after[:2]) {
		t.Errorf("the record had %d entries and has %d, and they do not begin alike", len(before), len(after))
	}
	if text := h.must(t, show...); !strings.Contains(text, "updated to the next version") {
		t.Errorf("the record does not say why it was taken up again: %s", text)
	}
	h.must(t, "audit", "verify", "--log", h.path("state/mm-07/log.db"), "--ca", h.path("issuer/ca.pem"))
}
