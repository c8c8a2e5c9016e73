package simulator_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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

// TestNeverLeftBehind: the TPM ends with the process that started it, even if
// that is killed.
func TestNeverLeftBehind(t *testing.T) {
	pid, cmd := startAgain(t, "INKAN_SIMULATOR_DIR="+t.TempDir())
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(poll, 10_000); err != nil || n != 1 {
		t.Errorf("swtpm %d is still there after ten seconds: %v", pid, err)
	}
}

// startAgain runs this binary once more, which starts what the variable says,
// prints its process id and waits.
func startAgain(t *testing.T, variable string) (pid int, cmd *exec.Cmd) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env, cmd.Stderr = append(os.Environ(), variable), os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	return pid, cmd
}

func TestMain(m *testing.M) {
	if dir := os.Getenv("INKAN_SIMULATOR_DIR"); dir != "" {
		s, err := simulator.StartTPM(context.Background(), dir)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(s.PID())
		select {}
	}
	if dir := os.Getenv("INKAN_SIMULATOR_POSTGRES"); dir != "" {
		p, err := simulator.StartPostgreSQL(context.Background(), dir)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(p.PID())
		select {}
	}
	os.Exit(m.Run())
}

// TestStateIsKept: a restart keeps the endorsement key, a power cycle zeroes PCRs.
func TestStateIsKept(t *testing.T) {
	s := simulator.TPMForTest(t)
	if err := s.ExtendPCR(7, []byte("x")); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(s.RootsFile())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Close(), s.Restart()); err != nil {
		t.Fatal(err)
	}
	again, err := simulator.StartTPM(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Kill()
	other, err := os.ReadFile(again.RootsFile())
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(s.RootsFile())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) || bytes.Equal(before, other) {
		t.Error("roots are not kept, or two TPMs share one")
	}
}

// TestTwice: a second one in the same place leaves the first one as it is.
func TestTwice(t *testing.T) {
	first := simulator.TPMForTest(t)
	if second, err := simulator.StartTPM(t.Context(), first.Dir); err == nil || !strings.Contains(err.Error(), "one is up at "+first.Address) {
		t.Errorf("%v, %v", second, err)
	}
	c, err := net.Dial("unix", first.Address)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close() // nothing was asked
}

func TestLongPath(t *testing.T) {
	if _, err := simulator.StartTPM(t.Context(), "/tmp/"+strings.Repeat("x", 120)); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("got %v", err)
	}
}

func TestMissingTool(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := simulator.StartTPM(t.Context(), t.TempDir()); !errors.Is(err, simulator.ErrMissing) || !strings.Contains(err.Error(), "apt-get install swtpm swtpm-tools") {
		t.Errorf("got %v", err)
	}
}
