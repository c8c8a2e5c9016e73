package main

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"
)

// TestDoctorLeavesNothing: before the enrolment there is nothing, and the doctor,
// whoever runs it, makes nothing that the signer's user could then not write to.
func TestDoctorLeavesNothing(t *testing.T) {
	h := newHost(t, gateScope)
	if err := os.RemoveAll(h.path("state")); err != nil {
		t.Fatal(err)
	}
	code, out, errs := call("", "doctor", "--config", h.path("signer.yaml"))
	if !strings.Contains(out, "state does not exist") || !strings.Contains(out, "agent mm-07") {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	if _, err := os.Stat(h.path("state")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the doctor made the state directory: %v", err)
	}
}
