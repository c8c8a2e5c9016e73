package proxy_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"inkan/scope"
	"inkan/wire"
	"inkan/wire/proxy"
)

// TestDocumented: docs/proxy.md has every rule with its status.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/proxy.md")
	if err != nil {
		t.Fatal(err)
	}
	for rule, status := range map[scope.Rule]int{
		proxy.RuleCaller: 403, proxy.RuleRequest: 400, scope.RuleDestinations: 403, proxy.RuleSize: 413, proxy.RuleLimit: 503,
		wire.RuleNoCertificate: 503, wire.RuleDevice: 503, wire.RuleTLS: 502, wire.RuleUnreachable: 502,
	} {
		if line := fmt.Sprintf("| %d | `%s` |", status, rule); !strings.Contains(string(doc), line) {
			t.Errorf("docs/proxy.md does not have %s", line)
		}
	}
}
