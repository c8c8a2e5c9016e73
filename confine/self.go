package confine

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Room is what a daemon keeps when it confines itself, once all that it needs
// to open at its start is open. See [Room.Enter].
type Room struct {
	Read    []string // files and directories to read, with all below
	Write   []string // to read, change, make and remove; devices too
	Execute []string // programs to run, and libraries; empty: it runs none
	Unix    []string // unix sockets to connect to
	Ports   []uint16 // TCP ports to connect to, anywhere

	Optional []Part // go on without these where the kernel cannot enforce them
}

// SelfParts are the parts that [Room.Enter] enforces.
var SelfParts = []Part{PartFiles, PartPorts, PartDevices, PartSignals, PartSyscalls}

// Enter confines the whole process, every thread that it has and will have,
// and all processes that it starts: files by Landlock, TCP ports to connect to by Landlock, no
// new listener, no other socket and no rarer system call by seccomp, and no new
// privileges. Connections and files that are open stay so. It cannot be undone. A part that the
// kernel cannot enforce is a *[Refusal], unless it is optional; those are returned.
func (r *Room) Enter() (unenforced []Part, err error) {
	abi := ABI()
	for _, p := range r.Optional {
		if !slices.Contains(SelfParts, p) {
			return nil, fmt.Errorf("there is no part %q; the parts are %v", p, SelfParts)
		}
	}
	for _, p := range []struct {
		part Part
		has  bool
	}{{PartFiles, abi >= 3}, {PartPorts, abi >= 4}, {PartDevices, abi >= 5}, {PartSignals, abi >= 6}, {PartSyscalls, hasSeccomp()}} {
		switch {
		case p.has:
		case slices.Contains(r.Optional, p.part):
			unenforced = append(unenforced, p.part)
		default:
			return nil, refuse(RuleUnenforceable, "this kernel (Landlock ABI %d) cannot enforce %s: use a newer one, or make that part optional by its name", abi, p.part)
		}
	}
	raw, err := r.filter()
	if err != nil {
		return nil, err
	}
	if err := ll.AllThreadsPrctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("no_new_privs: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return nil, fmt.Errorf("resource limits: %w", err)
	}
	if abi > 0 {
		if err := r.landlock(abi); err != nil {
			return nil, err
		}
	}
	if slices.Contains(unenforced, PartSyscalls) {
		return unenforced, nil
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if thread, err := install(raw, unix.SECCOMP_FILTER_FLAG_TSYNC); err != nil || thread != 0 {
		return nil, errors.Join(errors.New("the filter does not hold for every thread"), err)
	}
	return unenforced, nil
}

// landlock confines every thread.
func (r *Room) landlock(abi int) error {
	attr := handled(abi)
	fd, err := ll.LandlockCreateRuleset(&attr, 0)
	if err != nil {
		return fmt.Errorf("landlock_create_ruleset: %w", err)
	}
	defer unix.Close(fd)
	for _, l := range []struct {
		list   []string
		access uint64
	}{
		{append(slices.Clone(r.Read), "/proc/self/task"), accessRead}, // where psx looks for threads that came meanwhile
		{r.Write, accessWrite | ll.AccessFSIoctlDev},
		{r.Execute, accessExecute},
		{r.Unix, ll.AccessFSWriteFile | ll.AccessFSResolveUnix},
	} {
		for _, p := range l.list {
			if err := allowBeneath(fd, p, l.access&attr.HandledAccessFS); err != nil {
				return err
			}
		}
	}
	if attr.HandledAccessNet != 0 {
		for _, port := range r.Ports {
			if err := ll.LandlockAddNetPortRule(fd, &ll.NetPortAttr{AllowedAccess: ll.AccessNetConnectTCP, Port: uint64(port)}, 0); err != nil {
				return fmt.Errorf("landlock_add_rule for port %d: %w", port, err)
			}
		}
	}
	if err := ll.AllThreadsLandlockRestrictSelf(fd, 0); err != nil {
		return fmt.Errorf("landlock_restrict_self: %w", err)
	}
	return nil
}

func allowBeneath(ruleset int, path string, access uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		access &= accessFile | ll.AccessFSIoctlDev | ll.AccessFSResolveUnix
	}
	if err := ll.LandlockAddPathBeneathRule(ruleset, &ll.PathBeneathAttr{AllowedAccess: access, ParentFd: fd}, 0); err != nil {
		return fmt.Errorf("landlock_add_rule for %s: %w", path, err)
	}
	return nil
}

// filter is the one of agents, with what a daemon needs besides and without
// what it does not.
func (r *Room) filter() ([]bpf.RawInstruction, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	starts := []string{"execve", "fork", "vfork"}
	allow := seccomp.SyscallGroup{Action: seccomp.ActionAllow}
	for _, name := range append(slices.Clone(allowed), "accept", "accept4") {
		if _, ok := info.SyscallNames[name]; ok && (len(r.Execute) > 0 || !slices.Contains(starts, name)) {
			allow.Names = append(allow.Names, name)
		}
	}
	allow.NamesWithCondtions = conditional(nil)
	stream := []seccomp.Condition{with(1, unix.SOCK_STREAM), without(1, typeBits&^unix.SOCK_STREAM)}
	families := []uint64{}
	if len(r.Ports) > 0 {
		families = append(families, unix.AF_INET, unix.AF_INET6)
	}
	if len(r.Unix) > 0 {
		families = append(families, unix.AF_UNIX)
	}
	for _, family := range families {
		for _, protocol := range []uint64{0, unix.IPPROTO_TCP} { // not MPTCP, which Landlock does not see, nor SCTP
			allow.NamesWithCondtions = append(allow.NamesWithCondtions, seccomp.NameWithConditions{Name: "socket", Conditions: append([]seccomp.Condition{is(0, family), is(2, protocol)}, stream...)})
		}
	}
	if len(families) > 0 {
		allow.Names = append(allow.Names, "connect")
	}
	p := seccomp.Policy{DefaultAction: seccomp.ActionErrno, Syscalls: []seccomp.SyscallGroup{allow, {Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}}}}
	program, err := p.Assemble()
	if err != nil {
		return nil, fmt.Errorf("seccomp filter: %w", err)
	}
	return bpf.Assemble(program)
}
