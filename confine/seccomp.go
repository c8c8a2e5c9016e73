package confine

import (
	"errors"
	"fmt"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"inkan/scope"
)

// allowed are the system calls that an ordinary program needs. What is on
// neither this list nor among the conditions below is refused with EPERM:
// other processes (ptrace, process_vm_*, pidfd_getfd, kcmp), io_uring, mounts
// and namespaces, bpf, keys, modules, System V and POSIX message IPC, memory
// files that could be executed (memfd_create), and those that change a file's
// mode, owner, times or attributes, since Landlock does not see them.
var allowed = []string{
	"access", "alarm", "arch_prctl", "brk", "capget", "chdir", "clock_getres", "clock_gettime", "clock_nanosleep", "close", "close_range",
	"copy_file_range", "creat", "dup", "dup2", "dup3", "epoll_create", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait",
	"eventfd", "eventfd2", "execve", "exit", "exit_group", "faccessat", "faccessat2", "fadvise64", "fallocate", "fchdir", "fcntl", "fdatasync",
	"flock", "fork", "fstat", "fstatfs", "fsync", "ftruncate", "futex", "futex_waitv", "get_robust_list", "getcpu", "getcwd", "getdents",
	"getdents64", "getegid", "geteuid", "getgid", "getgroups", "getitimer", "getpeername", "getpgid", "getpgrp", "getpid", "getppid", "getpriority",
	"getrandom", "getresgid", "getresuid", "getrlimit", "getrusage", "getsid", "getsockname", "getsockopt", "gettid", "gettimeofday", "getuid",
	"getxattr", "kill", "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "lgetxattr", "link", "linkat", "listxattr", "lseek", "lstat", "madvise",
	"membarrier", "mincore", "mkdir", "mkdirat", "mlock", "mlock2", "mlockall", "mmap", "mprotect", "mremap", "msync", "munlock", "munlockall", "munmap",
	"nanosleep", "newfstatat", "open", "openat", "openat2", "pause", "pidfd_open", "pidfd_send_signal", "pipe", "pipe2", "pkey_alloc", "pkey_free", "pkey_mprotect",
	"poll", "ppoll", "prctl", "pread64", "preadv", "preadv2", "pselect6", "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readlink",
	"readlinkat", "readv", "recvfrom", "recvmmsg", "recvmsg", "rename", "renameat", "renameat2", "restart_syscall", "rmdir", "rseq", "rt_sigaction",
	"rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_tgsigqueueinfo", "sched_get_priority_max",
	"sched_get_priority_min", "sched_getaffinity", "sched_getattr", "sched_getparam", "sched_getscheduler", "sched_rr_get_interval", "sched_setaffinity", "sched_yield",
	"select", "sendfile", "set_robust_list", "set_tid_address", "setitimer", "setpgid", "setrlimit", "setsid", "shutdown", "sigaltstack",
	"splice", "stat", "statfs", "statx", "symlink", "symlinkat", "sync_file_range", "sysinfo", "tee", "tgkill", "time", "timer_create", "timer_delete",
	"timer_getoverrun", "timer_gettime", "timer_settime", "timerfd_create", "timerfd_gettime", "timerfd_settime", "times", "tkill", "truncate", "umask", "uname",
	"unlink", "unlinkat", "vfork", "vmsplice", "wait4", "waitid", "write", "writev",
}

// Arguments that system calls are told apart by.
const (
	namespaces  = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
	typeBits    = 0xf // of socket's type; the rest are flags
	msgFastOpen = unix.MSG_FASTOPEN
	// packetOptions6 is IPV6_2292PKTOPTIONS, which sets the routing header too.
	packetOptions6 = 6
	int32Max       = 1<<32 - 1 // the kernel looks at the lower half of an int argument, so the upper one must be empty
)

func is(arg uint32, value uint64) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: seccomp.Equal, Value: value}
}

func isNot(arg uint32, value uint64) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: seccomp.NotEqual, Value: value}
}

func atMost(arg uint32, value uint64) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: seccomp.LessOrEqual, Value: value}
}

func without(arg uint32, bits uint64) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: seccomp.BitsNotSet, Value: bits}
}

func with(arg uint32, bit uint64) seccomp.Condition {
	return seccomp.Condition{Argument: arg, Operation: seccomp.BitsSet, Value: bit}
}

// conditional are the calls that are allowed with some arguments only; sockets
// of a network only where o has connections.
func conditional(o *scope.OS) []seccomp.NameWithConditions {
	stream := []seccomp.Condition{with(1, unix.SOCK_STREAM), without(1, typeBits&^unix.SOCK_STREAM)}
	calls := []seccomp.NameWithConditions{
		{Name: "clone", Conditions: []seccomp.Condition{without(0, namespaces)}},
		{Name: "prlimit64", Conditions: []seccomp.Condition{is(0, 0)}}, // its own limits
		// A pair of sockets reaches nobody else; datagrams could be sent elsewhere.
		{Name: "socketpair", Conditions: append([]seccomp.Condition{is(0, unix.AF_UNIX)}, stream...)},
		// A destination in the call would connect past Landlock (TCP Fast Open).
		{Name: "sendto", Conditions: []seccomp.Condition{is(4, 0), without(3, msgFastOpen)}},
		{Name: "sendmsg", Conditions: []seccomp.Condition{without(2, msgFastOpen)}},
		{Name: "sendmmsg", Conditions: []seccomp.Condition{without(3, msgFastOpen)}},
		// No typing into a terminal, and no line discipline or protocol in the place of another.
		{Name: "ioctl", Conditions: []seccomp.Condition{atMost(1, int32Max), isNot(1, unix.TIOCSTI), isNot(1, unix.TIOCLINUX), isNot(1, unix.TIOCSETD)}},
		{Name: "ioctl", Conditions: []seccomp.Condition{{Argument: 1, Operation: seccomp.GreaterOrEqual, Value: 0xffffffff80000000}}}, // sign-extended by some libraries
		{Name: "setsockopt", Conditions: []seccomp.Condition{atMost(1, int32Max), isNot(1, unix.IPPROTO_TCP), isNot(1, unix.IPPROTO_IP), isNot(1, unix.IPPROTO_IPV6)}},
		{Name: "setsockopt", Conditions: []seccomp.Condition{is(1, unix.IPPROTO_TCP), atMost(2, int32Max), isNot(2, unix.TCP_ULP)}},
		// No route of its own: the packets of a connection would go by a host that nobody decided on.
		{Name: "setsockopt", Conditions: []seccomp.Condition{is(1, unix.IPPROTO_IP), atMost(2, int32Max), isNot(2, unix.IP_OPTIONS)}},
		{Name: "setsockopt", Conditions: []seccomp.Condition{is(1, unix.IPPROTO_IPV6), atMost(2, int32Max), isNot(2, unix.IPV6_RTHDR), isNot(2, packetOptions6)}},
	}
	if o == nil || len(o.Connect) == 0 {
		return calls
	}
	for _, family := range []uint64{unix.AF_INET, unix.AF_INET6} {
		for _, protocol := range []uint64{0, unix.IPPROTO_TCP} { // not MPTCP, which Landlock does not see, nor SCTP
			calls = append(calls, seccomp.NameWithConditions{Name: "socket", Conditions: append([]seccomp.Condition{is(0, family), is(2, protocol)}, stream...)})
		}
	}
	return calls
}

// filter builds the program. notify: connect(2) asks the supervisor.
func filter(o *scope.OS, notify bool) ([]bpf.RawInstruction, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	known := func(name string) bool { _, ok := info.SyscallNames[name]; return ok }
	allow := seccomp.SyscallGroup{Action: seccomp.ActionAllow}
	for _, name := range allowed {
		if known(name) { // some architectures lack the older ones
			allow.Names = append(allow.Names, name)
		}
	}
	for _, c := range conditional(o) {
		if known(c.Name) {
			allow.NamesWithCondtions = append(allow.NamesWithCondtions, c)
		}
	}
	// clone3 has its flags in memory, where a filter cannot look: libraries use clone then.
	groups := []seccomp.SyscallGroup{allow, {Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}}}
	if len(o.Connect) > 0 {
		connect := seccomp.SyscallGroup{Action: seccomp.ActionAllow, Names: []string{"connect"}}
		if notify {
			connect.Action = seccomp.Action(unix.SECCOMP_RET_USER_NOTIF)
		}
		groups = append(groups, connect)
	}
	p := seccomp.Policy{DefaultAction: seccomp.ActionErrno, Syscalls: groups}
	program, err := p.Assemble()
	if err != nil {
		return nil, fmt.Errorf("seccomp filter: %w", err)
	}
	return bpf.Assemble(program)
}

// install puts the filter on the calling thread, which must be locked and have
// no_new_privs. With the flag SECCOMP_FILTER_FLAG_NEW_LISTENER it returns the listener.
func install(raw []bpf.RawInstruction, flags uintptr) (int, error) {
	f := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		f[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	p := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&p)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}

func hasSeccomp() bool { return seccomp.Supported() }

// hasNotification: the kernel can hand a system call to a supervisor (Linux
// 5.0; pidfd_getfd, which the supervisor needs, is in 5.6).
func hasNotification() bool {
	action := uint32(unix.SECCOMP_RET_USER_NOTIF)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	if errno != 0 {
		return false
	}
	_, err := unix.PidfdGetfd(-1, -1, 0)
	return !errors.Is(err, unix.ENOSYS)
}
