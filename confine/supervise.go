package confine

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"inkan/scope"
)

// supervisedVariable has the number of the descriptor on which a child of a
// supervisor hands over the listener of its filter.
const supervisedVariable = "INKAN_SUPERVISOR_FD"

// NeedsSupervisor says that the section allows some port in some networks and
// not in others. Landlock knows ports alone, so each connect(2) is then decided
// by a parent process: see [Supervise].
func NeedsSupervisor(o *scope.OS) bool { return needsSupervisor(o) }

// Supervisor returns the connection to the supervisor that started this
// process; nil if there is none.
func Supervisor() (*os.File, error) {
	text := os.Getenv(supervisedVariable)
	if text == "" {
		return nil, nil
	}
	fd, err := strconv.Atoi(text)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%s is not the number of a descriptor", supervisedVariable)
	}
	unix.CloseOnExec(fd)
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", supervisedVariable, err)
	}
	// It decides what is connected to, so it must be this very program.
	var own, its unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/exe", &own), unix.Stat(fmt.Sprintf("/proc/%d/exe", os.Getppid()), &its)); err != nil {
		return nil, err
	}
	if int(cred.Pid) != os.Getppid() || own.Dev != its.Dev || own.Ino != its.Ino {
		return nil, fmt.Errorf("%s: the supervisor is not the parent process, or another program", supervisedVariable)
	}
	return os.NewFile(uintptr(fd), "supervisor"), nil
}

// handOver gives the filter's listener to the supervisor, with the digest of
// the section that it must decide by.
func (s *Start) handOver(listener int) error {
	if s.supervisor == nil {
		return errors.New("networks need a supervisor, and there is none")
	}
	sum := s.os.Digest()
	if err := unix.Sendmsg(int(s.supervisor.Fd()), sum[:], unix.UnixRights(listener), nil, 0); err != nil {
		return fmt.Errorf("handing over to the supervisor: %w", err)
	}
	return nil
}

// Supervise runs this program again with the same arguments as a child that
// confines itself, and decides its connections by o until it ends. It returns
// the child's exit code, 128 and the signal's number if a signal ended it. The child dies with it.
func Supervise(o *scope.OS) (code int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	own, its := os.NewFile(uintptr(pair[0]), "child"), os.NewFile(uintptr(pair[1]), "supervisor")
	defer own.Close()
	runtime.LockOSThread() // the child dies with the thread that made it
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{its}
	cmd.Env = append(os.Environ(), supervisedVariable+"=3")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// A terminal sends these to the child itself.
	signal.Ignore(syscall.SIGINT, syscall.SIGQUIT)
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	err = cmd.Start()
	if err = errors.Join(err, its.Close()); err != nil {
		return 0, err
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // it may have ended just now
		}
	}()
	go func() {
		// Whatever goes wrong here, the kernel refuses the connections that nobody decides.
		if err := decide(own, o); err != nil {
			fmt.Fprintf(os.Stderr, "inkan: supervising: %v\n", err)
			_ = cmd.Process.Kill()
		}
	}()
	err = cmd.Wait()
	if x, ok := errors.AsType[*exec.ExitError](err); ok {
		if st, ok := x.Sys().(syscall.WaitStatus); ok && st.Signaled() {
			return 128 + int(st.Signal()), nil
		}
		return x.ExitCode(), nil
	}
	return 0, err
}

// decide receives the listener and answers its notifications until the last
// process under the filter has ended.
func decide(child *os.File, o *scope.OS) error {
	sum := o.Digest()
	b, oob := make([]byte, len(sum)+1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(int(child.Fd()), b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return err
	}
	if n == 0 {
		return nil // it ended before it was confined, and has said why
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return errors.New("no listener came")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return errors.New("no listener came")
	}
	defer unix.Close(fds[0])
	if string(b[:n]) != string(sum[:]) {
		return errors.New("the scope changed during the start: start the agent again")
	}
	for {
		poll := []unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return err
		}
		if poll[0].Revents&unix.POLLIN == 0 {
			return nil // nobody is left
		}
		var req notification
		if err := control(fds[0], notifReceive, unsafe.Pointer(&req)); err != nil {
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) {
				continue // the caller is gone
			}
			return err
		}
		go func() {
			res := response{id: req.id, err: -int32(connect(fds[0], &req, o))}
			_ = control(fds[0], notifSend, unsafe.Pointer(&res)) // the caller may be gone
		}()
	}
}

// notification is struct seccomp_notif, response struct seccomp_notif_resp (seccomp_unotify(2)).
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type response struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// SECCOMP_IOCTL_NOTIF_RECV, _SEND and _ID_VALID: _IOWR('!', 0, 80), _IOWR('!', 1, 24), _IOW('!', 2, 8).
const (
	notifReceive = 0xc0502100
	notifSend    = 0xc0182101
	notifValid   = 0x40082102
)

func control(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// connect decides a connect(2) and, if it is allowed, carries it out on the
// caller's socket with the address that it looked at: a filter that let the
// caller go on itself could be shown one address and use another.
func connect(listener int, req *notification, o *scope.OS) unix.Errno {
	address, err := readMemory(int(req.pid), uintptr(req.args[1]), req.args[2])
	if err != nil {
		return unix.EFAULT
	}
	to, ok := addressOf(address)
	if !ok {
		return unix.EAFNOSUPPORT
	}
	if !connects(o, to) {
		return unix.EACCES
	}
	tgid, err := leader(int(req.pid))
	if err != nil {
		return unix.EACCES
	}
	process, err := unix.PidfdOpen(tgid, 0)
	if err != nil {
		return unix.EACCES
	}
	defer unix.Close(process)
	// Only now is it sure that the number was the caller's.
	if err := control(listener, notifValid, unsafe.Pointer(&req.id)); err != nil {
		return unix.EACCES
	}
	sock, err := unix.PidfdGetfd(process, int(int32(req.args[0])), 0)
	if err != nil {
		return unix.EBADF
	}
	defer unix.Close(sock)
	if p, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || p != unix.IPPROTO_TCP {
		return unix.EACCES
	}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(sock), uintptr(unsafe.Pointer(&address[0])), uintptr(len(address)))
	return errno
}

// connects says whether the section allows an address.
func connects(o *scope.OS, to netip.AddrPort) bool {
	for _, c := range o.Connect {
		if c.Network.Contains(to.Addr()) {
			for _, p := range c.Ports {
				if p == to.Port() {
					return true
				}
			}
		}
	}
	return false
}

// addressOf reads a sockaddr_in or sockaddr_in6. An IPv4 address that is
// written as IPv6 is an IPv4 address.
func addressOf(b []byte) (netip.AddrPort, bool) {
	if len(b) < 2 {
		return netip.AddrPort{}, false
	}
	port := func() uint16 { return uint16(b[2])<<8 | uint16(b[3]) }
	switch family := *(*uint16)(unsafe.Pointer(&b[0])); {
	case family == unix.AF_INET && len(b) >= unix.SizeofSockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port()), true
	case family == unix.AF_INET6 && len(b) >= unix.SizeofSockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])).Unmap(), port()), true
	}
	return netip.AddrPort{}, false
}

func readMemory(pid int, at uintptr, length uint64) ([]byte, error) {
	if length == 0 || length > 128 { // of any sockaddr
		return nil, unix.EINVAL
	}
	b := make([]byte, length)
	n, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &b[0], Len: length}}, []unix.RemoteIovec{{Base: at, Len: int(length)}}, 0)
	if err != nil || n != len(b) {
		return nil, errors.Join(unix.EFAULT, err)
	}
	return b, nil
}

// leader returns the process that a thread belongs to.
func leader(tid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, "Tgid:"); ok {
			return strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return 0, errors.New("no Tgid")
}
