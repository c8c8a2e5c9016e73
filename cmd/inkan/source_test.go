package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestScopeSource: the command says where an agent may call from, and why an address is refused.
func TestScopeSource(t *testing.T) {
	b, err := os.ReadFile("../../examples/scope.yaml")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "scope.yaml")
	if err := os.WriteFile(file, append(b, "\nsource_networks: [192.0.2.0/24]\nsource_regions: [FR]\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{0, "192.0.2.0/24", []string{"explain"}},
		{0, "known to be in: FR", []string{"explain"}},
		{0, "allowed", []string{"check", "--action", "../../examples/order.json", "--source-address", "192.0.2.7", "--source-region", "FR-IDF"}},
		{exitRefused, "source_network", []string{"check", "--action", "../../examples/order.json", "--source-address", "198.51.100.7", "--source-region", "FR"}},
		{exitRefused, "source_region", []string{"explain", "--action", "../../examples/order.json", "--source-address", "192.0.2.7"}},
		{exitUsage, "an IP address is expected", []string{"explain", "--action", "../../examples/order.json", "--source-address", "192.0.2.7:80"}},
		{exitUsage, "such as FR-IDF is expected", []string{"explain", "--action", "../../examples/order.json", "--source-address", "192.0.2.7", "--source-region", "UK"}},
		{exitUsage, "without --source-address", []string{"explain", "--action", "../../examples/order.json", "--source-region", "FR"}},
	} {
		code, out, errs := call("", append([]string{"scope", c.args[0], "--scope", file}, c.args[1:]...)...)
		if code != c.code || !strings.Contains(out+errs, c.want) {
			t.Errorf("%v: exit code %d, %q %q; want %d and %q", c.args, code, out, errs, c.code, c.want)
		}
	}
}
