package simulator_test

import (
	"os"
	"testing"

	"inkan/simulator"
)

func TestTwoSideBySide(t *testing.T) {
	a, b := simulator.TPMForTest(t), simulator.TPMForTest(t)
	if a.Address == b.Address {
		t.Fatal("two TPMs share an address")
	}
	if _, err := a.EKRoots(); err != nil {
		t.Error(err)
	}
	for _, step := range []func() error{a.Kill, a.Restart, a.Close, a.Restart} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSoftHSM(t *testing.T) {
	s := simulator.SoftHSMForTest(t)
	fi, err := os.Stat(s.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o600 {
		t.Errorf("PIN file has mode %v", fi.Mode())
	}
}
