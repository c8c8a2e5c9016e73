package simulator

import (
	"os"
	"testing"
)

// TPMForTest starts a TPM for a test and ends it with the test. It fails the
// test where swtpm is missing, and says what installs it.
func TPMForTest(tb testing.TB) *TPM {
	tb.Helper()
	dir, err := os.MkdirTemp("", "tpm") // shorter than tb.TempDir, for the socket's sake
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	t, err := StartTPM(tb.Context(), dir)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := t.Kill(); err != nil {
			tb.Error(err)
		}
	})
	return t
}

// PostgreSQLForTest starts a database server for a test and ends it with the
// test. It fails the test where PostgreSQL is missing, and says what installs it.
func PostgreSQLForTest(tb testing.TB) *PostgreSQL {
	tb.Helper()
	dir, err := os.MkdirTemp("", "pg") // shorter than tb.TempDir, and another user can get at it
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	p, err := StartPostgreSQL(tb.Context(), dir)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := p.Close(); err != nil {
			tb.Error(err)
		}
	})
	return p
}

// FreePortForTest is one of FreePorts for a test.
func FreePortForTest(t testing.TB) string {
	t.Helper()
	list, err := FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	return list[0]
}
