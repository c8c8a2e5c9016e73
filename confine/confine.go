// Package confine starts a program so that the kernel holds it to the os
// section of a scope: [Prepare] opens and checks all that is needed, and
// [Start.Exec] turns the calling process into the program, under Landlock, a
// seccomp filter, no_new_privs, without capabilities, with resource limits, an
// empty environment and no open descriptors but those that it is given.
//
// What the kernel cannot enforce is a refusal, unless that part was made
// optional by its name. docs/confinement.md has the parts and their names.
package confine

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"

	"inkan/scope"
)

// Part is a part of the confinement that a kernel may be unable to enforce.
type Part string

// The parts, with what the kernel needs for them.
const (
	PartFiles    Part = "files"    // Landlock ABI 3 (Linux 6.2): read, write, execute
	PartPorts    Part = "ports"    // Landlock ABI 4 (Linux 6.7): TCP ports
	PartDevices  Part = "devices"  // Landlock ABI 5 (Linux 6.10): ioctl on devices
	PartSignals  Part = "signals"  // Landlock ABI 6 (Linux 6.12): signals and abstract sockets of processes outside
	PartSyscalls Part = "syscalls" // seccomp filters: sockets of other kinds, other processes, the kernel's rarer calls
	PartNetworks Part = "networks" // seccomp notifications (Linux 5.9): networks, beside ports
)

// Parts are all of them.
var Parts = []Part{PartFiles, PartPorts, PartDevices, PartSignals, PartSyscalls, PartNetworks}

// Rule is the stable name of what refused a start. docs/confinement.md lists them.
type Rule string

// The rules.
const (
	RuleABI           Rule = "landlock_abi"  // the kernel's Landlock is older than was required
	RuleUnenforceable Rule = "unenforceable" // the kernel cannot enforce a part that is not optional
	RuleProtected     Rule = "protected"     // a granted path has something in it that is always out of reach
	RuleExecutable    Rule = "executable"    // the program is not one that may be executed
	RuleWritable      Rule = "writable"      // the program could change itself or a declared file
)

// Refusal says why a program was not started.
type Refusal struct {
	Rule    Rule
	Message string
}

func (r *Refusal) Error() string { return string(r.Rule) + ": " + r.Message }

func refuse(rule Rule, format string, a ...any) error {
	return &Refusal{rule, fmt.Sprintf(format, a...)}
}

// outOfReach cannot be granted, nor anything that has it below: where Inkan's
// and SoftHSM's packages keep state, keys, configuration and PINs. A signer adds its own.
var outOfReach = []string{"/etc/inkan", "/var/lib/inkan", "/run/inkan", "/etc/softhsm", "/var/lib/softhsm"}

// Options say what to start, and how strictly.
type Options struct {
	OS         *scope.OS
	Args       []string // the program, by path or by name, and its arguments
	Files      []string // declared files
	Environ    []string // as os.Environ: the variables that OS.Env names are taken from it
	Protected  []string // further paths that are out of reach
	RequireABI int      // refuse under an older Landlock; 0: what the parts need
	Supervisor *os.File // from Supervisor; nil: there is none
	Optional   []Part   // go on without these where the kernel cannot enforce them
}

// Start is a program that is ready to be started. Its files are open, so that
// what was measured is what runs.
type Start struct {
	Path       string     // of the executable, without symbolic links
	Executable *os.File   // open for reading
	Files      []*os.File // the declared files, open for reading
	FilePaths  []string   // their paths, absolute and without symbolic links
	Args       []string
	ABI        int    // Landlock's, 0: the kernel has none
	Unenforced []Part // optional parts that the kernel cannot enforce

	os     *scope.OS
	env    []string
	grants []grant

	supervisor *os.File
}

// grant is a granted path, held open so that it stays what was checked.
type grant struct {
	file   *os.File // O_PATH
	access uint64   // Landlock rights
}

// ABI returns the Landlock ABI of this kernel; 0 where it has none.
func ABI() int {
	v, err := ll.LandlockGetABIVersion()
	if err != nil {
		return 0
	}
	return v
}

// missing returns the parts that a kernel with this Landlock cannot enforce.
func missing(abi int, o *scope.OS) []Part {
	var out []Part
	for _, p := range []struct {
		part Part
		has  bool
	}{
		{PartFiles, abi >= 3}, {PartPorts, abi >= 4}, {PartDevices, abi >= 5}, {PartSignals, abi >= 6},
		{PartSyscalls, hasSeccomp()}, {PartNetworks, !needsSupervisor(o) || hasNotification()},
	} {
		if !p.has {
			out = append(out, p.part)
		}
	}
	return out
}

// Prepare checks that the start is allowed and can be enforced, and opens all
// files that it needs. A start that is not allowed is a *[Refusal]. Close it
// if it is not executed.
func Prepare(o Options) (_ *Start, err error) {
	if o.OS == nil {
		return nil, errors.New("there is no os section: a scope without one lets nothing be started")
	}
	if len(o.Args) == 0 {
		return nil, errors.New("there is no program to start")
	}
	s := &Start{ABI: ABI(), os: o.OS, supervisor: o.Supervisor}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	for _, p := range o.Optional {
		if !slices.Contains(Parts, p) {
			return nil, fmt.Errorf("there is no part %q; the parts are %v", p, Parts)
		}
	}
	if s.ABI < o.RequireABI {
		return nil, refuse(RuleABI, "the kernel has Landlock ABI %d, %d is required", s.ABI, o.RequireABI)
	}
	s.Unenforced = missing(s.ABI, o.OS)
	for _, p := range s.Unenforced {
		if !slices.Contains(o.Optional, p) {
			return nil, refuse(RuleUnenforceable, "this kernel (Landlock ABI %d) cannot enforce %s: use a newer one, or make that part optional by its name", s.ABI, p)
		}
	}
	if err := s.openGrants(o.OS, append(slices.Clone(outOfReach), o.Protected...)); err != nil {
		return nil, err
	}
	if err := s.openProgram(o.Args); err != nil {
		return nil, err
	}
	for _, path := range o.Files {
		f, real, err := openReal(path, unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			return nil, fmt.Errorf("declared file: %w", err)
		}
		s.Files, s.FilePaths = append(s.Files, f), append(s.FilePaths, real)
	}
	for _, w := range o.OS.Write {
		for _, p := range append([]string{s.Path}, s.FilePaths...) {
			if real, err := filepath.EvalSymlinks(w); err == nil && beneath(p, real) {
				return nil, refuse(RuleWritable, "%s is below %s, which the agent may write: what is measured must not be its to change", p, w)
			}
		}
	}
	for _, name := range o.OS.Env {
		if i := slices.IndexFunc(o.Environ, func(v string) bool { return strings.HasPrefix(v, name+"=") }); i >= 0 {
			s.env = append(s.env, o.Environ[i])
		}
	}
	return s, nil
}

// Close closes what Prepare opened.
func (s *Start) Close() {
	for _, g := range s.grants {
		_ = g.file.Close() // opened for its path alone
	}
	for _, f := range append(s.Files, s.Executable) {
		if f != nil {
			_ = f.Close() // it was only read
		}
	}
}

func beneath(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}

// openReal opens a path and says what it really is, after symbolic links: from
// the open file, so that nothing can be put in its place in between.
func openReal(path string, flags int) (*os.File, string, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, "", errors.Join(err, f.Close())
	}
	return f, real, nil
}

func (s *Start) openGrants(o *scope.OS, protected []string) error {
	for i, p := range protected {
		if real, err := filepath.EvalSymlinks(p); err == nil {
			protected[i] = real
		}
	}
	for _, l := range []struct {
		name   string
		list   []string
		access uint64
	}{{"read", o.Read, accessRead}, {"write", o.Write, accessWrite}, {"execute", o.Execute, accessExecute}} {
		for _, p := range l.list {
			f, real, err := openReal(p, unix.O_PATH)
			if err != nil {
				return fmt.Errorf("os.%s: %w", l.name, err)
			}
			s.grants = append(s.grants, grant{f, l.access})
			for _, q := range protected {
				if beneath(q, real) || beneath(real, q) {
					return refuse(RuleProtected, "os.%s: %s has %s in it or is in it, which is always out of reach: name what is needed beside it", l.name, p, q)
				}
			}
			// A link into these would go around what a scope can grant of them.
			for _, special := range []string{"/dev", "/proc", "/sys"} {
				if beneath(special, real) || beneath(real, special) && !beneath(p, special) {
					return refuse(RuleProtected, "os.%s: %s is %s", l.name, p, real)
				}
			}
		}
	}
	return nil
}

// openProgram finds and opens the program. The kernel refuses what is not
// granted; here it is said in words.
func (s *Start) openProgram(args []string) error {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	if s.Executable, s.Path, err = openReal(path, unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("the program: %w", err)
	}
	s.Args = append([]string{path}, args[1:]...)
	granted := slices.ContainsFunc(s.os.Execute, func(p string) bool {
		real, err := filepath.EvalSymlinks(p)
		return err == nil && beneath(s.Path, real)
	})
	if !granted {
		return refuse(RuleExecutable, "%s is not below one of os.execute: %s", s.Path, strings.Join(s.os.Execute, ", "))
	}
	var magic [4]byte
	if _, err := s.Executable.ReadAt(magic[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("the program: %w", err)
	}
	switch {
	case string(magic[:2]) == "#!":
		return refuse(RuleExecutable, "%s is a script: start its interpreter, and declare the script as a file", s.Path)
	case string(magic[:]) != "\x7fELF":
		return refuse(RuleExecutable, "%s is not an ELF program", s.Path)
	}
	return nil
}

// Measure returns the SHA-256 of the executable and of the declared files, in order.
func (s *Start) Measure() ([][32]byte, error) {
	var out [][32]byte
	for _, f := range append([]*os.File{s.Executable}, s.Files...) {
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<62)); err != nil {
			return nil, err
		}
		out = append(out, [32]byte(h.Sum(nil)))
	}
	return out, nil
}
