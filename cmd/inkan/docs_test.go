package main

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"inkan/approver"
	"inkan/internal/strictjson"
	"inkan/scope"
	"inkan/signer"
	"inkan/verify/message"
	"inkan/wire/proxy"
)

// documents are what users read, by name.
func documents(t *testing.T) map[string]string {
	t.Helper()
	docs, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(docs) < 10 {
		t.Fatalf("%v, %v", docs, err)
	}
	out := make(map[string]string)
	for _, f := range append(docs, "../../README.md", "../../examples/README.md") {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(filepath.Dir(f))+"/"+filepath.Base(f)] = string(b)
	}
	return out
}

// TestCommandsInDocuments: each command that a document shows exists, and has the
// flags that stand after it.
func TestCommandsInDocuments(t *testing.T) {
	shown := regexp.MustCompile("(?:^|[ `(])inkan ((?:[a-z][a-z-]*(?:\\|[a-z]+)* ?)+)([^`|)>\n]*)")
	flag := regexp.MustCompile(`(?:^|[ \x60])--([a-z][a-z-]*)`)
	found := 0
	for name, text := range documents(t) {
		for _, m := range shown.FindAllStringSubmatch(strings.ReplaceAll(text, "\\\n", " "), -1) {
			list, flags := commands(&env{}), []cli.Flag(nil)
			words := strings.Fields(m[1])
			for len(words) > 0 && list != nil {
				first, _, _ := strings.Cut(words[0], "|") // inkan issuer agent suspend|resume|retire
				i := slices.IndexFunc(list, func(c *cli.Command) bool { return c.Name == first })
				if i < 0 {
					break
				}
				found++
				list, flags, words = list[i].Subcommands, list[i].Flags, words[1:]
			}
			if flags == nil && list != nil && len(words) > 0 && words[0] != "command" && strings.Contains(m[0], "--") {
				t.Errorf("%s: there is no command %q", name, strings.TrimSpace(m[0]))
			}
			for _, f := range flag.FindAllStringSubmatch(strings.Join(words, " ")+" "+m[2], -1) {
				if f[1] != "help" && !slices.ContainsFunc(flags, func(x cli.Flag) bool { return slices.Contains(x.Names(), f[1]) }) {
					t.Errorf("%s: %s: there is no --%s", name, strings.TrimSpace(m[0]), f[1])
				}
			}
		}
	}
	if found < 100 {
		t.Errorf("only %d commands were found in the documents", found)
	}
}

// TestConfigurationsInDocuments: what documents show as a configuration, a list of
// routes or a scope is one. Users, programs and files are those of the test.
func TestConfigurationsInDocuments(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "regions.csv"), []byte("192.0.2.0/24,FR,,,\n"))
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	uri := `"pkcs11:token=x;id=%02d?module-path=/m.so&pin-source=file:/pin"`
	texts := documents(t)
	block := func(document string, n int) string {
		t.Helper()
		blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(texts["docs/"+document], -1)
		if n >= len(blocks) {
			t.Fatalf("%s has %d blocks of YAML", document, len(blocks))
		}
		text := strings.NewReplacer("user: trader", "user: "+me.Username, "/opt/mm07/bin/agent", self).Replace(blocks[n][1])
		for i := 1; strings.Contains(text, `"pkcs11:..."`); i++ {
			text = strings.Replace(text, `"pkcs11:..."`, strings.Replace(uri, "%02d", fmt.Sprintf("%%%02d", i), 1), 1)
		}
		return text
	}
	for _, name := range []string{"mm-07.yaml", "mm-07-reserve.yaml"} { // what an approver allows
		writeFile(t, filepath.Join(dir, name), []byte(block("scope.md", 0)+"max_orders_per_window:\n  - {count: 10, window: {rolling_s: 60}}\n"))
	}
	for what, read := range map[string]func() error{
		"signer.md":   func() error { _, err := signer.ParseConfig([]byte(block("signer.md", 0)), dir); return err },
		"remote":      func() error { return remoteInDocuments(block("signer.md", 0), block("signer.md", 1), dir) },
		"approver.md": func() error { _, err := approver.ParseConfig([]byte(block("approver.md", 1)), dir); return err },
		"proxy.md":    func() error { _, err := proxy.ParseConfig([]byte(block("proxy.md", 0)), dir); return err },
		"routes":      func() error { _, err := message.Parse([]byte(block("gate.md", 1))); return err },
		"scope.md":    func() error { _, err := scope.ParseYAML([]byte(block("scope.md", 0))); return err },
		"os": func() error {
			_, err := scope.ParseYAML([]byte(block("scope.md", 0) + block("scope.md", 1)))
			return err
		},
		"gate.md": func() error {
			return strictjson.UnmarshalYAML([]byte(block("gate.md", 0)+block("gate.md", 2)), 1<<16, new(gateConfig))
		},
		"examples/gate.yaml":   func() error { return strictjson.UnmarshalYAML(example(t, "gate.yaml"), 1<<16, new(gateConfig)) },
		"examples/routes.yaml": func() error { _, err := message.Parse(example(t, "routes.yaml")); return err },
		"examples/proxy.yaml":  func() error { _, err := proxy.ParseConfig(example(t, "proxy.yaml"), dir); return err },
	} {
		if err := read(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// example is a file of examples.
func example(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../examples", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// remoteInDocuments reads the section remote, with the agent that calls from elsewhere, in
// a whole configuration.
func remoteInDocuments(whole, remote, dir string) error {
	section, agents, _ := strings.Cut(remote, "agents:\n")
	_, err := signer.ParseConfig([]byte(section+whole+strings.Replace(agents, "name: mm-07", "name: mm-08", 1)), dir)
	return err
}

// TestMetricsInDocuments: each metric of the program has its line, and each line
// its metric.
func TestMetricsInDocuments(t *testing.T) {
	name := regexp.MustCompile(`\binkan_[a-z]+_[a-z_]+`)
	documented := make(map[string]bool)
	for _, text := range documents(t) {
		for _, m := range name.FindAllString(text, -1) {
			documented[m] = false
		}
	}
	for _, dir := range []string{"signer", "approver", "issuer", "verify/gate", "wire/proxy"} {
		files, err := filepath.Glob("../../" + dir + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`"(inkan_[a-z]+_[a-z_]+)"`).FindAllStringSubmatch(string(b), -1) {
				if _, ok := documented[m[1]]; !ok {
					t.Errorf("no document has %s", m[1])
				}
				documented[m[1]] = true
			}
		}
	}
	for m, exists := range documented {
		if !exists {
			t.Errorf("a document has %s, and no program", m)
		}
	}
}
