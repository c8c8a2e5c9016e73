package attest_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"inkan/attest"
)

// TestDocumented: docs/attestation.md has every check's line.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/attestation.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range attest.Checks {
		if line := fmt.Sprintf("| %s | %s |", c.ID, c.What); !strings.Contains(string(doc), line) {
			t.Errorf("docs/attestation.md does not have the line\n%s", line)
		}
	}
}
