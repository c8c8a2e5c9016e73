package tpm_test

import (
	"errors"
	"strings"
	"testing"

	"inkan/tpm"
)

func TestSeal(t *testing.T) {
	h := newHost(t)
	file, err := h.dev.Seal([]byte("user:1234"), h.policies)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(file), "user:1234") {
		t.Error("the file shows the secret")
	}
	for range 3 {
		if got, err := h.dev.Unseal(file, h.policies); err != nil || string(got) != "user:1234" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	// Signing and unsealing share the session and the places for keys.
	k, _ := h.newKey(t)
	if err := signs(k); err != nil {
		t.Fatal(err)
	}
	if _, err := h.dev.Unseal(file, h.policies); err != nil {
		t.Fatal(err)
	}
	if err := signs(k); err != nil {
		t.Fatal(err)
	}

	// A stolen file is worth nothing elsewhere.
	other := newHost(t)
	if _, err := other.dev.Unseal(file, h.policies); !errors.Is(err, tpm.ErrForeignKey) {
		t.Errorf("on another TPM: %v, want %v", err, tpm.ErrForeignKey)
	}
	// Nor with the TPM's own tools and a password.
	h.dev.Release()
	if out, err := tool(t, h, "tpm2_unseal", "-c", loadWithTools(t, h, file)+"/key.ctx"); err == nil || strings.Contains(out, "1234") || !strings.Contains(out, "0x12F") {
		t.Errorf("tpm2_unseal without the policy: %v: %s", err, out)
	}
	// After a PCR change it stays sealed until the new state is approved.
	if out, err := tool(t, h, "tpm2_pcrextend", "7:sha256=0000000000000000000000000000000000000000000000000000000000000001"); err != nil {
		t.Fatal(out)
	}
	if _, err := h.dev.Unseal(file, h.policies); err == nil {
		t.Error("it was unsealed in a state that nobody approved")
	} else if p, ok := errors.AsType[*tpm.PCRError](err); !ok {
		t.Errorf("got %v, want a *PCRError", err)
	} else if strings.Contains(p.Error(), "1234") {
		t.Error("the error shows the secret")
	}
	h.approve(t, "second")
	if got, err := h.dev.Unseal(file, h.policies); err != nil || string(got) != "user:1234" {
		t.Errorf("after the new state was approved: %q, %v", got, err)
	}
}

func TestSealBadInput(t *testing.T) {
	h := newHost(t)
	if _, err := h.dev.Seal(nil, h.policies); err == nil || !strings.Contains(err.Error(), "1 to 128") {
		t.Errorf("nothing to seal: %v", err)
	}
	if _, err := h.dev.Seal(make([]byte, 129), h.policies); err == nil || !strings.Contains(err.Error(), "1 to 128") {
		t.Errorf("too much to seal: %v", err)
	}
	if _, err := h.dev.Unseal([]byte("x"), h.policies); err == nil || !strings.Contains(err.Error(), "PEM") {
		t.Errorf("no file: %v", err)
	}
	_, file := h.newKey(t)
	if _, err := h.dev.Unseal(file, h.policies); err == nil || !strings.Contains(err.Error(), "not a sealed secret") {
		t.Errorf("a key file: %v", err)
	}
}
