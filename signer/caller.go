package signer

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// caller is a process as the kernel describes it.
type caller struct {
	UID        uint32
	PID        int32
	Executable [32]byte // SHA-256 of the file that it runs
	Unit       string   // systemd unit; empty where there is none
}

// peer is the process that opened a connection. Its pidfd names that very
// process for as long as it is open: a number that is used again is not it.
type peer struct {
	uid   uint32
	pid   int32
	pidfd int
}

// identify asks the kernel who is at the other end (SO_PEERCRED and, from
// Linux 6.5 on, SO_PEERPIDFD). Without a pidfd nobody can be identified.
func identify(c *net.UnixConn) (*peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	p := &peer{pidfd: -1}
	var inner error
	if err := raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			inner = err
			return
		}
		p.uid, p.pid = cred.Uid, cred.Pid
		p.pidfd, inner = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return nil, err
	}
	if inner != nil {
		return nil, fmt.Errorf("identifying the caller needs Linux 6.5 (SO_PEERPIDFD): %w", inner)
	}
	unix.CloseOnExec(p.pidfd)
	return p, nil
}

func (p *peer) close() { _ = unix.Close(p.pidfd) }

// alive: the process behind the pidfd still runs, so what /proc says of its
// number is said of it.
// A pidfd is readable once its process has ended; unlike a signal, that can be
// asked of any user's process.
func (p *peer) alive() bool {
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n == 0
	}
}

var errCallerGone = errors.New("the calling process is gone")

// describe says what the process is now: it may have executed something else
// since it connected, so it is asked at every request.
func (p *peer) describe(digests *digestCache, wantUnit bool) (*caller, error) {
	c := &caller{UID: p.uid, PID: p.pid}
	var err error
	if c.Executable, err = digests.of(fmt.Sprintf("/proc/%d/exe", p.pid)); err != nil {
		return nil, fmt.Errorf("identifying the caller: %w", err)
	}
	if wantUnit {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.pid))
		if err != nil {
			return nil, fmt.Errorf("identifying the caller: %w", err)
		}
		c.Unit = unitOf(string(b))
	}
	if !p.alive() {
		return nil, errCallerGone
	}
	return c, nil
}

// unitOf finds the innermost unit in /proc/PID/cgroup (cgroup v2: one line "0::/path").
func unitOf(cgroup string) string {
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

// digestCache remembers digests of executables by what changes when a file does.
type digestCache struct {
	mu   sync.Mutex
	seen map[fileID][32]byte
}

type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// of returns the digest of the file that the link /proc/PID/exe leads to: the
// file itself, whatever its path is by now.
func (d *digestCache) of(link string) ([32]byte, error) {
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return [32]byte{}, &os.PathError{Op: "stat", Path: link, Err: err}
	}
	d.mu.Lock()
	sum, ok := d.seen[idOf(&st)]
	d.mu.Unlock()
	if ok {
		return sum, nil
	}
	f, err := os.Open(link)
	if err != nil {
		return [32]byte{}, err
	}
	defer f.Close()
	// What was opened counts: the process may have executed another file since.
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return [32]byte{}, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return [32]byte{}, err
	}
	sum = [32]byte(h.Sum(nil))
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.seen == nil || len(d.seen) > 1024 {
		d.seen = make(map[fileID][32]byte)
	}
	d.seen[idOf(&st)] = sum
	return sum, nil
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
}
