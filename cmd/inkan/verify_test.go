package main

import (
	"encoding/pem"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"inkan/internal/testca"
	"inkan/scope"
	"inkan/verify/binding"
)

// fixMessage builds a FIX message from its fields after BodyLength.
func fixMessage(fields ...string) []byte {
	body := strings.Join(fields, "\x01") + "\x01"
	m := fmt.Sprintf("8=FIX.4.4\x019=%d\x01%s", len(body), body)
	sum := byte(0)
	for _, c := range []byte(m) {
		sum += c
	}
	return fmt.Appendf(nil, "%s10=%03d\x01", m, sum)
}

// TestVerifyCarriers: an action that arrives in a FIX message or a WebSocket's text.
func TestVerifyCarriers(t *testing.T) {
	dir := t.TempDir()
	ca := testca.New(t)
	a := ca.Agent(t, "a", []byte(gateScope), nil)
	caFile := writeFile(t, filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate.Raw}))
	verify := func(args ...string) (int, string) {
		code, out, errs := call("", append([]string{"verify", "--ca", caFile, "--audience", "XPAR", "--no-revocation", "--replay-db", filepath.Join(dir, "seen.db")}, args...)...)
		return code, out + errs
	}
	head := []string{"35=D", "49=A", "56=B", "34=1", "52=20260727-09:30:00"}
	order := []string{"11=A-1", "48=FR0000120271", "22=4", "54=1", "60=20260727-09:30:00", "38=100", "40=2", "44=50", "15=EUR", "59=0", "58=hello"}
	plain := fixMessage(append(head, order...)...)
	m, err := binding.ParseFIX(plain)
	if err != nil {
		t.Fatal(err)
	}
	action := signedNative(t, a, 1, scope.NativeFIXBody, m.Digest())
	message, err := binding.AttachFIX(plain, action)
	if err != nil {
		t.Fatal(err)
	}
	fix := writeFile(t, filepath.Join(dir, "fix"), message)
	if code, said := verify("--fix", fix); code != exitUnproven || !strings.Contains(said, "mismatch: the message has tag 58") {
		t.Errorf("a tag that the action does not have: exit code %d: %s", code, said)
	}
	if code, said := verify("--fix", fix, "--free-tag", "58"); code != 0 || !strings.Contains(said, "accepted: order.new by "+a.ID) {
		t.Errorf("exit code %d: %s", code, said)
	}
	if code, said := verify("--fix", fix, "--free-tag", "58"); code != exitUnproven || !strings.Contains(said, "replay") {
		t.Errorf("again: exit code %d: %s", code, said)
	}
	dup, err := binding.AttachFIX(fixMessage(append([]string{"35=D", "43=Y", "122=20260727-09:30:00"}, append(head[1:], order...)...)...), action)
	if err != nil {
		t.Fatal(err)
	}
	if code, said := verify("--fix", writeFile(t, filepath.Join(dir, "dup"), dup), "--free-tag", "58", "--json"); code != 0 || !strings.Contains(said, `"resend":true`) {
		t.Errorf("a resend: exit code %d: %s", code, said)
	}

	text := []byte("BUY 100 FR0000120271 @ 50")
	frame, err := binding.NewFrame(text, signedNative(t, a, 2, scope.NativeWSText, binding.TextDigest(text)))
	if err != nil {
		t.Fatal(err)
	}
	if code, said := verify("--frame", writeFile(t, filepath.Join(dir, "frame"), frame)); code != 0 || !strings.Contains(said, "accepted: order.new") {
		t.Errorf("exit code %d: %s", code, said)
	}
	for _, args := range [][]string{{}, {"--fix", fix, "--frame", fix}, {"--fix", fix, "--jws", fix}, {"--fix", fix, "--body", fix}} {
		if code, said := verify(args...); code != exitUsage {
			t.Errorf("%v: exit code %d: %s", args, code, said)
		}
	}
}
