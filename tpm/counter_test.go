package tpm_test

import (
	"errors"
	"fmt"
	"os/exec"
	"testing"

	"inkan/simulator"
	"inkan/tpm"
)

// TestCounter: a record counter goes up by one, stays exact over a shutdown in
// order, jumps within its slack after a loss of power, and never goes back.
func TestCounter(t *testing.T) {
	sim := simulator.TPMForTest(t)
	d, err := tpm.Open(sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	c := d.Counter("mm-07")
	read := func() tpm.CounterReading {
		t.Helper()
		r, err := c.Read()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	advance := func(from, target, want uint64) uint64 {
		t.Helper()
		v, _, err := c.Advance(from, target)
		if err != nil {
			t.Fatal(err)
		}
		if want != 0 && v != want {
			t.Fatalf("advanced from %d to %d: it is %d", from, target, v)
		}
		return v
	}
	cycle := func(end func() error) {
		t.Helper()
		d.Release()
		if err := errors.Join(end(), sim.Restart()); err != nil {
			t.Fatal(err)
		}
	}

	if _, err := c.Read(); !errors.Is(err, tpm.ErrNoCounter) {
		t.Fatalf("there is no counter yet: %v", err)
	}
	if _, _, err := c.Advance(0, 1); !errors.Is(err, tpm.ErrNoCounter) {
		t.Fatalf("there is no counter yet: %v", err)
	}
	for range 2 { // a second time changes nothing
		if err := c.Make(); err != nil {
			t.Fatal(err)
		}
	}
	if r := read(); r.Value != 0 || r.Slack == 0 || r.Device == [32]byte{} {
		t.Fatalf("a new counter: %+v", r)
	}
	first := advance(0, 0, 0)
	advance(first, first+1, first+1)
	advance(first+1, first+4, first+4)
	if v, moved, err := c.Advance(first, first+9); err != nil || moved || v != first+4 { // somebody else was there
		t.Fatalf("advanced from a value that it does not have: %d, %v, %v", v, moved, err)
	}

	before := read()
	cycle(sim.Close)
	after := read()
	if after.Value != before.Value || after.Resets == before.Resets && after.Restarts == before.Restarts {
		t.Errorf("after a shutdown in order: %+v, before %+v", after, before)
	}
	if after.Device != before.Device {
		t.Error("the TPM has another name after a restart")
	}
	advance(after.Value, after.Value+1, after.Value+1)

	before = read()
	cycle(sim.Kill)
	after = read()
	if after.Value < before.Value || after.Value-before.Value > after.Slack || after.Resets == before.Resets {
		t.Errorf("after a loss of power: %+v, before %+v", after, before)
	}

	// Removed and made again it does not go back.
	d.Release()
	if out, err := exec.Command("tpm2_nvundefine", "-T", "swtpm:path="+sim.Address, "-C", "o", fmt.Sprintf("%#x", tpm.CounterIndex("mm-07"))).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := c.Make(); err != nil {
		t.Fatal(err)
	}
	if v := advance(0, 0, 0); v <= after.Value {
		t.Errorf("removed and made again it has %d, before %d", v, after.Value)
	}

	// Another TPM has another name.
	other := simulator.TPMForTest(t)
	d2, err := tpm.Open(other.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer d2.Close()
	c2 := d2.Counter("mm-07")
	if err := c2.Make(); err != nil {
		t.Fatal(err)
	}
	r2, err := c2.Read()
	if err != nil {
		t.Fatal(err)
	}
	if r2.Device == after.Device {
		t.Error("two TPMs have one name")
	}
}

// TestCounterIndexInUse: what is at the index and is no record counter stays as it is.
func TestCounterIndexInUse(t *testing.T) {
	sim := simulator.TPMForTest(t)
	if out, err := exec.Command("tpm2_nvdefine", "-T", "swtpm:path="+sim.Address, "-C", "o", "-s", "8", fmt.Sprintf("%#x", tpm.CounterIndex("mm-07"))).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d, err := tpm.Open(sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Counter("mm-07").Make(); !errors.Is(err, tpm.ErrOtherCounter) {
		t.Errorf("Make: %v", err)
	}
	if _, err := d.Counter("mm-07").Read(); !errors.Is(err, tpm.ErrOtherCounter) {
		t.Errorf("Read: %v", err)
	}
}

// TestCounterOwner: to make a counter takes the owner's authorization, to use it does not.
func TestCounterOwner(t *testing.T) {
	h := newHost(t)
	if out, err := tool(t, h, "tpm2_changeauth", "-c", "o", "secret"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := h.dev.Counter("a").Make(); !errors.Is(err, tpm.ErrHierarchyAuth) {
		t.Errorf("without the owner's authorization: %v", err)
	}
	d, err := tpm.OpenWith(h.sim.Address, tpm.Options{OwnerAuth: []byte("secret")})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Counter("a").Make(); err != nil {
		t.Errorf("with it: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if v, moved, err := h.dev.Counter("a").Advance(0, 0); err != nil || v == 0 || !moved {
		t.Errorf("to increment it: %d, %v", v, err)
	}
}
