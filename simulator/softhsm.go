package simulator

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// SoftHSM is a PKCS#11 token in a directory of its own.
type SoftHSM struct {
	Module  string // path of the PKCS#11 module
	Config  string // value of SOFTHSM2_CONF
	Label   string // of the token
	PINFile string
	Dir     string
}

var softHSMModules = []string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
}

// NewSoftHSM makes a token in dir, with a fresh PIN in a file that only its owner reads.
func NewSoftHSM(ctx context.Context, dir string) (*SoftHSM, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &SoftHSM{Dir: dir, Label: "inkan", Config: filepath.Join(dir, "softhsm2.conf"), PINFile: filepath.Join(dir, "pin")}
	for _, m := range softHSMModules {
		if _, err := os.Stat(m); err == nil {
			s.Module = m
			break
		}
	}
	if _, err := exec.LookPath("softhsm2-util"); err != nil || s.Module == "" {
		return nil, fmt.Errorf("making a token: softhsm2: %w: apt-get install softhsm2", ErrMissing)
	}
	tokens := filepath.Join(dir, "tokens")
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return nil, err
	}
	if _, err := os.Stat(s.PINFile); err == nil {
		return s, nil // made before
	}
	conf := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", tokens)
	if err := os.WriteFile(s.Config, []byte(conf), 0o600); err != nil {
		return nil, err
	}
	// The tool takes PINs from a terminal or from flags alone. A flag shows in
	// process listings for a moment; this token guards nothing but tests.
	pin := rand.Text()[:16]
	cmd := exec.CommandContext(ctx, "softhsm2-util", "--init-token", "--free", "--label", s.Label, "--so-pin", rand.Text()[:16], "--pin", pin)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+s.Config)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("softhsm2-util: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return s, os.WriteFile(s.PINFile, []byte(pin+"\n"), 0o600)
}

// SoftHSMForTest makes a token for a test.
func SoftHSMForTest(tb testing.TB) *SoftHSM {
	tb.Helper()
	s, err := NewSoftHSM(tb.Context(), tb.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	return s
}
