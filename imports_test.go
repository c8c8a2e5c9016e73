package inkan_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// allowed lists, for every package, what it may import besides the standard
// library: packages of this module by their path below it, others by module.
// A package that is not named here fails the test. docs/design.md gives the reasons.
var allowed = map[string][]string{
	"approver":            {"attest", "scope", "verify", "verify/source", "internal/certext", "internal/httpsig", "internal/jws", "internal/problem", "internal/strictjson", "internal/postgres", "internal/sqlite", "github.com/jackc/pgx/v5", "github.com/prometheus/client_golang"},
	"approver/client":     {"internal/problem", "internal/strictjson"},
	"attest":              {"internal/certext", "internal/strictjson", "github.com/google/go-tpm"},
	"audit":               {"scope", "internal/certext", "internal/jws", "internal/sqlite", "internal/strictjson", "golang.org/x/mod", "golang.org/x/sys"},
	"audit/report":        {"audit", "scope", "internal/certext"},
	"cmd/inkan":           {"*"},
	"confine":             {"scope", "github.com/elastic/go-seccomp-bpf", "github.com/landlock-lsm/go-landlock", "golang.org/x/net", "golang.org/x/sys"},
	"cmd/inkan-sim":       {"*", "simulator"},
	"examples/bot":        {},
	"hsm":                 {"internal/strictjson", "github.com/ThalesGroup/crypto11", "github.com/miekg/pkcs11", "golang.org/x/sys"},
	"internal/anchor":     {"audit", "tpm"},
	"internal/attester":   {"internal/certext", "attest", "journal", "tpm", "internal/problem", "internal/strictjson"},
	"internal/caller":     {"golang.org/x/sys"},
	"internal/clock":      {"scope", "golang.org/x/sys"},
	"internal/certext":    {"internal/strictjson"},
	"internal/durable":    {},
	"internal/forge":      {"attest", "internal/attester", "github.com/google/go-tpm"},
	"internal/httpsig":    {"internal/jws", "github.com/dunglas/httpsfv"},
	"internal/jws":        {"internal/strictjson"},
	"internal/keyuri":     {"hsm", "tpm"},
	"internal/postgres":   {"github.com/jackc/pgx/v5"},
	"internal/problem":    {"internal/strictjson"},
	"internal/sources":    {"golang.org/x/time"},
	"internal/sqlite":     {"modernc.org/sqlite"},
	"internal/strictjson": {"github.com/go-json-experiment/json", "go.yaml.in/yaml/v3"},
	"internal/testca":     {"internal/certext"},
	"internal/testlog":    {},
	"issuer":              {"attest", "journal", "scope", "verify/source", "internal/certext", "internal/durable", "internal/problem", "internal/sqlite", "internal/strictjson", "golang.org/x/crypto", "golang.org/x/time", "github.com/prometheus/client_golang"},
	"journal":             {"attest", "internal/strictjson", "golang.org/x/sys"},
	"scope":               {"internal/jws", "internal/strictjson", "github.com/holiman/uint256"},
	"signer":              {"internal/sources", "approver/client", "audit", "scope", "internal/clock", "internal/caller", "internal/certext", "internal/durable", "internal/jws", "internal/problem", "internal/strictjson", "github.com/coreos/go-systemd/v22", "github.com/prometheus/client_golang", "golang.org/x/sys", "golang.org/x/time", "github.com/go-jose/go-jose/v4", "github.com/spiffe/go-spiffe/v2"},
	"signer/client":       {"scope", "internal/problem", "internal/strictjson"},
	"simulator":           {},
	"tpm":                 {"attest", "github.com/foxboron/go-tpm-keyfiles", "github.com/google/go-tpm"},
	"verify":              {"scope", "verify/source", "internal/certext", "internal/httpsig", "internal/jws", "internal/problem", "internal/sqlite", "golang.org/x/crypto"},
	"verify/message":      {"scope", "verify", "internal/strictjson"},
	"verify/postgres":     {"verify", "internal/postgres"},
	"verify/source":       {"scope", "github.com/oschwald/maxminddb-golang"},
	"wire":                {"hsm", "journal", "scope", "tpm", "internal/certext", "internal/httpsig", "internal/jws", "internal/keyuri"},
	"wire/proxy":          {"scope", "wire", "internal/caller", "internal/problem", "internal/strictjson", "github.com/prometheus/client_golang"},
	"verify/binding":      {"scope", "verify", "internal/strictjson"},
	"verify/gate":         {"verify", "verify/message", "internal/problem", "internal/sources", "golang.org/x/time", "github.com/prometheus/client_golang"},
}

type listed struct {
	ImportPath   string
	Name         string
	Imports      []string
	GoFiles      []string
	CgoFiles     []string
	DepsErrors   []struct{ Err string }
	TestGoFiles  []string
	XTestGoFiles []string
}

func TestImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Name,Imports,GoFiles,CgoFiles,TestGoFiles,XTestGoFiles", "./...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, "inkan/")
		if len(p.GoFiles)+len(p.CgoFiles) == 0 {
			continue // tests only
		}
		rules, ok := allowed[name]
		if !ok {
			t.Errorf("package %s is not in the allow-list of imports", name)
			continue
		}
		for _, imp := range p.Imports {
			if why := forbidden(imp, rules); why != "" {
				t.Errorf("package %s imports %s: %s", name, imp, why)
			}
		}
	}
}

// forbidden says why an import is not allowed by the rules, or nothing.
func forbidden(imp string, rules []string) string {
	if own, ok := strings.CutPrefix(imp, "inkan/"); ok {
		if slices.Contains(rules, own) || slices.Contains(rules, "*") && own != "simulator" {
			return ""
		}
		return "an arrow that docs/design.md does not have"
	}
	first, _, _ := strings.Cut(imp, "/")
	if !strings.Contains(first, ".") {
		return "" // standard library
	}
	for _, r := range rules {
		if r == "*" || imp == r || strings.HasPrefix(imp, r+"/") {
			return ""
		}
	}
	return "a dependency that this package has no line for"
}
