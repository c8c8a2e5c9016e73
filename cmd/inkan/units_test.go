package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestUnits: each unit file starts a command that exists, with flags that it has,
// and lets a daemon that confines itself do so under the systemd of Debian 12,
// which ignores groups of system calls that it does not know.
func TestUnits(t *testing.T) {
	files, err := filepath.Glob("../../dist/systemd/*.service")
	if err != nil || len(files) != 5 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		set := make(map[string][]string)
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(name, "#") {
				set[name] = strings.Fields(value)
			}
		}
		start := set["ExecStart"]
		if len(start) < 2 || start[0] != "/usr/bin/inkan" {
			t.Errorf("%s: ExecStart=%v", f, start)
			continue
		}
		if code, _, errs := call("", append(start[1:], "--help")...); code != 0 {
			t.Errorf("%s: %v: %s", f, start, errs)
		}
		calls := set["SystemCallFilter"]
		for _, c := range calls {
			if strings.HasPrefix(c, "@") && c != "@system-service" {
				t.Errorf("%s: not every systemd knows the group %s", f, c)
			}
		}
		if start[1] != "gate" && start[1] != "proxy" {
			continue
		}
		for _, need := range []string{"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self", "seccomp"} {
			if !slices.Contains(calls, need) {
				t.Errorf("%s: the daemon cannot confine itself without %s", f, need)
			}
		}
		if start[1] == "proxy" && !slices.Contains(set["ReadWritePaths"], "-/var/lib/inkan/signatures.journal") {
			t.Errorf("%s: the journal of signatures cannot be written", f)
		}
	}
}
