package keyuri_test

import (
	"os"
	"path/filepath"
	"testing"

	"inkan/internal/keyuri"
	"inkan/simulator"
	"inkan/tpm"
)

// TestTPMPaths: the URI that is made for a key's file names that file, whatever is in its name.
func TestTPMPaths(t *testing.T) {
	sim := simulator.TPMForTest(t)
	d, err := tpm.Open(sim.Address)
	if err != nil {
		t.Fatal(err)
	}
	file, _, err := d.CreateKey(tpm.SigningTemplate())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.tss2.pem", "with space", "a+b", "a&b=c", "50%41", "a;b", "a?b#c", "ü"} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		uri, err := keyuri.TPM(sim.Address, path)
		if err != nil {
			t.Fatal(err)
		}
		again, err := keyuri.Absolute(uri)
		if err != nil || again != uri {
			t.Errorf("%s: made absolute again it is %s, %v", uri, again, err)
		}
		_, closer, err := keyuri.Open(again)
		if err != nil {
			t.Errorf("%s: %v", uri, err)
			continue
		}
		if err := closer.Close(); err != nil {
			t.Error(err)
		}
	}
}
