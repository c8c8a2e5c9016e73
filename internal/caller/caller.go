// Package caller says which process of this host is at the other end of a
// connection: [Accept] for a unix socket, [Owners] for TCP on the loopback.
package caller

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is the process that opened a connection on a unix socket. Its pidfd
// names that very process for as long as it is open: a number that is used
// again is not it.
type Process struct {
	UID   uint32
	PID   int32
	Pidfd int

	stranger atomic.Int32
}

// Identify asks the kernel who is at the other end (SO_PEERCRED and, from
// Linux 6.5 on, SO_PEERPIDFD). Without a pidfd nobody can be identified. Close it.
func Identify(c *net.UnixConn) (*Process, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	p := &Process{Pidfd: -1}
	var inner error
	if err := raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			inner = err
			return
		}
		p.UID, p.PID = cred.Uid, cred.Pid
		p.Pidfd, inner = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return nil, err
	}
	if inner != nil {
		return nil, fmt.Errorf("identifying the caller needs Linux 6.5 (SO_PEERPIDFD): %w", inner)
	}
	unix.CloseOnExec(p.Pidfd)
	return p, nil
}

// Close closes the pidfd.
func (p *Process) Close() { _ = unix.Close(p.Pidfd) }

// Stranger is the number of another process that sent something on the
// connection: -1 where the kernel did not say which, 0 if there was none.
func (p *Process) Stranger() int32 { return p.stranger.Load() }

// Alive: the process behind the pidfd still runs, so what /proc says of its
// number is said of it.
func (p *Process) Alive() bool { return !Ended(uintptr(p.Pidfd)) }

// Ended: a pidfd is readable once its process has ended; unlike a signal, that
// can be asked of any user's process. What cannot be asked counts as ended.
func Ended(pidfd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err != nil || n != 0
	}
}

// ErrGone is that the process has ended.
var ErrGone = errors.New("the calling process is gone")

// Unit returns the process's systemd unit; empty where it has none.
func (p *Process) Unit() (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID))
	if err != nil {
		return "", fmt.Errorf("identifying the caller: %w", err)
	}
	if !p.Alive() {
		return "", ErrGone
	}
	return UnitOf(string(b)), nil
}

// UnitOf finds the innermost unit in /proc/PID/cgroup (cgroup v2: one line "0::/path").
func UnitOf(cgroup string) string {
	for line := range strings.Lines(cgroup) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		parts := strings.Split(path, "/")
		for i := len(parts) - 1; i >= 0; i-- {
			if strings.HasSuffix(parts[i], ".service") || strings.HasSuffix(parts[i], ".scope") {
				return parts[i]
			}
		}
	}
	return ""
}

// Listen listens on a socket at path, with a mode, whose connections are for
// [NewConn]: the kernel states the sender with everything that arrives on them. That holds before
// anybody can connect, since connections inherit it from their listener when they are made.
// A socket that is left over from a crash is removed; one that answers is not.
func Listen(path string, mode fs.FileMode) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("%s exists and is not a socket", path)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = c.Close()
			return nil, fmt.Errorf("%s: another process is listening", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error { return passCredentials(raw) }}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l.(*net.UnixListener), nil
}

// PassCredentials does for a listener that was made elsewhere what [Listen]
// does. What arrives from whoever connected before has no sender: they must connect again.
func PassCredentials(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return passCredentials(raw)
}

func passCredentials(raw syscall.RawConn) error {
	var inner error
	err := raw.Control(func(fd uintptr) { inner = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
	return errors.Join(err, inner)
}

// Conn is a connection whose sender the kernel states; Process is nil if it
// could not be identified. The pidfd lives as long as the connection.
type Conn struct {
	*net.UnixConn
	Process *Process

	once    sync.Once
	reading sync.Mutex
	oob     []byte // guarded by reading
}

// NewConn wraps an accepted connection of [Listen], or of a listener with [PassCredentials].
func NewConn(c *net.UnixConn, p *Process) *Conn {
	return &Conn{UnixConn: c, Process: p, oob: make([]byte, unix.CmsgSpace(unix.SizeofUcred))}
}

// Read implements net.Conn. The kernel states who sent the bytes, and never joins
// those of two processes in one read; one stranger spoils the connection. There
// is no room for descriptors: those that are sent are not taken.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.reading.Lock()
	defer c.reading.Unlock()
	n, oobn, _, _, err := c.ReadMsgUnix(b, c.oob)
	if n > 0 && c.Process != nil {
		if sender := senderOf(c.oob[:oobn]); sender != c.Process.PID {
			c.Process.stranger.Store(sender)
		}
	}
	return n, err
}

// Close closes the connection and the pidfd.
func (c *Conn) Close() error {
	err := c.UnixConn.Close()
	c.once.Do(func() {
		if c.Process != nil {
			c.Process.Close()
		}
	})
	return err
}

// senderOf returns the number of the process that sent a message, -1 where it is not stated.
func senderOf(oob []byte) int32 {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1
	}
	for i := range messages {
		if messages[i].Header.Type == unix.SCM_CREDENTIALS {
			if cred, err := unix.ParseUnixCredentials(&messages[i]); err == nil && cred.Pid != 0 {
				return cred.Pid
			}
		}
	}
	return -1
}
