package simulator

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed faultmodule/fault.c
var faultSource []byte

// FaultModule is a PKCS#11 module that passes every call on to SoftHSM and does
// harm on demand: it hangs, crashes, answers with any return value, is slow, signs wrongly, closes
// all sessions, or uses another key. It is loaded exactly as a vendor's is.
type FaultModule struct {
	Module  string // path of the PKCS#11 module
	real    string
	control string
}

// NewFaultModule builds the module beside a token. It needs gcc, and the go
// command inside this module's tree, which finds the PKCS#11 headers.
func NewFaultModule(ctx context.Context, s *SoftHSM) (*FaultModule, error) {
	headers, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		return nil, fmt.Errorf("looking for the PKCS#11 headers: %w", err)
	}
	f := &FaultModule{Module: filepath.Join(s.Dir, "fault.so"), real: s.Module, control: filepath.Join(s.Dir, "fault")}
	cmd := exec.CommandContext(ctx, "gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-I"+strings.TrimSpace(string(headers)), "-o", f.Module, "-x", "c", "-", "-ldl")
	cmd.Stdin = strings.NewReader(string(faultSource))
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the fault module: gcc (apt-get install gcc libc6-dev): %w: %s", err, out)
	}
	return f, nil
}

// Env is what the process that loads the module needs in its environment.
func (f *FaultModule) Env() []string {
	return []string{"INKAN_FAULT_MODULE=" + f.real, "INKAN_FAULT_CONTROL=" + f.control}
}

// Set has the module do harm from now on: a line "CALL FAULT [ARGUMENT]", such as
// "C_Sign hang"; "C_Sign !hang" once. faultmodule/fault.c lists calls and faults.
func (f *FaultModule) Set(line string) error {
	if err := os.WriteFile(f.control+".new", []byte(line+"\n"), 0o600); err != nil {
		return err
	}
	return os.Rename(f.control+".new", f.control)
}

// Heal has it do no more harm.
func (f *FaultModule) Heal() error {
	if err := os.Remove(f.control); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
