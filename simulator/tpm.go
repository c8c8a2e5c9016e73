// Package simulator runs real software devices as child processes, for tests,
// the demo and people's own test runs: [StartTPM] a TPM 2.0 (swtpm) with
// endorsement key certificates, [NewSoftHSM] a PKCS#11 token,
// [StartPostgreSQL] a database server. In a test one
// line does: simulator.TPMForTest(t).
package simulator

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// ErrMissing: a program that the simulator runs is not installed. The message
// says which command installs it.
var ErrMissing = errors.New("not installed")

// TPM is a running software TPM. Its methods are not for concurrent use.
type TPM struct {
	// Address is what tpm.Open takes: the path of a unix socket.
	Address string
	// Dir holds state, certificates and log.
	Dir string

	child *child
}

// maxSocketPath is what sun_path holds, less the suffix of the control socket.
const maxSocketPath = 107 - len(".ctrl")

// StartTPM starts a TPM whose state is in dir, which is made if need be: with
// endorsement keys (RSA and ECC) and their certificates from a root of its
// own. It ends with this process, however that ends.
func StartTPM(ctx context.Context, dir string) (*TPM, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	t := &TPM{Dir: dir, Address: filepath.Join(dir, "sock")}
	if len(t.Address) > maxSocketPath {
		return nil, fmt.Errorf("starting a TPM: the path %s is too long for a unix socket: choose a shorter directory", t.Address)
	}
	for _, tool := range []string{"swtpm", "swtpm_setup", "certtool"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("starting a TPM: %s: %w: apt-get install swtpm swtpm-tools gnutls-bin", tool, ErrMissing)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "state"), 0o700); err != nil {
		return nil, err
	}
	if _, err := os.Stat(t.RootsFile()); errors.Is(err, os.ErrNotExist) {
		if err := t.manufacture(ctx); err != nil {
			return nil, fmt.Errorf("manufacturing a TPM: %w", err)
		}
	}
	if c, err := net.Dial("unix", t.control()); err == nil {
		return nil, errors.Join(fmt.Errorf("starting a TPM: one is up at %s: use that, or end it first", t.Address), c.Close())
	}
	return t, t.Restart()
}

// RootsFile is a PEM file with the root of the endorsement key certificates.
func (t *TPM) RootsFile() string { return filepath.Join(t.Dir, "ek-roots.pem") }

// IntermediatesFile is a PEM file with the CA below that root.
func (t *TPM) IntermediatesFile() string { return filepath.Join(t.Dir, "ek-intermediates.pem") }

// EKRoots returns the pool of RootsFile.
func (t *TPM) EKRoots() (*x509.CertPool, error) {
	b, err := os.ReadFile(t.RootsFile())
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s has no certificate", t.RootsFile())
	}
	return pool, nil
}

// manufacture makes seeds, endorsement keys and certificates, with a CA and a
// configuration that are in t.Dir alone.
func (t *TPM) manufacture(ctx context.Context) error {
	ca := filepath.Join(t.Dir, "ca")
	if err := os.MkdirAll(ca, 0o700); err != nil {
		return err
	}
	files := map[string]string{
		"localca.conf": fmt.Sprintf("statedir = %s\nsigningkey = %s/signkey.pem\nissuercert = %s/issuercert.pem\ncertserial = %s/certserial\n", ca, ca, ca, ca),
		"options.conf": "--platform-manufacturer Inkan\n--platform-version 1\n--platform-model Simulator\n",
		"setup.conf":   fmt.Sprintf("create_certs_tool = swtpm_localca\ncreate_certs_tool_config = %s/localca.conf\ncreate_certs_tool_options = %s/options.conf\n", ca, ca),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(ca, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, "swtpm_setup", "--tpm2", "--tpmstate", filepath.Join(t.Dir, "state"), "--create-ek-cert", "--create-platform-cert",
		"--lock-nvram", "--overwrite", "--config", filepath.Join(ca, "setup.conf"), "--pcr-banks", "sha256")
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+ca, "HOME="+t.Dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("swtpm_setup: %w: %s", err, strings.TrimSpace(string(out)))
	}
	for from, to := range map[string]string{"issuercert.pem": t.IntermediatesFile(), "swtpm-localca-rootca-cert.pem": t.RootsFile()} {
		b, err := os.ReadFile(filepath.Join(ca, from))
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Restart starts the TPM if it does not run; after Close or Kill that is a
// power cycle: PCRs begin anew, keys and NV stay.
func (t *TPM) Restart() error {
	if t.child != nil && t.child.running() {
		return nil
	}
	for _, s := range []string{t.Address, t.control()} {
		if err := os.Remove(s); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	c, err := startChild(filepath.Join(t.Dir, "swtpm.log"), nil, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+filepath.Join(t.Dir, "state"),
		"--server", "type=unixio,path="+t.Address, "--ctrl", "type=unixio,path="+t.control(), "--flags", "not-need-init,startup-clear")
	if err != nil {
		return err
	}
	t.child = c
	return c.waitFor(func() bool { // the path is there before anybody listens
		conn, err := net.DialTimeout("unix", t.Address, time.Second)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
}

func (t *TPM) control() string { return t.Address + ".ctrl" }

// PID of the swtpm process.
func (t *TPM) PID() int { return t.child.cmd.Process.Pid }

// Kill ends the TPM as a crash would.
func (t *TPM) Kill() error { return t.child.end(syscall.SIGKILL) }

// Close shuts the TPM down in order: the TPM saves its clock, then it ends.
func (t *TPM) Close() error {
	if t.child == nil || !t.child.running() {
		return nil
	}
	// TPM2_Shutdown(TPM_SU_CLEAR), Part 3, section 9.4: a connected client may be
	// in the way, then the TPM just ends.
	if c, err := net.DialTimeout("unix", t.Address, time.Second); err == nil {
		_ = c.SetDeadline(time.Now().Add(time.Second))
		if _, err := c.Write([]byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x45, 0, 0}); err == nil {
			_, _ = c.Read(make([]byte, 10))
		}
		_ = c.Close()
	}
	return t.child.end(syscall.SIGTERM)
}

// child is a process that the kernel ends with this one.
type child struct {
	cmd  *exec.Cmd
	done chan struct{}
	log  string
}

// startChild starts a program.
func startChild(log string, env []string, name string, args ...string) (*child, error) {
	return startChildAs(nil, "", log, env, name, args...)
}

// startChildAs starts a program as another user, if one is given, in a
// directory. The parent-death signal belongs to the thread that starts the
// child, so that thread lives as long as the child does.
func startChildAs(as *syscall.Credential, dir, log string, env []string, name string, args ...string) (*child, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = f, f, dir
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true, Credential: as}
	c := &child{cmd: cmd, done: make(chan struct{}), log: log}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer f.Close()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // how it ended does not matter: the caller ended it, or waitFor says that it is gone
		close(c.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return c, nil
}

func (c *child) running() bool {
	select {
	case <-c.done:
		return false
	default:
		return true
	}
}

func (c *child) waitFor(ready func() bool) error { return c.waitUntil(10*time.Second, ready) }

func (c *child) waitUntil(patience time.Duration, ready func() bool) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(patience)
	for !ready() {
		select {
		case <-c.done:
			b, _ := os.ReadFile(c.log)
			return fmt.Errorf("%s ended at once: %s", filepath.Base(c.cmd.Path), strings.TrimSpace(string(b)))
		case <-limit:
			_ = c.end(syscall.SIGKILL)
			return fmt.Errorf("%s was not ready after %v; see %s", filepath.Base(c.cmd.Path), patience, c.log)
		case <-tick.C:
		}
	}
	return nil
}

func (c *child) end(sig syscall.Signal) error {
	if !c.running() {
		return nil
	}
	if err := c.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-c.done:
	case <-time.After(5 * time.Second):
		if err := c.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		<-c.done
	}
	return nil
}
