package caller_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"inkan/internal/caller"
)

// accepted returns both ends of a TCP connection.
func accepted(t *testing.T, l net.Listener) (theirs, ours net.Conn) {
	t.Helper()
	theirs, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if ours, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = theirs.Close(), ours.Close() })
	return theirs, ours
}

func addresses(c net.Conn) (theirs, ours netip.AddrPort) {
	return c.RemoteAddr().(*net.TCPAddr).AddrPort(), c.LocalAddr().(*net.TCPAddr).AddrPort()
}

func TestOwners(t *testing.T) {
	o, err := caller.NewOwners()
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		theirs, ours := accepted(t, l)
		if uid, err := o.UID(addresses(ours)); err != nil || int(uid) != os.Getuid() {
			t.Errorf("%s: user %d, %v", at, uid, err)
		}
		// A socket that was closed is nobody's, and not root's.
		if _, err := theirs.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := theirs.Close(); err != nil {
			t.Fatal(err)
		}
		if uid, err := o.UID(addresses(ours)); !errors.Is(err, caller.ErrNoOwner) {
			t.Errorf("%s: a closed socket is user %d's, %v", at, uid, err)
		}
	}
	if _, err := o.UID(netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("127.0.0.1:1")); err == nil {
		t.Error("an address of another host has an owner")
	}
}

// TestOwnerIsAnotherUser: the connection of a process of another user.
func TestOwnerIsAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("run as root: the test starts a process as another user")
	}
	o, err := caller.NewOwners()
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "curl", "-sN", "telnet://"+l.Addr().String())
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := cmd.Start(); err != nil {
		t.Fatalf("curl: apt-get install curl: %v", err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if uid, err := o.UID(addresses(c)); err != nil || uid != 65534 {
		t.Errorf("user %d, %v", uid, err)
	}
	_ = c.Close()
	cancel()
	_ = cmd.Wait() // it was ended
}

// TestStranger: what another process sends on a connection shows.
func TestStranger(t *testing.T) {
	l, err := caller.Listen(filepath.Join(t.TempDir(), "s"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	theirs, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	u, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	p, err := caller.Identify(u)
	if err != nil {
		t.Fatal(err)
	}
	c := caller.NewConn(u, p)
	defer c.Close()
	b := make([]byte, 16)
	if _, err := theirs.Write([]byte("own")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(b); err != nil || p.Stranger() != 0 || int(p.UID) != os.Getuid() || !p.Alive() {
		t.Fatalf("its own bytes: stranger %d, %v", p.Stranger(), err)
	}
	f, err := theirs.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "echo stolen >&3")
	cmd.ExtraFiles = []*os.File{f}
	if err := errors.Join(cmd.Run(), f.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(b); err != nil || p.Stranger() == 0 {
		t.Errorf("another process's bytes: stranger %d, %v", p.Stranger(), err)
	}
}

func TestUnitOf(t *testing.T) {
	for text, want := range map[string]string{"0::/system.slice/a.service\n": "a.service", "0::/user.slice/u.scope/x\n": "u.scope", "0::/\n": "", "1:cpu:/b.service\n": ""} {
		if got := caller.UnitOf(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}
