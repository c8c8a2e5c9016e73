package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"inkan/scope"
)

// Exec turns the calling process into the program, confined. connection, if it
// is not nil, is inherited, and the environment variable INKAN_FD has its
// number. Exec returns only if it could not; then the calling thread is half
// confined, and the process must end.
func (s *Start) Exec(connection *os.File) error {
	// Everything below holds for the calling thread; execve makes it the only one.
	runtime.LockOSThread()
	env := s.env
	keep := -1
	if connection != nil {
		keep = int(connection.Fd()) // blocking from here on, as programs expect it
		if _, err := unix.FcntlInt(uintptr(keep), unix.F_SETFD, 0); err != nil {
			return fmt.Errorf("the connection: %w", err)
		}
		env = append(env, "INKAN_FD="+strconv.Itoa(keep))
	}
	if err := closeOthers(keep); err != nil {
		return fmt.Errorf("closing descriptors: %w", err)
	}
	if err := dropCapabilities(); err != nil {
		return fmt.Errorf("dropping capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	raw, err := filter(s.os, s.supervised())
	if err != nil {
		return err
	}
	if err := s.landlock(); err != nil {
		return err
	}
	program := fmt.Sprintf("/proc/self/fd/%d", s.Executable.Fd())
	if err := setLimits(s.os.Limits); err != nil {
		return fmt.Errorf("resource limits: %w", err)
	}
	if !s.lacks(PartSyscalls) {
		if err := s.installFilter(raw); err != nil {
			return err
		}
	}
	err = syscall.Exec(program, s.Args, env)
	return fmt.Errorf("%s: %w (the program's loader and its libraries must be below os.execute and os.read)", s.Path, err)
}

// supervised: each connect(2) is decided by a supervisor.
func (s *Start) supervised() bool {
	return needsSupervisor(s.os) && !s.lacks(PartNetworks) && !s.lacks(PartSyscalls)
}

func (s *Start) installFilter(raw []bpf.RawInstruction) error {
	if !s.supervised() {
		_, err := install(raw, 0)
		return err
	}
	// A call that was received is not interrupted by signals, or it would be
	// made twice (Linux 5.19; before, a program may see EALREADY or EISCONN).
	const waitKillable = 1 << 5
	listener, err := install(raw, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|waitKillable)
	if errors.Is(err, unix.EINVAL) {
		listener, err = install(raw, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
	}
	if err != nil {
		return err
	}
	unix.CloseOnExec(listener)
	return s.handOver(listener)
}

// closeOthers has every descriptor closed at execve but the standard three and keep.
func closeOthers(keep int) error {
	const last = ^uint(0) >> 32
	if keep < 3 {
		return unix.CloseRange(3, last, unix.CLOSE_RANGE_CLOEXEC)
	}
	if keep > 3 {
		if err := unix.CloseRange(3, uint(keep-1), unix.CLOSE_RANGE_CLOEXEC); err != nil {
			return err
		}
	}
	return unix.CloseRange(uint(keep+1), last, unix.CLOSE_RANGE_CLOEXEC)
}

// dropCapabilities leaves the thread none, now and after execve, whoever the user is.
func dropCapabilities() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	for c := uintptr(0); c <= 63; c++ {
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if err != nil {
			break // the last one was the one before
		}
		if has == 1 {
			// Without CAP_SETPCAP it cannot be dropped; then there is nothing to gain
			// from it either: no_new_privs.
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && err != unix.EPERM {
				return err
			}
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}

// setLimits sets the limits that the scope names, and that nothing dumps core:
// an agent's memory is not left in files.
func setLimits(l *scope.Limits) error {
	const mib = 1 << 20
	limits := map[int]uint64{unix.RLIMIT_CORE: 0}
	if l != nil {
		for resource, v := range map[int]uint64{
			unix.RLIMIT_NOFILE: uint64(l.OpenFiles), unix.RLIMIT_NPROC: uint64(l.Processes), unix.RLIMIT_DATA: uint64(l.MemoryMiB) * mib,
			unix.RLIMIT_FSIZE: uint64(l.FileMiB) * mib, unix.RLIMIT_CPU: uint64(l.CPUSeconds),
		} {
			if v != 0 {
				limits[resource] = v
			}
		}
	}
	for resource, v := range limits {
		var now unix.Rlimit
		if err := unix.Getrlimit(resource, &now); err != nil {
			return err
		}
		v = min(v, now.Max) // a limit is never raised
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: v, Max: v}); err != nil {
			return err
		}
	}
	return nil
}
