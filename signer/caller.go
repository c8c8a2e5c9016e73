package signer

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"inkan/internal/caller"
)

// process is a process as the kernel describes it.
type process struct {
	UID        uint32
	PID        int32
	Executable [32]byte // SHA-256 of the file that it runs
	Unit       string   // systemd unit; empty where there is none
}

// peer is the process that opened a connection.
type peer struct {
	*caller.Process
	bound *binding // the process was started as an agent; set before the agent's first request
}

// describe says what the process is now: it may have executed something else
// since it connected, so it is asked at every request.
func (p *peer) describe(digests *digestCache, wantUnit bool) (*process, error) {
	c := &process{UID: p.UID, PID: p.PID}
	var err error
	if c.Executable, err = digests.of(fmt.Sprintf("/proc/%d/exe", p.PID)); err != nil {
		return nil, &inside{"its executable could not be read", err}
	}
	if wantUnit {
		if c.Unit, err = p.Process.Unit(); err != nil && !errors.Is(err, caller.ErrGone) {
			return nil, &inside{"its unit could not be read", err}
		} else if err != nil {
			return nil, err
		}
	}
	if !p.Alive() {
		return nil, caller.ErrGone
	}
	return c, nil
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
