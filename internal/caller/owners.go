package caller

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Owners says which user's socket is at the other end of a TCP connection on
// this host: the kernel is asked over netlink (sock_diag(7)), so it works under a
// sandbox that was put on after [NewOwners]. It is safe for concurrent use.
type Owners struct {
	mu sync.Mutex
	fd int
	n  uint32 // of the last question
}

// Of sock_diag(7) and linux/inet_diag.h.
const (
	diagByFamily  = 20 // SOCK_DIAG_BY_FAMILY
	diagRequest   = 56 // struct inet_diag_req_v2
	diagAnswer    = 72 // struct inet_diag_msg
	stateListen   = 10 // TCP_LISTEN
	netlinkHeader = unix.SizeofNlMsghdr
)

// NewOwners opens the way to ask. Close it.
func NewOwners() (*Owners, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	// An answer comes at once or never.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	if err := unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil { // the kernel, and answers of nobody else
		return nil, errors.Join(fmt.Errorf("netlink: %w", err), unix.Close(fd))
	}
	return &Owners{fd: fd}, nil
}

// Close closes it.
func (o *Owners) Close() error { return unix.Close(o.fd) }

// ErrNoOwner is that no process has the socket open.
var ErrNoOwner = errors.New("no process of this host has the other end open")

// UID returns the user who made the socket at theirs that is connected to ours.
// A socket that no process has open any more is nobody's.
func (o *Owners) UID(theirs, ours netip.AddrPort) (uint32, error) {
	from, to := theirs.Addr().Unmap(), ours.Addr().Unmap()
	if !from.IsLoopback() || from.Is4() != to.Is4() {
		return 0, fmt.Errorf("%s is not on the loopback", theirs)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n++
	q := make([]byte, netlinkHeader+diagRequest)
	native := binary.NativeEndian
	native.PutUint32(q[0:], uint32(len(q)))
	native.PutUint16(q[4:], diagByFamily)
	native.PutUint16(q[6:], unix.NLM_F_REQUEST)
	native.PutUint32(q[8:], o.n)
	r := q[netlinkHeader:]
	r[0] = unix.AF_INET
	if from.Is6() {
		r[0] = unix.AF_INET6
	}
	r[1] = unix.IPPROTO_TCP
	native.PutUint32(r[4:], ^uint32(0)) // any state
	binary.BigEndian.PutUint16(r[8:], theirs.Port())
	binary.BigEndian.PutUint16(r[10:], ours.Port())
	copy(r[12:28], from.AsSlice())
	copy(r[28:44], to.AsSlice())
	copy(r[48:56], "\xff\xff\xff\xff\xff\xff\xff\xff") // INET_DIAG_NOCOOKIE
	if _, err := unix.Write(o.fd, q); err != nil {
		return 0, fmt.Errorf("netlink: %w", err)
	}
	for {
		b := make([]byte, 4096)
		n, err := unix.Read(o.fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("netlink: %w", err)
		}
		if n < netlinkHeader || native.Uint32(b[8:]) != o.n {
			continue // an answer that came too late
		}
		return ownerOf(b[:n], r)
	}
}

// ownerOf reads an answer: the user who made the socket that was asked for.
func ownerOf(b, asked []byte) (uint32, error) {
	native := binary.NativeEndian
	kind, m := native.Uint16(b[4:]), b[netlinkHeader:]
	if kind == unix.NLMSG_ERROR && len(m) >= 4 {
		if errno := unix.Errno(-int32(native.Uint32(m))); errno != unix.ENOENT {
			return 0, fmt.Errorf("netlink: %w", errno)
		}
		return 0, ErrNoOwner
	}
	if kind != diagByFamily || len(m) < diagAnswer {
		return 0, errors.New("netlink: the answer is not one of sock_diag")
	}
	state, uid, inode := m[1], native.Uint32(m[64:]), native.Uint32(m[68:])
	if string(m[4:8]) != string(asked[8:12]) || state == stateListen || inode == 0 {
		return 0, ErrNoOwner // without an inode no process has it open, and its user is not known
	}
	return uid, nil
}
