package confine

import (
	"fmt"
	"runtime"
	"slices"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Landlock rights of each kind of grant. Sockets, devices and pipes are not
// made; devices take no ioctl but those that the kernel always allows.
const (
	accessRead    = ll.AccessFSReadFile | ll.AccessFSReadDir
	accessExecute = accessRead | ll.AccessFSExecute
	accessWrite   = accessRead | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSRemoveDir | ll.AccessFSRemoveFile |
		ll.AccessFSMakeDir | ll.AccessFSMakeReg | ll.AccessFSMakeSym | ll.AccessFSRefer

	// accessFile are those that make sense for what is not a directory.
	accessFile = ll.AccessFSExecute | ll.AccessFSWriteFile | ll.AccessFSReadFile | ll.AccessFSTruncate
)

// handled returns what a Landlock of this ABI can hold back, all of which is
// handled: what no rule allows is refused.
func handled(abi int) ll.RulesetAttr {
	var a ll.RulesetAttr
	for _, x := range []struct {
		abi             int
		fs, net, scoped uint64
	}{
		{1, 1<<13 - 1, 0, 0}, // execute to make_sym
		{2, ll.AccessFSRefer, 0, 0},
		{3, ll.AccessFSTruncate, 0, 0},
		{4, 0, ll.AccessNetBindTCP | ll.AccessNetConnectTCP, 0},
		{5, ll.AccessFSIoctlDev, 0, 0},
		{6, 0, 0, ll.ScopeAbstractUnixSocket | ll.ScopeSignal},
		{9, ll.AccessFSResolveUnix, 0, 0},
		{10, 0, ll.AccessNetBindUDP | ll.AccessNetConnectSendUDP, 0},
	} {
		if abi >= x.abi {
			a.HandledAccessFS |= x.fs
			a.HandledAccessNet |= x.net
			a.Scoped |= x.scoped
		}
	}
	return a
}

// landlock confines the calling thread, which must be locked and have
// no_new_privs. What it executes is confined the same.
func (s *Start) landlock() error {
	if s.ABI == 0 {
		return nil // files is among the parts that were made optional
	}
	attr := handled(s.ABI)
	fd, err := ll.LandlockCreateRuleset(&attr, 0)
	if err != nil {
		return fmt.Errorf("landlock_create_ruleset: %w", err)
	}
	defer unix.Close(fd)
	for _, g := range s.grants {
		var st unix.Stat_t
		if err := unix.Fstat(int(g.file.Fd()), &st); err != nil {
			return fmt.Errorf("%s: %w", g.file.Name(), err)
		}
		access := g.access
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			access &= accessFile
		}
		rule := ll.PathBeneathAttr{AllowedAccess: access & attr.HandledAccessFS, ParentFd: int(g.file.Fd())}
		if err := ll.LandlockAddPathBeneathRule(fd, &rule, 0); err != nil {
			return fmt.Errorf("landlock_add_rule for %s: %w", g.file.Name(), err)
		}
	}
	if attr.HandledAccessNet != 0 {
		for _, port := range ports(s.os) {
			if err := ll.LandlockAddNetPortRule(fd, &ll.NetPortAttr{AllowedAccess: ll.AccessNetConnectTCP, Port: uint64(port)}, 0); err != nil {
				return fmt.Errorf("landlock_add_rule for port %d: %w", port, err)
			}
		}
	}
	if err := ll.LandlockRestrictSelf(fd, 0); err != nil {
		return fmt.Errorf("landlock_restrict_self: %w", err)
	}
	runtime.KeepAlive(s)
	return nil
}

func (s *Start) lacks(p Part) bool { return slices.Contains(s.Unenforced, p) }
