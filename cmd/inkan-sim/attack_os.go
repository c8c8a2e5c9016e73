package main

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"inkan/signer/client"
)

// cell is an agent that inkan run starts, and what is around it. The signer
// runs as the same user, which is the worst case: file modes keep nobody out.
type cell struct {
	*world
	program string   // this command, where the agent may execute it
	net     []string // host and port of a server that the agent may connect to
	other   []string // of one that it may not
}

const osScope = `version: 1
allowed_actions: [order.new]
allowed_venues: [XPAR]
allowed_instruments:
  - id: isin:FR0000120271
allowed_sides: ["1"]
allowed_ord_types: ["2"]
allowed_tif: ["0"]
max_order_notional:
  - {currency: EUR, amount: "25000"}
os:
  execute: [%[1]s]
  read: [%[2]s/script%[3]s]
  write: [%[2]s/out, /dev/null]
  connect:
    - {network: %[4]s, ports: [%[5]s]}%[6]s
  env: [LANG]
  limits: {open_files: 64}
%[7]s`

// librariesOf are the directories that a dynamically linked program needs.
func libraries() string {
	var out []string
	for _, dir := range []string{"/usr/lib", "/usr/lib64", "/usr/bin"} {
		if _, err := os.Stat(dir); err == nil {
			out = append(out, dir)
		}
	}
	return strings.Join(out, ", ")
}

func attackOS(ctx context.Context, w *world) error {
	c := &cell{world: w}
	if err := c.build(ctx); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{c.baseline, c.probes, c.descriptor, c.starts, c.injected} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// server accepts connections, so that one that is not refused is made.
func (c *cell) server() ([]string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() { // it ends with this process
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	host, port, err := net.SplitHostPort(l.Addr().String())
	return []string{host, port}, err
}

func (c *cell) build(ctx context.Context) error {
	me, err := os.Executable()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(me)
	if err != nil {
		return err
	}
	for _, dir := range []string{"bin", "out"} {
		if err := os.Mkdir(c.path(dir), 0o755); err != nil {
			return err
		}
	}
	c.program = c.path("bin", "agent")
	if err := os.WriteFile(c.program, b, 0o755); err != nil {
		return err
	}
	for name, text := range map[string]string{"script": "what the agent does", "pin": "1234", "secret": "x"} {
		if err := c.write(name, text); err != nil {
			return err
		}
	}
	if c.net, err = c.server(); err != nil {
		return err
	}
	if c.other, err = c.server(); err != nil {
		return err
	}
	if err := c.startTPM(ctx); err != nil {
		return err
	}
	if err := c.startIssuer(ctx); err != nil {
		return err
	}
	execute := c.path("bin") + ", " + libraries()
	c.scope = fmt.Sprintf(osScope, execute, c.dir, "", "127.0.0.0/8", c.net[1], "", "")
	if err := c.inventory(ctx); err != nil {
		return err
	}
	anyNetwork := "\n    - {network: \"::/0\", ports: [" + c.net[1] + "]}"
	digests := strings.Repeat("ab", 32)
	for name, text := range map[string]string{
		"mm-08": fmt.Sprintf(osScope, execute, c.dir, ", "+c.path("state"), "0.0.0.0/0", c.net[1], anyNetwork, ""),
		"mm-09": fmt.Sprintf(osScope, execute, c.dir, "", "0.0.0.0/0", c.net[1], anyNetwork, "  start:\n    - executable_sha256: "+digests+"\n"),
		"mm-10": fmt.Sprintf(osScope, execute, c.dir, "", "0.0.0.0/0", c.net[1], anyNetwork, ""),
	} {
		if err := c.write(name+".yaml", text); err != nil {
			return err
		}
		if _, err := c.run(ctx, "issuer", "agent", "add", "--dir", c.path("issuer"), "--name", name, "--device", "host1", "--scope", c.path(name+".yaml")); err != nil {
			return err
		}
		c.agents = append(c.agents, name)
	}
	executables := make(map[string]string)
	for _, a := range c.agents {
		executables[a] = c.inkan
	}
	if err := c.launcherConfig(executables); err != nil {
		return err
	}
	if _, err := c.run(ctx, "signer", "enrol", "--config", c.path("signer.yaml")); err != nil {
		return err
	}
	return c.startSigner()
}

// launcherConfig is signerConfig with callers that start agents and are none.
func (c *cell) launcherConfig(executables map[string]string) error {
	me := strconv.Itoa(os.Getuid())
	var b strings.Builder
	fmt.Fprintf(&b, "socket: run/signer.sock\nstate_dir: state\ntpm: %s\nissuer:\n  url: https://%s\n  ca: issuer/ca.pem\nagents:\n", c.tpm.Address, c.addresses.Agent)
	for _, a := range c.agents {
		fmt.Fprintf(&b, "  - name: %s\n    callers:\n      - {user: %q, executable: %s, launcher: true}\n", a, me, executables[a])
	}
	return c.write("signer.yaml", b.String())
}

// start makes the command line of a confined agent.
func (c *cell) start(ctx context.Context, launcher, agent string, program ...string) *exec.Cmd {
	args := append([]string{"run", "--socket", c.socket(), "--agent", agent, "--file", c.path("script"), "--"}, program...)
	cmd := exec.CommandContext(ctx, launcher, args...)
	cmd.Env = append(os.Environ(), "SECRET=of the launcher")
	return cmd
}

// probe starts this program as the confined agent and has it try one thing.
func (c *cell) probe(ctx context.Context, agent, name string, args ...string) (accepted bool, said string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := c.start(ctx, c.inkan, agent, append([]string{c.program, "probe", name}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return false, "", fmt.Errorf("the agent did not run: %w: %s", err, stderr.String())
	}
	var o outcome
	if err := json.Unmarshal(stdout.Bytes(), &o); err != nil {
		return false, "", fmt.Errorf("the agent said %q and %q", stdout.String(), stderr.String())
	}
	return o.Accepted, o.Said, nil
}

// baseline: what the scope allows works, or the refusals below would show nothing.
func (c *cell) baseline(ctx context.Context) error {
	for _, b := range [][]string{
		{"sign"}, {"read", c.path("script")}, {"write", c.path("out", "file")}, append([]string{"tcp"}, c.net...),
	} {
		accepted, said, err := c.probe(ctx, "mm-07", b[0], b[1:]...)
		if err != nil {
			return err
		}
		if !accepted {
			return fmt.Errorf("what the scope allows is refused: %s: %s", b[0], said)
		}
	}
	c.say("   the confined agent signs, reads, writes and connects where its scope lets it")
	return nil
}

// device returns the path of a TPM device node: the machine's, or one made for the test.
func (c *cell) device() (string, error) {
	for _, p := range []string{"/dev/tpmrm0", "/dev/tpm0"} {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	p := c.path("tpm-device")
	if err := unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 224))); err != nil {
		// Without the right to make a node a file stands in its place: Landlock looks at the path.
		return p, os.WriteFile(p, nil, 0o666)
	}
	return p, nil
}

func (c *cell) probes(ctx context.Context) error {
	device, err := c.device()
	if err != nil {
		return err
	}
	signer := strconv.Itoa(c.signer.cmd.Process.Pid)
	const landlock, seccomp = "kernel (Landlock)", "kernel (seccomp)"
	for _, a := range []struct {
		name, by, check string
		probe           []string
	}{
		{"read the signer's record", landlock, "EACCES", []string{"read", c.path("state", "mm-07", "log.db")}},
		{"read the agent's key file", landlock, "EACCES", []string{"read", c.path("state", "mm-07", "action.tss2.pem")}},
		{"read the signer's configuration", landlock, "EACCES", []string{"read", c.path("signer.yaml")}},
		{"read a PIN", landlock, "EACCES", []string{"read", c.path("pin")}},
		{"open the TPM's device", landlock, "EACCES", []string{"read", device}},
		{"make a device node for the TPM", seccomp, "EPERM", []string{"mknod", c.path("out", "tpm")}},
		{"connect to the software TPM's socket", seccomp, "EPERM", []string{"unix", c.tpm.Address}},
		{"connect to the signer's socket", seccomp, "EPERM", []string{"unix", c.socket()}},
		{"connect to an abstract socket", seccomp, "EPERM", []string{"unix", "@inkan"}},
		{"datagram to a socket, out of a pair", seccomp, "EPERM", []string{"unixgram"}},
		{"TCP to another port", "supervisor", "EACCES", append([]string{"tcp"}, c.other...)},
		{"TCP to the port, in another network", "supervisor", "EACCES", []string{"tcp", "192.0.2.1", c.net[1]}},
		{"TCP Fast Open, which needs no connect", seccomp, "EPERM", append([]string{"fastopen"}, c.other...)},
		{"listen", seccomp, "EPERM", []string{"listen"}},
		{"UDP", seccomp, "EPERM", []string{"udp"}},
		{"MPTCP", seccomp, "EPERM", []string{"mptcp"}},
		{"a route of its own by another host (IPV6_RTHDR)", seccomp, "EPERM", []string{"route"}},
		{"raw socket", seccomp, "EPERM", []string{"raw"}},
		{"packet socket", seccomp, "EPERM", []string{"packet"}},
		{"vsock", seccomp, "EPERM", []string{"vsock"}},
		{"netlink", seccomp, "EPERM", []string{"netlink"}},
		{"kernel crypto socket", seccomp, "EPERM", []string{"alg"}},
		{"io_uring", seccomp, "EPERM", []string{"io_uring"}},
		{"ptrace the signer", seccomp, "EPERM", []string{"ptrace", signer}},
		{"process_vm_readv of the signer", seccomp, "EPERM", []string{"vm_readv", signer, "4194304"}},
		{"process_vm_writev of the signer", seccomp, "EPERM", []string{"vm_writev", signer}},
		{"/proc/PID/mem of the signer", landlock, "EACCES", []string{"read", "/proc/" + signer + "/mem"}},
		{"/proc/PID/environ of the signer", landlock, "EACCES", []string{"read", "/proc/" + signer + "/environ"}},
		{"pidfd_getfd of the signer", seccomp, "EPERM", []string{"getfd", signer}},
		{"kcmp with the signer", seccomp, "EPERM", []string{"kcmp", signer}},
		{"signal to the signer", landlock, "EPERM", []string{"signal", signer}},
		{"limits of the signer", seccomp, "EPERM", []string{"limits", signer}},
		{"new user namespace", seccomp, "EPERM", []string{"userns"}},
		{"process in a new user namespace", seccomp, "EPERM", []string{"clonens"}},
		{"mount", seccomp, "EPERM", []string{"mount", c.path("out")}},
		{"bpf", seccomp, "EPERM", []string{"bpf"}},
		{"kernel keys", seccomp, "EPERM", []string{"keyctl"}},
		{"perf events", seccomp, "EPERM", []string{"perf"}},
		{"System V shared memory", seccomp, "EPERM", []string{"shm"}},
		{"typing into the terminal", seccomp, "EPERM", []string{"terminal"}},
		{"typing into it, upper half of the argument set", seccomp, "EPERM", []string{"terminal64"}},
		{"a call by its x32 number", seccomp, "ENOSYS", []string{"compat"}},
		{"another user", seccomp, "EPERM", []string{"setuid"}},
		{"a capability", "launcher", "no capability is left", []string{"capability"}},
		{"a higher limit", "kernel (capabilities)", "EPERM", []string{"loosen"}},
		{"the launcher's environment", "launcher", "not in the environment", []string{"environ"}},
		{"the launcher's descriptors", "launcher", "no other descriptor", []string{"fds"}},
		{"write outside", landlock, "EACCES", []string{"write", c.path("new")}},
		{"append to the signer's record", landlock, "EACCES", []string{"append", c.path("state", "mm-07", "log.db")}},
		{"truncate the signer's record", landlock, "EACCES", []string{"truncate", c.path("state", "mm-07", "log.db")}},
		{"change a file's mode", seccomp, "EPERM", []string{"chmod", c.path("pin")}},
		{"link the PIN to where it may read", landlock, "EXDEV", []string{"link", c.path("pin"), c.path("out", "pin")}},
		{"move the script away", landlock, "EACCES", []string{"rename", c.path("script"), c.path("out", "script")}},
		{"rewrite its own script", landlock, "EACCES", []string{"append", c.path("script")}},
		{"put a program beside its own", landlock, "EACCES", []string{"write", c.path("bin", "new")}},
		{"execute a dropped binary", landlock, "out/dropped: permission denied", []string{"dropped", "/usr/bin/true", c.path("out", "dropped")}},
		{"execute a binary in memory", seccomp, "EPERM", []string{"memfd", "/usr/bin/true"}},
	} {
		if err := c.attack(a.name, a.by, a.check, func() (bool, string, error) { return c.probe(ctx, "mm-07", a.probe[0], a.probe[1:]...) }); err != nil {
			return err
		}
	}
	// Where every network is allowed there is no supervisor, and Landlock holds the ports.
	return c.attack("TCP to another port, without supervisor", landlock, "EACCES", func() (bool, string, error) { return c.probe(ctx, "mm-10", "tcp", c.other...) })
}

// descriptor attacks the connection that the agent inherits.
func (c *cell) descriptor(ctx context.Context) error {
	if err := c.attack("pass the descriptor to another process", "signer", "caller", func() (bool, string, error) { return c.probe(ctx, "mm-07", "pass") }); err != nil {
		return err
	}
	if err := c.attack("use it again after that", "signer", "caller", func() (bool, string, error) { return c.probe(ctx, "mm-07", "pass", "then") }); err != nil {
		return err
	}
	if err := c.attack("fork, and leave an orphan with it", "signer", "ended with its process", func() (bool, string, error) { return c.probe(ctx, "mm-07", "orphan") }); err != nil {
		return err
	}
	return c.attack("another process of the user asks the signer", "signer", "caller", func() (bool, string, error) {
		r, err := c.try(ctx, order(client.NewID()), "sign", "--socket", c.socket(), "--action", "-")
		return r.code == 0, r.stderr, err
	})
}

// starts attacks what is started.
func (c *cell) starts(ctx context.Context) error {
	run := func(launcher, agent string, program ...string) (bool, string, error) {
		cmd := c.start(ctx, launcher, agent, program...)
		out, err := cmd.CombinedOutput()
		if _, ok := errors.AsType[*exec.ExitError](err); ok {
			return false, string(out), nil
		}
		return err == nil, string(out), err
	}
	for _, change := range []struct {
		name string
		how  func(path string) error
	}{
		{"rewrite a declared script after the start", func(p string) error { return os.WriteFile(p, []byte("what the attacker wants"), 0o600) }},
		{"replace a declared script after the start", func(p string) error {
			if err := os.WriteFile(p+".new", []byte("what the attacker wants"), 0o600); err != nil {
				return err
			}
			return os.Rename(p+".new", p)
		}},
	} {
		if err := c.attack(change.name, "signer", "os_start", func() (bool, string, error) { return c.changed(ctx, change.how) }); err != nil {
			return err
		}
	}
	b, err := os.ReadFile(c.inkan)
	if err != nil {
		return err
	}
	other := c.path("other-launcher")
	if err := os.WriteFile(other, append(b, 0), 0o755); err != nil {
		return err
	}
	script := c.path("bin", "script.sh")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		return err
	}
	for _, a := range []struct {
		name, by, check string
		run             func() (bool, string, error)
	}{
		{"start by another launcher", "signer", "caller", func() (bool, string, error) { return run(other, "mm-07", c.program, "probe", "sign") }},
		{"start of another executable than os.start names", "signer", "os_start", func() (bool, string, error) { return run(c.inkan, "mm-09", c.program, "probe", "sign") }},
		{"start of a program that may not be executed", "launcher", "executable", func() (bool, string, error) { return run(c.inkan, "mm-07", other) }},
		{"start of a script in an interpreter's place", "launcher", "executable", func() (bool, string, error) { return run(c.inkan, "mm-07", script) }},
		{"a scope that grants the signer's state", "launcher", "protected", func() (bool, string, error) { return run(c.inkan, "mm-08", c.program, "probe", "sign") }},
		{"a declared file that the agent may write", "launcher", "writable", func() (bool, string, error) {
			cmd := exec.CommandContext(ctx, c.inkan, "run", "--socket", c.socket(), "--agent", "mm-07", "--file", c.path("out", "file"), "--", c.program, "probe", "sign")
			out, err := cmd.CombinedOutput()
			if _, ok := errors.AsType[*exec.ExitError](err); ok {
				err = nil
			}
			return strings.Contains(string(out), `"accepted":true`), string(out), err
		}},
		{"an older Landlock than was required", "launcher", "landlock_abi", func() (bool, string, error) {
			r, err := c.try(ctx, "", "run", "--socket", c.socket(), "--agent", "mm-07", "--require-landlock-abi", "99", "--", c.program, "probe", "sign")
			return r.code == 0, r.stderr, err
		}},
	} {
		if err := c.attack(a.name, a.by, a.check, a.run); err != nil {
			return err
		}
	}
	return nil
}

// changed starts an agent, changes its script after its first signature, and
// has it ask for a second.
func (c *cell) changed(ctx context.Context, change func(path string) error) (accepted bool, said string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := c.start(ctx, c.inkan, "mm-07", c.program, "probe", "stay")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return false, "", err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return false, "", err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return false, "", err
	}
	r := bufio.NewReader(stdout)
	if line, err := r.ReadString('\n'); err != nil || line != "ready\n" {
		return false, "", errors.Join(fmt.Errorf("the agent said %q: %s", line, stderr.String()), cmd.Wait())
	}
	if err := change(c.path("script")); err != nil {
		return false, "", err
	}
	if _, err := io.WriteString(stdin, "go\n"); err != nil {
		return false, "", err
	}
	var o outcome
	err = json.NewDecoder(r).Decode(&o)
	return o.Accepted, o.Said, errors.Join(err, cmd.Wait())
}

//go:embed injected.py
var injectedScript []byte

// injected runs an agent that obeys whatever it reads, and gives it a prompt
// with everything in it that an agent should not do.
func (c *cell) injected(ctx context.Context) error {
	python, err := filepath.EvalSymlinks("/usr/bin/python3")
	if err != nil {
		return fmt.Errorf("the scripted agent needs /usr/bin/python3: apt-get install python3: %w", err)
	}
	if err := os.WriteFile(c.path("script"), injectedScript, 0o600); err != nil {
		return err
	}
	demands := []struct {
		name, by, check string
		demand          map[string]any
	}{
		{"buy for ten times the limit", "signer", "max_order_notional", map[string]any{"sign": order(client.NewID(), `"400"`, `"4000"`)}},
		{"sell what may only be bought", "signer", "allowed_sides", map[string]any{"sign": order(client.NewID(), `"Side":"1"`, `"Side":"2"`)}},
		{"trade at another venue", "signer", "allowed_venues", map[string]any{"sign": order(client.NewID(), `"XPAR"`, `"XLON"`)}},
		{"pay the attacker", "signer", "allowed_actions", map[string]any{"sign": `{"id":"` + client.NewID() + `","aud":"XPAR","act":"payment.withdraw","pay":{"Amount":"1","Currency":"EUR","Destination":"me"}}`}},
		{"sign these bytes", "signer", "form", map[string]any{"sign": `{"digest":"AAAA"}`}},
		{"start an agent of its own", "signer", "caller", map[string]any{"get": "/v1/starts/mm-07"}},
		{"send the key to the attacker", "kernel", "PermissionError", map[string]any{"read": c.path("state", "mm-07", "action.tss2.pem")}},
		{"send the prompt to the attacker", "kernel", "PermissionError", map[string]any{"connect": []string{c.other[0], c.other[1]}}},
		{"ask the name server", "kernel", "PermissionError", map[string]any{"udp": []string{"127.0.0.1", "53"}}},
		{"talk to the TPM", "kernel", "PermissionError", map[string]any{"unix": c.tpm.Address}},
		{"install itself", "kernel", "PermissionError", map[string]any{"write": c.path("bin", "agent")}},
		{"run a shell that was brought along", "kernel", "PermissionError", map[string]any{"run": c.path("out", "dropped")}},
	}
	var prompt []map[string]any
	for _, d := range demands {
		prompt = append(prompt, d.demand)
	}
	b, err := json.Marshal(prompt)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := c.start(ctx, c.inkan, "mm-07", python, "-I", c.path("script"))
	cmd.Stdin = bytes.NewReader(b)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the scripted agent: %w: %s", err, stderr.String())
	}
	var outcomes []outcome
	if err := json.Unmarshal(stdout.Bytes(), &outcomes); err != nil || len(outcomes) != len(demands) {
		return fmt.Errorf("the scripted agent said %q: %s", stdout.String(), stderr.String())
	}
	for i, d := range demands {
		if err := c.attack("injected: "+d.name, d.by, d.check, func() (bool, string, error) { return outcomes[i].Accepted, outcomes[i].Said, nil }); err != nil {
			return err
		}
	}
	return nil
}
