package examples_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"inkan/simulator"
)

// section returns the commands of a section: the indented lines, as a stranger
// would type them.
func section(t *testing.T, title string, files ...string) string {
	t.Helper()
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		_, rest, found := strings.Cut(string(b), "\n## "+title+"\n")
		if !found {
			continue
		}
		rest, _, _ = strings.Cut(rest, "\n## ")
		var commands strings.Builder
		for line := range strings.Lines(rest) {
			if c, ok := strings.CutPrefix(line, "    "); ok {
				commands.WriteString(c)
			}
		}
		return commands.String()
	}
	t.Fatalf("no section %q in %v", title, files)
	return ""
}

// TestBots types what the documentation says into a shell: a software TPM, an
// issuer, a signer, and a bot of each kind under inkan run. Only the ports are
// others, since a machine has them once.
func TestBots(t *testing.T) {
	for _, tool := range []string{"swtpm", "bash", "node", "/usr/bin/python3"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v: make tools installs it", err)
		}
	}
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "bin")+"/", "./cmd/inkan", "./cmd/inkan-sim")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.CopyFS(filepath.Join(dir, "examples"), os.DirFS(".")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module inkan\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ports, err := simulator.FreePorts(3)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "examples", "signer.yaml")
	b, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, bytes.ReplaceAll(b, []byte("127.0.0.1:8443"), []byte(ports[0])), 0o600); err != nil {
		t.Fatal(err)
	}

	begin, _, _ := strings.Cut(section(t, "Five minutes, by hand", "../README.md"), "inkan sign ")
	begin = regexp.MustCompile(`(?m)^make .*\n`).ReplaceAllString(begin, "")
	init := "inkan issuer init --dir issuer"
	if !strings.Contains(begin, init+" ") {
		t.Fatalf("the README no longer has %q", init)
	}
	begin = strings.Replace(begin, init, fmt.Sprintf("%s --agent-listen %s --admin-listen %s --public-listen %s", init, ports[0], ports[1], ports[2]), 1)
	bots := section(t, "A bot of your own, confined", "../README.md", "README.md")

	script := "trap 'kill $(jobs -p); wait' EXIT\nexport PATH=$PWD/bin:$PATH\n" + begin + bots + "inkan audit verify --log state/bot-1/log.db --ca issuer/ca.pem --json > report.json\n"
	cmd := exec.CommandContext(t.Context(), "bash", "-eu", "-o", "pipefail", "-c", script)
	cmd.Dir = dir
	out, err := os.Create(filepath.Join(dir, "out")) // a file: daemons keep it open, and a pipe would wait for them
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	failed := cmd.Run()
	said, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	if failed != nil {
		t.Fatalf("%v\n%s", failed, said)
	}

	for i, kind := range []string{"Python", "Node", "Go"} {
		want := regexp.MustCompile(fmt.Sprintf(`(?m)^signed as number %d for the venue: eyJ.*\.\.\.\nrefused: max_order_notional: the notional is 244960 EUR, at most 25000 EUR is allowed`, 2*i+1))
		if !want.Match(said) {
			t.Errorf("%s: no signed order and no refusal after it:\n%s", kind, said)
		}
	}
	b, err = os.ReadFile(filepath.Join(dir, "try", "report.json"))
	if err != nil {
		t.Fatal(err)
	}
	var report struct {
		Entries, Permits, Signed int
		Claims                   []struct {
			Claim  string
			Proven bool
		}
	}
	if err := json.Unmarshal(b, &report); err != nil {
		t.Fatal(err)
	}
	ran := slices.ContainsFunc(report.Claims, func(c struct {
		Claim  string
		Proven bool
	}) bool {
		return c.Claim == "what_ran" && c.Proven
	})
	if report.Entries != 6 || report.Permits != 3 || report.Signed != 3 || !ran {
		t.Errorf("the record says %s", b)
	}
}

// TestBotAlone: without inkan run a bot reaches nothing.
func TestBotAlone(t *testing.T) {
	for _, program := range [][]string{{"/usr/bin/python3", "bot/bot.py"}, {"node", "bot/bot.mjs"}, {"go", "run", "./bot"}} {
		cmd := exec.Command(program[0], program[1:]...)
		cmd.Env = append(os.Environ(), "INKAN_FD=")
		if out, err := cmd.CombinedOutput(); err == nil || strings.Contains(string(out), "signed") {
			t.Errorf("%v: %v: %s", program, err, out)
		}
	}
}
