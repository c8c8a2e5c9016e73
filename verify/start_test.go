package verify_test

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"

	"inkan/scope"
	"inkan/verify"
)

// TestStart: a receiver holds what the statement says of the process that
// asked against the scope's os section.
func TestStart(t *testing.T) {
	exe := sha256.Sum256([]byte("executable"))
	os := `"os":{"execute":["/usr"],"start":[{"executable_sha256":"` + hex.EncodeToString(exe[:]) + `"}]},`
	v := newVenue(t)
	text := strings.Replace(scopeJSON, `"version"`, os+`"version"`, 1)
	v.agent = v.ca.Agent(t, "a", []byte(text), nil)
	var err error
	if v.scope, err = scope.ParseCanonical([]byte(text)); err != nil {
		t.Fatal(err)
	}
	good := scope.Run{OS: v.scope.OS().Digest(), Executable: exe, Start: scope.Digest{1}}
	r := v.receiver(t)
	if _, err := r.Verify(t.Context(), []byte(v.action(t, func(s *scope.Statement) { s.Run = &good })), nil); err != nil {
		t.Errorf("a good start was refused: %v", err)
	}
	for name, c := range map[string]struct {
		run  func() *scope.Run
		want scope.Rule
	}{
		"no start":           {func() *scope.Run { return nil }, scope.RuleOS},
		"another os section": {func() *scope.Run { x := good; x.OS[0]++; return &x }, scope.RuleOS},
		"another executable": {func() *scope.Run { x := good; x.Executable[0]++; return &x }, scope.RuleStart},
	} {
		_, err := r.Verify(t.Context(), []byte(v.action(t, func(s *scope.Statement) { s.Run = c.run() })), nil)
		refusedBy(t, name, err, verify.ReasonScope)
		if err != nil && !strings.Contains(err.Error(), string(c.want)+": ") {
			t.Errorf("%s: got %v, want the rule %s", name, err, c.want)
		}
	}
}

func refusedBy(t *testing.T, name string, err error, want verify.Reason) {
	t.Helper()
	if r, ok := err.(*verify.Refusal); !ok || r.Reason != want {
		t.Errorf("%s: got %v, want a refusal for %s", name, err, want)
	}
}
