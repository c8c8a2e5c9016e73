package wire_test

import (
	"os"
	"path/filepath"
	"testing"

	"inkan/journal"
	"inkan/tpm"
)

// TestHandshakesAreOnTheBooks: where the TPM audits signatures, a handshake is
// in the journal of the host's signer.
func TestHandshakesAreOnTheBooks(t *testing.T) {
	h := newHost(t, "tpm")
	path := filepath.Join(filepath.Dir(h.dir), journal.FileName)
	j, err := journal.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	d, err := tpm.Open(h.options.TPM)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	testify := func() {
		t.Helper()
		if _, err := d.Testify(nil); err != nil {
			t.Fatal(err)
		}
		d.Release()
	}
	if err := d.StartAudit(j); err != nil {
		t.Fatal(err)
	}
	testify()
	i := open(t, h.options)
	if got, err := post(i.Client(h.ca.Roots), h.server.URL, "hello"); err != nil || got != "hello" {
		t.Fatalf("got %q, %v", got, err)
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
	testify()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if r, err := journal.Verify(f, journal.Options{}); err != nil || r.Signatures != 1 {
		t.Errorf("%+v, %v; 1 signature is expected", r, err)
	}
}
