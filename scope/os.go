package scope

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"inkan/internal/strictjson"
)

// Maxima of an os section. It shares a certificate with the rest of the scope.
const (
	maxPaths      = 64  // in each list
	maxPath       = 255 // bytes
	maxStartFiles = 32
)

// OS is what the operating system lets an agent's process do: what is not
// named is refused. Package confine enforces it.
type OS struct {
	Read    []string  `json:"read,omitempty"`    // files and directories to read, with all below
	Write   []string  `json:"write,omitempty"`   // to read, change, make and remove
	Execute []string  `json:"execute"`           // programs to run, and to read
	Connect []Connect `json:"connect,omitempty"` // TCP; there is no other network
	Env     []string  `json:"env,omitempty"`     // environment variables that are passed on, by name
	Limits  *Limits   `json:"limits,omitempty"`
	Start   []Start   `json:"start,omitempty"` // what may be started; empty: any program that may be executed

	sum Digest // of the canonical form
}

// Connect is a network and the TCP ports in it that may be connected to.
type Connect struct {
	Network netip.Prefix `json:"network"` // such as 192.0.2.0/24 or 2001:db8::/32
	Ports   []uint16     `json:"ports"`
}

// Limits bound what a process uses of the machine (setrlimit(2)); 0: the
// machine's own limit holds.
type Limits struct {
	OpenFiles  uint32 `json:"open_files,omitzero"`  // RLIMIT_NOFILE
	Processes  uint32 `json:"processes,omitzero"`   // RLIMIT_NPROC: of the user, threads counted
	MemoryMiB  uint32 `json:"memory_mib,omitzero"`  // RLIMIT_DATA
	FileMiB    uint32 `json:"file_mib,omitzero"`    // RLIMIT_FSIZE: the largest file it may write
	CPUSeconds uint32 `json:"cpu_seconds,omitzero"` // RLIMIT_CPU: of processor time; then it is killed
}

// Start is a program that may be started, with the files that make it what it
// is: an interpreter's scripts, models, prompts.
type Start struct {
	Executable string      `json:"executable_sha256"` // lower-case hex
	Files      []StartFile `json:"files,omitempty"`   // exactly these must be declared; empty: any
}

// StartFile is a declared file of a start.
type StartFile struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"` // lower-case hex
}

// Run is what stands in a statement about the process that asked: how it was
// started, as the signer measured it.
type Run struct {
	OS         Digest `json:"os"`    // of the os section that it was started under, in canonical form
	Executable Digest `json:"exe"`   // of the program that runs
	Files      Digest `json:"files"` // of the declared files: see FilesDigest
	Start      Digest `json:"start"` // of the start document, which the record has
}

// FilesDigest is the SHA-256 of a list of declared files in its one spelling:
// RFC 8785 JSON, sorted by path.
func FilesDigest(files []StartFile) (Digest, error) {
	sorted := slices.Clone(files)
	slices.SortFunc(sorted, compareFiles)
	if sorted == nil {
		sorted = []StartFile{}
	}
	b, err := strictjson.Marshal(sorted)
	return sha256.Sum256(b), err
}

func compareFiles(a, b StartFile) int { return strings.Compare(a.Path, b.Path) }

// OS returns the os section; nil where the scope has none. Callers must not change it.
func (s *Scope) OS() *OS {
	if s == nil {
		return nil
	}
	return s.doc.OS
}

// Canonical returns the section's one spelling (RFC 8785).
func (o *OS) Canonical() ([]byte, error) { return strictjson.Marshal(o) }

// ParseOS reads an os section in its canonical form, as [OS.Canonical] writes it.
func ParseOS(b []byte) (*OS, error) {
	var o OS
	if err := strictjson.Unmarshal(b, MaxScope, &o); err != nil {
		return nil, fmt.Errorf("os: %w", err)
	}
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("os: %w", err)
	}
	if again, err := o.Canonical(); err != nil || string(again) != string(b) {
		return nil, errors.New("os: is not in canonical form")
	}
	return &o, nil
}

// Digest is the SHA-256 of the canonical form, which the os member of a [Run] is.
func (o *OS) Digest() Digest { return o.sum }

// Refuses says why the section does not let a process that was started so act;
// nil if it does.
func (o *OS) Refuses(run *Run) *Refusal {
	if run == nil {
		return &Refusal{Rule: RuleOS, Message: "the scope has an os section, so the agent must be started with inkan run; this process was not"}
	}
	if run.OS != o.sum {
		return &Refusal{Rule: RuleOS, Field: "run.os", Message: "the agent was started under another os section than its scope has now: start it again"}
	}
	if len(o.Start) == 0 {
		return nil
	}
	why := fmt.Sprintf("the executable %x is not one of os.start", run.Executable)
	for _, s := range o.Start {
		if s.Executable != hex.EncodeToString(run.Executable[:]) {
			continue
		}
		if len(s.Files) == 0 {
			return nil
		}
		if files, err := FilesDigest(s.Files); err == nil && files == run.Files {
			return nil
		}
		why = "the declared files are not those of os.start"
	}
	return &Refusal{Rule: RuleStart, Field: "run.exe", Value: fmt.Sprintf("%x", run.Executable), Message: "this start is not allowed: " + why}
}

// Below /proc, /sys and /dev only these can be granted: the rest is other
// processes, the kernel's settings and devices.
var grantable = []string{
	"/dev/full", "/dev/null", "/dev/random", "/dev/urandom", "/dev/zero",
	"/proc/cpuinfo", "/proc/filesystems", "/proc/loadavg", "/proc/meminfo", "/proc/self", "/proc/stat", "/proc/sys/vm/overcommit_memory", "/proc/uptime", "/proc/version", "/proc/version_signature",
	"/sys/devices/system/cpu", "/sys/fs/cgroup", "/sys/kernel/mm/transparent_hugepage",
}

// writable of those that are grantable.
var writable = []string{"/dev/full", "/dev/null", "/dev/zero"}

// beneath says that p is dir or below it.
func beneath(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}

func beneathAny(p string, dirs []string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool { return beneath(p, d) })
}

func (o *OS) validate() error {
	for _, l := range []struct {
		name string
		list []string
	}{{"read", o.Read}, {"write", o.Write}, {"execute", o.Execute}} {
		if len(l.list) > maxPaths {
			return fmt.Errorf("%s: %d entries, at most %d are allowed", l.name, len(l.list), maxPaths)
		}
		if err := set(l.name, l.list, validPath, "an absolute path without . and .. and of printable ASCII without spaces"); err != nil {
			return err
		}
		for _, p := range l.list {
			special := beneath(p, "/proc") || beneath(p, "/sys") || beneath(p, "/dev")
			switch {
			case p == "/":
				return fmt.Errorf("%s: / has everything below it: name what is needed", l.name)
			case special && !slices.Contains(grantable, p):
				return fmt.Errorf("%s: %s cannot be granted; of /dev, /proc and /sys these can: %s", l.name, p, join(grantable))
			case special && l.name == "write" && !slices.Contains(writable, p), special && l.name == "execute":
				return fmt.Errorf("%s: %s can only be read", l.name, p)
			}
		}
	}
	if len(o.Execute) == 0 {
		return errors.New("execute is empty, so nothing could be started")
	}
	for _, w := range o.Write {
		for _, x := range o.Execute {
			if beneath(w, x) || beneath(x, w) {
				return fmt.Errorf("write: %s and execute: %s overlap, so the agent could run what it wrote", w, x)
			}
		}
	}
	if err := o.validateConnect(); err != nil {
		return err
	}
	if err := set("env", o.Env, validEnv, "a name such as LANG, and none that INKAN_ or LD_ begins, or that changes how programs are loaded"); err != nil {
		return err
	}
	if l := o.Limits; l != nil {
		if *l == (Limits{}) {
			o.Limits = nil // absent is its one spelling
		} else if l.OpenFiles != 0 && l.OpenFiles < 8 {
			return fmt.Errorf("limits: open_files is %d, at least 8 are needed", l.OpenFiles)
		}
	}
	if err := o.validateStart(); err != nil {
		return err
	}
	b, err := o.Canonical()
	o.sum = sha256.Sum256(b)
	return err
}

func (o *OS) validateConnect() error {
	if len(o.Connect) > maxPaths {
		return fmt.Errorf("connect: %d entries, at most %d are allowed", len(o.Connect), maxPaths)
	}
	slices.SortFunc(o.Connect, func(a, b Connect) int { return strings.Compare(a.Network.String(), b.Network.String()) })
	for i, c := range o.Connect {
		switch {
		case !c.Network.IsValid() || c.Network != c.Network.Masked() || c.Network.Addr().Is4In6():
			return fmt.Errorf("connect: network %s: a network such as 192.0.2.0/24 without host bits is expected", c.Network)
		case i > 0 && o.Connect[i-1].Network == c.Network:
			return fmt.Errorf("connect: %s stands twice", c.Network)
		case len(c.Ports) == 0 || len(c.Ports) > maxPaths:
			return fmt.Errorf("connect: %s: 1 to %d ports are expected", c.Network, maxPaths)
		}
		slices.Sort(c.Ports)
		for j, p := range c.Ports {
			if p == 0 || j > 0 && c.Ports[j-1] == p {
				return fmt.Errorf("connect: %s: port %d is 0 or stands twice", c.Network, p)
			}
		}
	}
	return nil
}

func (o *OS) validateStart() error {
	if len(o.Start) > maxPaths {
		return fmt.Errorf("start: %d entries, at most %d are allowed", len(o.Start), maxPaths)
	}
	for _, s := range o.Start {
		if !validHex(s.Executable) {
			return fmt.Errorf("start: executable_sha256 %s: 64 lower-case hex digits are expected", clipped(s.Executable))
		}
		if err := ValidFiles(s.Files); err != nil {
			return fmt.Errorf("start: %w", err)
		}
		slices.SortFunc(s.Files, compareFiles)
		for _, f := range s.Files {
			if !validHex(f.SHA256) {
				return fmt.Errorf("start: sha256 of %s: 64 lower-case hex digits are expected", f.Path)
			}
		}
	}
	slices.SortFunc(o.Start, compareStarts)
	for i := 1; i < len(o.Start); i++ {
		if compareStarts(o.Start[i-1], o.Start[i]) == 0 {
			return fmt.Errorf("start: an entry with executable %s stands twice", o.Start[i].Executable)
		}
	}
	return nil
}

func compareStarts(a, b Start) int {
	return cmp.Or(strings.Compare(a.Executable, b.Executable), slices.CompareFunc(a.Files, b.Files, func(x, y StartFile) int {
		return cmp.Or(compareFiles(x, y), strings.Compare(x.SHA256, y.SHA256))
	}))
}

// ValidFiles checks the number and the paths of declared files.
func ValidFiles(files []StartFile) error {
	if len(files) > maxStartFiles {
		return fmt.Errorf("%d files, at most %d are allowed", len(files), maxStartFiles)
	}
	for i, f := range files {
		if !validPath(f.Path) {
			return fmt.Errorf("file %s: an absolute path without . and .. and of printable ASCII without spaces is expected", clipped(f.Path))
		}
		if slices.ContainsFunc(files[:i], func(g StartFile) bool { return g.Path == f.Path }) {
			return fmt.Errorf("file %s stands twice", f.Path)
		}
	}
	return nil
}

func validPath(p string) bool {
	if p == "" || len(p) > maxPath || p[0] != '/' || path.Clean(p) != p {
		return false
	}
	for i := range len(p) {
		if c := p[i]; c <= ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

func validHex(s string) bool { return len(s) == 64 && only(s, "0123456789abcdef") }

// validEnv: no name by which the loader would run other code.
func validEnv(name string) bool {
	const letters = upper + "abcdefghijklmnopqrstuvwxyz_"
	if name == "" || len(name) > maxText || !only(name[:1], letters) || !only(name, letters+"0123456789") {
		return false
	}
	return !strings.HasPrefix(name, "LD_") && !strings.HasPrefix(name, "INKAN_") && name != "GLIBC_TUNABLES" && name != "GCONV_PATH"
}

// containsOS: everything that inner lets a process do, outer does too.
func containsOS(outer, inner *OS) *Wider {
	wider := func(format string, a ...any) *Wider { return &Wider{RuleOS, fmt.Sprintf(format, a...)} }
	switch {
	case outer == nil:
		return nil
	case inner == nil:
		return wider("is missing, so the process is not confined")
	}
	readable := slices.Concat(outer.Read, outer.Write, outer.Execute)
	for _, l := range []struct {
		name         string
		inner, outer []string
	}{{"read", inner.Read, readable}, {"write", inner.Write, outer.Write}, {"execute", inner.Execute, outer.Execute}} {
		for _, p := range l.inner {
			if !beneathAny(p, l.outer) {
				return wider("%s: %s is not allowed", l.name, p)
			}
		}
	}
	for _, c := range inner.Connect {
		for _, port := range c.Ports {
			if !slices.ContainsFunc(outer.Connect, func(x Connect) bool {
				return x.Network.Bits() <= c.Network.Bits() && x.Network.Contains(c.Network.Addr()) && slices.Contains(x.Ports, port)
			}) {
				return wider("connect: %s port %d is not allowed", c.Network, port)
			}
		}
	}
	for _, e := range inner.Env {
		if !slices.Contains(outer.Env, e) {
			return wider("env: %s is not allowed", e)
		}
	}
	ol, il := outer.Limits.list(), inner.Limits.list()
	for i, l := range ol {
		if l.value != 0 && (il[i].value == 0 || il[i].value > l.value) {
			return wider("limits: %s of at most %d is allowed", l.name, l.value)
		}
	}
	if len(outer.Start) > 0 {
		if len(inner.Start) == 0 {
			return wider("start: is missing, so any program could be started")
		}
		for _, s := range inner.Start {
			if !slices.ContainsFunc(outer.Start, func(x Start) bool {
				return x.Executable == s.Executable && (len(x.Files) == 0 || slices.Equal(x.Files, s.Files))
			}) {
				return wider("start: %s with these files is not allowed", s.Executable)
			}
		}
	}
	return nil
}

type namedLimit struct {
	name  string
	value uint32
}

func (l *Limits) list() []namedLimit {
	if l == nil {
		l = &Limits{}
	}
	return []namedLimit{{"open_files", l.OpenFiles}, {"processes", l.Processes}, {"memory_mib", l.MemoryMiB}, {"file_mib", l.FileMiB}, {"cpu_seconds", l.CPUSeconds}}
}

func (o *OS) describe(add func(format string, a ...any)) {
	for _, l := range []struct {
		what string
		list []string
	}{{"read", o.Read}, {"read and write", o.Write}, {"run programs of", o.Execute}} {
		if len(l.list) > 0 {
			add("Its process may %s: %s.", l.what, join(l.list))
		}
	}
	if len(o.Connect) == 0 {
		add("Its process may connect to nothing.")
	}
	for _, c := range o.Connect {
		ports := strings.Trim(strings.ReplaceAll(fmt.Sprint(c.Ports), " ", ", "), "[]")
		add("Its process may connect to %s, TCP port %s.", c.Network, ports)
	}
	if len(o.Env) > 0 {
		add("Its process sees of the environment: %s.", join(o.Env))
	}
	for _, l := range o.Limits.list() {
		if l.value != 0 {
			add("Its process is limited: %s %d.", l.name, l.value)
		}
	}
	for _, s := range o.Start {
		if len(s.Files) == 0 {
			add("May be started: the executable with SHA-256 %s.", s.Executable)
			continue
		}
		var files []string
		for _, f := range s.Files {
			files = append(files, f.Path+" "+f.SHA256)
		}
		add("May be started: the executable with SHA-256 %s and the files %s.", s.Executable, strings.Join(files, ", "))
	}
}
