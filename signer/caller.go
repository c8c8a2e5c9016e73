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
	"sync/atomic"
	"syscall"
	"time"

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

	stranger atomic.Int32 // another process that sent something on the connection; 0: none
	bound    *binding     // the process was started as an agent; set before the agent's first request
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

// passCredentials has the kernel state the sender with everything that arrives.
func passCredentials(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
	return errors.Join(err, inner)
}

// alive: the process behind the pidfd still runs, so what /proc says of its
// number is said of it.
func (p *peer) alive() bool { return !ended(uintptr(p.pidfd)) }

// ended: a pidfd is readable once its process has ended; unlike a signal, that
// can be asked of any user's process. What cannot be asked counts as ended.
func ended(pidfd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err != nil || n != 0
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
	if sum, ok := d.known(idOf(&st)); ok {
		return sum, nil
	}
	f, err := os.Open(link)
	if err != nil {
		return [32]byte{}, err
	}
	defer f.Close()
	sum, _, err := d.ofFile(f) // what was opened counts: the process may have executed another file since
	return sum, err
}

func (d *digestCache) known(id fileID) (sum [32]byte, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	sum, ok = d.seen[id]
	return sum, ok
}

// ofFile returns the digest of an open file, and by what that file is known.
func (d *digestCache) ofFile(f *os.File) ([32]byte, fileID, error) {
	id, err := identityOf(f)
	if err != nil {
		return [32]byte{}, id, err
	}
	if sum, ok := d.known(id); ok {
		return sum, id, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<62)); err != nil {
		return [32]byte{}, id, err
	}
	sum := [32]byte(h.Sum(nil))
	again, err := identityOf(f)
	switch {
	case err != nil:
		return [32]byte{}, id, err
	case again != id:
		return [32]byte{}, id, fmt.Errorf("%s was changed while it was read", f.Name())
	case time.Since(time.Unix(id.ctime.Sec, id.ctime.Nsec)) < 2*time.Second:
		// What changed a moment ago could change once more without its times
		// showing it, so it is read again the next time.
		return sum, id, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.seen == nil || len(d.seen) > 1024 {
		d.seen = make(map[fileID][32]byte)
	}
	d.seen[id] = sum
	return sum, id, nil
}

// identityOf says by what an open file is known.
func identityOf(f *os.File) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fileID{}, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return idOf(&st), nil
}

func idOf(st *unix.Stat_t) fileID {
	return fileID{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
}
