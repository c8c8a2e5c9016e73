package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"inkan/signer/client"
)

// A probe is an attack from inside a confined agent: this program runs as the
// agent (inkan-sim probe NAME arguments) and tries one thing. It returns nil if
// it got what it wanted, and otherwise what refused.
type probe func(args []string) error

// outcome is what a probe prints.
type outcome struct {
	Accepted bool   `json:"accepted"`
	Said     string `json:"said"`
}

// probes by name. Arguments are paths, numbers of processes and addresses.
var probes = map[string]probe{
	"sign":      func([]string) error { return askAsAgent() },
	"read":      func(a []string) error { return openAnd(a[0], unix.O_RDONLY) },
	"write":     func(a []string) error { return openAnd(a[0], unix.O_WRONLY|unix.O_CREAT) },
	"append":    func(a []string) error { return openAnd(a[0], unix.O_WRONLY|unix.O_APPEND) },
	"truncate":  func(a []string) error { return unix.Truncate(a[0], 0) },
	"rename":    func(a []string) error { return unix.Rename(a[0], a[1]) },
	"link":      func(a []string) error { return unix.Link(a[0], a[1]) },
	"chmod":     func(a []string) error { return unix.Chmod(a[0], 0o777) },
	"mknod":     func(a []string) error { return unix.Mknod(a[0], unix.S_IFCHR|0o600, int(unix.Mkdev(10, 224))) },
	"dropped":   dropped,
	"memfd":     inMemory,
	"unix":      func(a []string) error { return connectUnix(a[0], unix.SOCK_STREAM) },
	"unixgram":  sendThroughPair,
	"tcp":       connectTCP,
	"mptcp":     func([]string) error { return socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP) },
	"udp":       func([]string) error { return socket(unix.AF_INET, unix.SOCK_DGRAM, 0) },
	"raw":       func([]string) error { return socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP) },
	"packet":    func([]string) error { return socket(unix.AF_PACKET, unix.SOCK_RAW, 0) },
	"vsock":     func([]string) error { return socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) },
	"netlink":   func([]string) error { return socket(unix.AF_NETLINK, unix.SOCK_RAW, 0) },
	"alg":       func([]string) error { return socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0) },
	"fastopen":  fastOpen,
	"listen":    listenTCP,
	"io_uring":  func([]string) error { return call(unix.SYS_IO_URING_SETUP, 8, 0, 0) },
	"route":     sourceRoute,
	"ptrace":    func(a []string) error { return unix.PtraceAttach(number(a[0])) },
	"vm_readv":  readMemoryOf,
	"vm_writev": func(a []string) error { return call(unix.SYS_PROCESS_VM_WRITEV, uintptr(number(a[0])), 0, 0) },
	"getfd":     stealDescriptor,
	"kcmp":      func(a []string) error { return call(unix.SYS_KCMP, uintptr(number(a[0])), uintptr(os.Getpid()), 0) },
	"signal":    func(a []string) error { return unix.Kill(number(a[0]), unix.SIGCONT) },
	"limits": func(a []string) error {
		return unix.Prlimit(number(a[0]), unix.RLIMIT_CPU, &unix.Rlimit{Cur: 1, Max: 1}, nil)
	},
	"userns":  func([]string) error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"clonens": func([]string) error { return call(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD), 0, 0) },
	"mount":   func(a []string) error { return unix.Mount("none", a[0], "tmpfs", 0, "") },
	"bpf":     func([]string) error { return call(unix.SYS_BPF, 0, 0, 0) },
	"keyctl": func([]string) error {
		_, err := unix.KeyctlInt(unix.KEYCTL_GET_KEYRING_ID, unix.KEY_SPEC_USER_KEYRING, 1, 0, 0)
		return err
	},
	"perf":       func([]string) error { return call(unix.SYS_PERF_EVENT_OPEN, 0, 0, 0) },
	"terminal":   func([]string) error { return call(unix.SYS_IOCTL, 0, unix.TIOCSTI, 0) },
	"terminal64": func([]string) error { return call(unix.SYS_IOCTL, 0, 1<<32|unix.TIOCSTI, 0) },
	"shm":        func([]string) error { return call(unix.SYS_SHMGET, 1, 4096, 0o600|unix.IPC_CREAT) },
	"compat":     compat,
	"setuid":     func([]string) error { return unix.Setuid(12345) },
	"capability": func([]string) error { return hasCapability() },
	"environ":    secretInEnvironment,
	"fds":        otherDescriptors,
	"loosen":     loosenLimits,
	"pass":       passDescriptor,
	"orphan":     orphan,
	"ask":        func(a []string) error { return askOn(number(a[0])) },
	"ask-later":  askWhenOrphaned,
	"stay":       stay,
}

func runProbe(stdout io.Writer, args []string) error {
	if len(args) == 0 || probes[args[0]] == nil {
		return errors.New("there is no such probe")
	}
	err := probes[args[0]](args[1:])
	o := outcome{Accepted: err == nil}
	if err != nil {
		o.Said = err.Error()
		if errno, ok := errors.AsType[syscall.Errno](err); ok {
			o.Said = unix.ErrnoName(errno) + ": " + o.Said
		}
	}
	return printJSON(stdout, o)
}

func number(s string) int {
	n, _ := strconv.Atoi(s) // the table gives numbers
	return n
}

func call(nr, a, b, c uintptr) error {
	if _, _, errno := unix.Syscall6(nr, a, b, c, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func openAnd(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err
}

// sourceRoute would have the packets of a connection go by another host, whatever it is
// connected to: a segment routing header, which needs no capability.
func sourceRoute([]string) error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.SetsockoptString(fd, unix.IPPROTO_IPV6, unix.IPV6_RTHDR, "\x00\x02\x04"+strings.Repeat("\x00", 20)+"\x01")
}

func socket(family, kind, protocol int) error {
	fd, err := unix.Socket(family, kind, protocol)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err
}

func connectUnix(path string, kind int) error {
	fd, err := unix.Socket(unix.AF_UNIX, kind, 0)
	if err != nil {
		return err
	}
	return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// sendThroughPair: one end of a pair of datagram sockets can send anywhere.
func sendThroughPair([]string) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	return unix.Sendto(pair[0], []byte("x"), 0, &unix.SockaddrUnix{Name: "/dev/log"})
}

func sockaddr(a []string) *unix.SockaddrInet4 {
	sa := &unix.SockaddrInet4{Port: number(a[1])}
	for i, part := range strings.Split(a[0], ".") {
		sa.Addr[i] = byte(number(part))
	}
	return sa
}

func connectTCP(a []string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	return unix.Connect(fd, sockaddr(a))
}

func fastOpen(a []string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	return unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, sockaddr(a))
}

func listenTCP([]string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return err
	}
	return unix.Listen(fd, 1)
}

// dropped writes a program where it may write, and runs it.
func dropped(a []string) error {
	b, err := os.ReadFile(a[0])
	if err != nil {
		return err
	}
	if err := os.WriteFile(a[1], b, 0o755); err != nil {
		return err
	}
	return exec.Command(a[1]).Run()
}

// inMemory runs a program that is in no directory.
func inMemory(a []string) error {
	b, err := os.ReadFile(a[0])
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("x", 0)
	if err != nil {
		return err
	}
	if _, err := unix.Write(fd, b); err != nil {
		return err
	}
	return exec.Command(fmt.Sprintf("/proc/self/fd/%d", fd)).Run()
}

func readMemoryOf(a []string) error {
	var b [8]byte
	_, err := unix.ProcessVMReadv(number(a[0]), []unix.Iovec{{Base: &b[0], Len: 8}}, []unix.RemoteIovec{{Base: uintptr(number(a[1])), Len: 8}}, 0)
	return err
}

func stealDescriptor(a []string) error {
	fd, err := unix.PidfdOpen(number(a[0]), 0)
	if err != nil {
		return err
	}
	_, err = unix.PidfdGetfd(fd, 0, 0)
	return err
}

// compat makes a call through the numbers of the x32 ABI.
func compat([]string) error {
	return call(0x40000000|uintptr(unix.SYS_PTRACE), unix.PTRACE_TRACEME, 0, 0)
}

func hasCapability() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	if data[0].Effective|data[1].Effective|data[0].Permitted|data[1].Permitted == 0 {
		return errors.New("no capability is left")
	}
	return nil
}

func secretInEnvironment([]string) error {
	if v := os.Getenv("SECRET"); v != "" {
		return nil
	}
	return errors.New("SECRET is not in the environment")
}

// otherDescriptors looks for one that was not given to it.
func otherDescriptors([]string) error {
	own := number(os.Getenv(client.Variable))
	for fd := 3; fd < 1024; fd++ {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && fd != own && flags&unix.FD_CLOEXEC == 0 { // the runtime's own are close-on-exec
			return nil
		}
	}
	return errors.New("no other descriptor is open")
}

func loosenLimits([]string) error {
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100_000, Max: 100_000})
}

func askAsAgent() error {
	c, err := client.FromEnv()
	if err != nil {
		return err
	}
	_, err = c.SignJSON(context.Background(), []byte(order(client.NewID())))
	return err
}

// askOn asks for a signature on an inherited descriptor.
func askOn(fd int) error {
	f := os.NewFile(uintptr(fd), "connection")
	body := order(client.NewID())
	if _, err := fmt.Fprintf(f, "POST /v1/actions HTTP/1.1\r\nHost: signer\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(f), nil)
	if err != nil {
		return fmt.Errorf("the connection is closed: %w", err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return errors.New(string(b))
	}
	return nil
}

// passDescriptor gives the connection to a child, which asks on it; the second
// argument "then" asks as the agent itself afterwards.
func passDescriptor(a []string) error {
	fd := number(os.Getenv(client.Variable))
	cmd := exec.Command("/proc/self/exe", "probe", "ask", "3")
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "connection")}
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	if len(a) > 0 && a[0] == "then" {
		return askOn(fd)
	}
	return fromOutcome(out)
}

func fromOutcome(b []byte) error {
	var o outcome
	if err := json.Unmarshal(b, &o); err != nil {
		return fmt.Errorf("the child said %q", b)
	}
	if o.Accepted {
		return nil
	}
	return errors.New(o.Said)
}

// orphan leaves a child behind that has the connection, and ends. The child
// writes its outcome to the standard output that both share.
func orphan([]string) error {
	fd := number(os.Getenv(client.Variable))
	cmd := exec.Command("/proc/self/exe", "probe", "ask-later", "3", strconv.Itoa(os.Getpid()))
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "connection")}
	cmd.Stdout = os.Stdout
	if err := cmd.Start(); err != nil {
		return err
	}
	os.Exit(0)
	return nil
}

func askWhenOrphaned(a []string) error {
	for os.Getppid() == number(a[1]) {
		time.Sleep(time.Millisecond) // until the agent has ended
	}
	err := askOn(number(a[0]))
	if err == nil {
		return nil
	}
	return fmt.Errorf("connection ended with its process: %w", err)
}

// stay signs once, says so, waits for a line, and signs again.
func stay([]string) error {
	c, err := client.FromEnv()
	if err != nil {
		return err
	}
	if _, err := c.SignJSON(context.Background(), []byte(order(client.NewID()))); err != nil {
		return fmt.Errorf("the first time: %w", err)
	}
	fmt.Println("ready")
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	_, err = c.SignJSON(context.Background(), []byte(order(client.NewID())))
	return err
}
