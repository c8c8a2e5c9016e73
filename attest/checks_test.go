package attest_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"inkan/attest"
)

// TestEveryCheckIsForged: each check is named by a test that forges its fault, but
// for those that docs/attestation.md names.
func TestEveryCheckIsForged(t *testing.T) {
	var text strings.Builder
	for _, pattern := range []string{"*_test.go", "../issuer/*_test.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if f == "checks_test.go" {
				continue // it names some that are not forged
			}
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			text.Write(b)
		}
	}
	for _, c := range attest.Checks {
		built := slices.Contains([]string{"A2", "G2", "G4", "G8"}, c.ID)
		named := regexp.MustCompile(`"` + c.ID + `[" ]|func Test` + c.ID + `\(`).MatchString(text.String())
		if named == built {
			t.Errorf("check %s: named by a test: %v", c.ID, named)
		}
	}
}

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
