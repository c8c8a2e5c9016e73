package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// How long one TPM command may take: making an RSA key on hardware can take
// most of a minute.
const commandTimeout = 90 * time.Second

// maxResponse is the largest response of a TPM, in bytes.
const maxResponse = 8 << 10

// errLink: the connection broke; what was loaded over it may be gone.
var errLink = errors.New("the connection to the TPM broke")

// link is the connection to a TPM: one command at a time. It connects when
// first used and again after it broke.
type link struct {
	address string
	socket  bool
	rw      io.ReadWriteCloser
	epoch   int // grows with each connection
}

func newLink(address string) (*link, error) {
	fi, err := os.Stat(address)
	if err != nil {
		return nil, explainOpen(address, err)
	}
	switch {
	case fi.Mode()&fs.ModeSocket != 0:
		return &link{address: address, socket: true}, nil
	case fi.Mode()&fs.ModeCharDevice != 0:
		return &link{address: address}, nil
	}
	return nil, fmt.Errorf("opening %s: it is neither a TPM device nor a unix socket", address)
}

func (l *link) connect() error {
	if l.rw != nil {
		return nil
	}
	if l.socket {
		c, err := net.DialTimeout("unix", l.address, 5*time.Second)
		if err != nil {
			return explainOpen(l.address, err)
		}
		l.rw = c
	} else {
		// In blocking mode: os.OpenFile would switch it off, and then the kernel takes a
		// command and answers a read with nothing until the TPM is done.
		fd, err := syscall.Open(l.address, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		if err != nil {
			return explainOpen(l.address, err)
		}
		l.rw = os.NewFile(uintptr(fd), l.address)
	}
	l.epoch++
	return nil
}

func (l *link) close() {
	if l.rw != nil {
		_ = l.rw.Close() // nothing is buffered in it
		l.rw = nil
	}
}

// Send implements go-tpm's transport.TPM. The TPM asks for a command again
// when it is busy (TPM_RC_RETRY, TPM_RC_YIELDED, TPM_RC_TESTING).
func (l *link) Send(command []byte) ([]byte, error) {
	wait := 2 * time.Millisecond
	for end := time.Now().Add(10 * time.Second); ; {
		res, err := l.exchange(command)
		if err != nil {
			l.close()
			return nil, fmt.Errorf("%w: %w", errLink, err)
		}
		rc := tpm2.TPMRC(binary.BigEndian.Uint32(res[6:]))
		busy := rc == tpm2.TPMRCRetry || rc == tpm2.TPMRCYielded || rc == tpm2.TPMRCTesting
		if !busy || time.Now().After(end) {
			return res, nil
		}
		time.Sleep(wait) // the TPM asked for it
		wait = min(2*wait, 200*time.Millisecond)
	}
}

func (l *link) exchange(command []byte) ([]byte, error) {
	if err := l.connect(); err != nil {
		return nil, err
	}
	if c, ok := l.rw.(net.Conn); ok {
		if err := c.SetDeadline(time.Now().Add(commandTimeout)); err != nil {
			return nil, err
		}
	}
	if _, err := l.rw.Write(command); err != nil {
		return nil, err
	}
	// A device gives a response in one read; a socket may take several.
	buf := make([]byte, maxResponse)
	n, err := io.ReadAtLeast(l.rw, buf, 10)
	if err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint32(buf[2:]))
	if size < 10 || size > len(buf) || n > size {
		return nil, fmt.Errorf("a response of %d bytes that says it has %d", n, size)
	}
	if _, err := io.ReadFull(l.rw, buf[n:size]); err != nil {
		return nil, err
	}
	if binary.BigEndian.Uint16(buf) == 0x00c4 { // TPM_TAG_RSP_COMMAND of TPM 1.2
		return nil, ErrTPM12
	}
	return buf[:size], nil
}
